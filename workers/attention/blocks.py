"""Attention over one rectangle or triangle of keys, with its log-sum-exp: the piece every path is put together from.

`block` takes the fused kernel that torch ships for the device where it can say what is asked, and `plain` float32 math where
it cannot (soft-capping; masks on CUDA). Keys may have fewer heads than queries; they are read in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported
from winnow.workers.attention import cuda
from winnow.workers.attention.plain import plain


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes and dtypes that no path here can run.

    Raises:
        InvalidRequest: sizes that do not fit each other.
        Unsupported: a dtype other than float32, float16 and bfloat16.
    """
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InvalidRequest(f"attention: q, k, v do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if not (k.shape[1] and q.shape[0]) or q.shape[1] % k.shape[1] or not 1 <= q.shape[2] <= k.shape[2]:
        raise InvalidRequest(
            "attention: needs a sequence, query heads a multiple of KV heads and 1 <= rows <= keys, "
            f"got {q.shape[0]} sequences, {q.shape[1]} and {k.shape[1]} heads, {q.shape[2]} rows and {k.shape[2]} keys"
        )
    if not q.device == k.device == v.device:
        raise InvalidRequest(f"attention: q, k and v must lie on one device, got {q.device}, {k.device}, {v.device}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise Unsupported(f"attention: q, k and v must share one of float32, float16, bfloat16, got {got}")


def block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every row over the keys given.

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, M, D], Hq a multiple of Hkv. Innermost stride 1.
        causal: row i reads keys 0..i; needs M = N.
        mask: [N, M] bool, True = may be read; not together with causal. Every row must keep a key.

    Returns:
        out [B, Hq, N, D] in q's dtype (float32 from the plain path) and lse [B, Hq, N] float32, natural log.
    """
    if softcap == 0.0 and q.device.type == "cpu":
        return _flash_cpu(q, k, v, scale, causal, mask)
    if softcap == 0.0 and q.device.type == "cuda" and mask is None:
        return cuda.fused(q, k, v, scale=scale, causal=causal)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return plain(q, k, v, scale=scale, softcap=softcap, mask=mask)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every row over the keys given, with something added to the logits; on the CPU, by the fused kernel.

    Args:
        q: [B, H, N, D]. k, v: [B, H, M, D]; any outer strides, 0 included.
        bias: [B, H, 1, M] float32, the same for all rows of a head; -inf = the key is not read.

    Returns:
        as `block`; heads without a key: out 0, lse -inf.
    """
    added = bias.expand(*q.shape[:3], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=added, scale=scale)
    return out, torch.where((bias > -torch.inf).any(-1), lse, -torch.inf)  # the kernel says 0 where it read nothing


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    b, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    group = hq // hkv
    bias = None
    if mask is not None:  # the kernel takes an additive mask only
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    if group > 1 and not causal and bias is None:
        # The group's rows share their keys: one tall head reads each key once and fills the kernel's row blocks.
        q = q.reshape(b, hkv, group * n, d)
    elif group > 1:
        # The kernel walks strides, so a head repeated by expand is not copied.
        k, v = (x.flatten(0, 1).unsqueeze(1).expand(b * hkv, group, m, d) for x in (k, v))
        q = q.reshape(b * hkv, group, n, d)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if group == 1:
        return out, lse
    return out.reshape(b, hq, n, d), lse.reshape(b, hq, n)
