"""Attention in plain float32 torch operations: any device, any mask, soft-capping. Slow and sure."""

from __future__ import annotations

import torch
from torch import Tensor

_LOGIT_BYTES = 64 << 20  # most float32 logits a caller should hold at once


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, mask: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs a mask allows, float32 throughout.

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, M, D], Hq a multiple of Hkv. Any float dtype.
        mask: bool, broadcastable to [B, Hq, N, M]; None = all. Rows without a key give out 0 and lse -inf.
        bias: float32, broadcastable alike, added to the logits after soft-capping; -inf = not read.

    Returns:
        out [B, Hq, N, D] and lse [B, Hq, N], float32.

    Holds B Hq N M float32 logits: callers cut N so that they fit (`rows_at_once`).
    """
    b, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    logits = torch.matmul(q.float().reshape(b, hkv, -1, d) * scale, k.float().transpose(-1, -2)).view(b, hq, n, m)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if bias is not None:
        logits = logits + bias
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1))
    return torch.matmul(weights.view(b, hkv, -1, m), v.float()).view(b, hq, n, d), lse


def rows_at_once(q: Tensor, n_keys: int) -> int:
    """Rows of q [B, Hq, N, D] that `plain` may take at once over n_keys keys, at least 1."""
    return max(1, _LOGIT_BYTES // (4 * q.shape[0] * q.shape[1] * max(1, n_keys)))
