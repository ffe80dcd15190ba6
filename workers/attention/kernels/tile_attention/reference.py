"""Tile attention in plain torch: the definition of truth for the kernel beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.plan import TilePlan


def tile_attention_reference(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs a plan keeps.

        l_ij  = scale q_i . k_j           for kept pairs, -inf otherwise
        lse_i = log sum_j exp(l_ij)
        o_i   = sum_j exp(l_ij - lse_i) v_j

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, M, D]; query head h reads KV head h // (Hq / Hkv). Any float dtype.

    Returns:
        out [B, Hq, N, D] and lse [B, Hq, N], both float32 (computed in float64); rows without a key: 0 and -inf.

    Materialises all N M pairs of every head: for tests.
    """
    group, shared = q.shape[1] // k.shape[1], q.shape[1] // plan.mask_heads
    keep = plan.to_dense_mask().repeat_interleave(shared, 1)
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) * scale
    logits = logits.masked_fill(~keep, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return (weights @ v.double().repeat_interleave(group, 1)).float(), lse.float()
