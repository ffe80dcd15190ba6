"""What a plan keeps of the mass of attention, measured on a few sampled rows, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.prefill.scoring import SLAB_BYTES, logits_of, on_device, score_kernels

_ROWS_PER_SAMPLE = 1024  # one row in so many is looked at: 1/1024 of the arithmetic of dense attention
_LEAST_ROWS = 2  # in a shorter pass; a prompt has many layers and passes, each with rows of its own


def sample_rows(n: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Rows of a stratified sample, int64, ascending: one drawn evenly from each of min(count, n) equal parts of 0..n-1.

    Every row is as likely as every other one, so the mean of anything over the sample estimates its mean over all rows
    without bias. Drawn on the CPU: the same rows on every device.
    """
    count = min(count, n)
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return on_device(((torch.arange(count) + drawn) * n / count).long().clamp(max=n - 1), device)


def rows_to_measure(n: int, most: int) -> int:
    """How many of n rows to look at: at most `most`, fewer in a short pass; 0 if `most` is."""
    return min(most, n, max(_LEAST_ROWS, n // _ROWS_PER_SAMPLE))


def kept_shares(q: Tensor, k: Tensor, lse: Tensor, layer: LayerSpec, rows: Tensor) -> Tensor:
    """Share of some rows' attention mass that lies on the keys which attention has read.

        share_i = exp(lse_i - log sum_(j <= p) exp(l_ij)),   lse over the keys read, l with the layer's scale and soft-capping

    So it needs no mask and holds for whatever chose the keys, as long as nothing was estimated and the layer has no window.

    Args:
        q: [B, Hq, N, D]. k: [B, Hkv, M, D]. lse: [B, Hq, N] float32, of the attention computed. rows: int64, rows of q.

    Returns:
        [B, Hq, rows] float32 in 0..1. Cost: O(Hq rows M D), products in float32 or, on CUDA, as attention's own. Holds at most
        about `SLAB_BYTES` of logits at once.
    """
    batch, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    group = hq // hkv
    fast = score_kernels(q, layer)
    if fast is not None:
        tiles, _ = fast.tile_lse(q.index_select(2, rows), k, rows + (m - n + 1), scale=layer.scale, block=128)
        return (lse.index_select(2, rows) - tiles.logsumexp(-1)).exp().clamp(max=1.0)
    future = torch.arange(m, device=k.device) > (rows + (m - n))[:, None]
    width = max(1, int(SLAB_BYTES / (8 * batch * group * rows.numel() * m + 4 * batch * m * d)))
    found = []
    for first in range(0, hkv, width):
        keys = k[:, first : first + width]
        picked = q[:, first * group : (first + width) * group].index_select(2, rows).reshape(batch, keys.shape[1], -1, d)
        logits = logits_of(picked, keys, layer).view(batch, -1, rows.numel(), m)
        found.append(logits.masked_fill_(future, -torch.inf).logsumexp(-1))
    return (lse.index_select(2, rows) - torch.cat(found, 1)).exp().clamp(max=1.0)
