"""What dense attention gives each tile: the ground truth that gates learn and that selections are measured against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.prefill.scoring import logits_of, slabs


def tile_probabilities(q: Tensor, k: Tensor, layer: LayerSpec, block: int) -> tuple[Tensor, Tensor]:
    """Dense attention probabilities, pooled over square tiles.

    Args:
        q: [B, Hq, N, D]. k: [B, Hkv, M, D], M >= N, right-aligned.
        layer: its scale, soft-capping and window count.
        block: tile size of queries and keys, in tokens.

    Returns:
        largest [B, Hq, nQ, nK], the largest probability in a tile, and mass [B, Hq, nQ, nK], the probability of a tile's keys
        averaged over the rows of its query tile, which sums to 1 over key tiles. float32; 0 where causality forbids a tile.

    Cost: the logits of dense attention, about `scoring.SLAB_BYTES` of them at a time. Mutates nothing.
    """
    batch, hq, n, d = q.shape
    m = k.shape[2]
    group = hq // k.shape[1]
    shape = (batch, hq, -(-n // block), -(-m // block))
    largest, mass = (torch.zeros(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    for heads, start, stop in slabs(k.shape[1], n, m, block, pair_bytes=16.0 * batch * group):
        end = m - n + stop  # keys up to the last row's own
        rows = q[:, heads.start * group : heads.stop * group, start:stop]
        logits = logits_of(rows.reshape(batch, -1, group * (stop - start), d), k[:, heads, :end], layer)
        position = torch.arange(m - n + start, end, device=q.device)[:, None]
        key = torch.arange(end, device=q.device)
        hidden = key > position
        if layer.window:
            hidden = hidden | (key <= position - layer.window)
        weights = logits.view(batch, -1, stop - start, end).masked_fill_(hidden, -torch.inf).softmax(-1)
        tiles = pad(weights, (0, -end % block, 0, (start - stop) % block)).unflatten(-1, (-1, block)).unflatten(2, (-1, block))
        here = (
            slice(None),
            slice(heads.start * group, heads.stop * group),
            slice(start // block, -(-stop // block)),
            slice(0, -(-end // block)),
        )
        largest[here] = tiles.amax((3, 5))
        mass[here] = tiles.sum((3, 5))
    height = torch.full((shape[2], 1), float(block), device=q.device)
    height[-1] -= -n % block
    return largest, mass / height


def normalised(truth: Tensor) -> Tensor:
    """Rows [..., nK] divided by their sums: a distribution over key tiles."""
    return truth / truth.sum(-1, keepdim=True)
