"""Exact attention of one query token over a sequence's local keys, with as few operations as a device allows.

A decode step calls this layers x sequences times; at a thousand keys the calls cost as much as the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_keys


def attend_dense(layer: LayerSpec, query: Tensor, kv: Tensor, n_cached: int) -> Tensor:
    """softmax(scale * q k^T) v over the keys the layer's window leaves.

    Args:
        query: [Hq, D], model dtype.
        kv: [2, Hkv, capacity, D], same dtype and device; K at 0, V at 1.
        n_cached: valid keys, the step's own included; at least 1.

    Returns:
        [Hq, D] in query's dtype.
    """
    start = max(0, n_cached - layer.window) if layer.window else 0
    k, v = kv.narrow(2, start, n_cached - start).unbind(0)  # [Hkv, m, D]
    if layer.softcap:
        return attend_keys(query, k, v, scale=layer.scale, softcap=layer.softcap)[0].to(query.dtype)
    # The query heads of a group are rows of one tall head: each key is read once.
    rows = query.reshape(1, layer.n_kv_heads, -1, layer.head_size)
    if query.device.type == "cpu":
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k[None], v[None], scale=layer.scale)[0]
    elif query.device.type == "cuda" and query.dtype != torch.float32 and layer.head_size % 8 == 0:
        # Left to itself torch picks cuDNN, which gives few rows to few processors; this kernel splits the keys among all.
        out = torch.ops.aten._scaled_dot_product_flash_attention(rows, k[None], v[None], scale=layer.scale)[0]
    else:
        out = F.scaled_dot_product_attention(rows, k[None], v[None], scale=layer.scale)
    return out.reshape(layer.n_q_heads, layer.head_size)
