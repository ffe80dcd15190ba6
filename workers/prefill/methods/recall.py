"""Quality as the knob: each head gets the fewest tiles that keep a wanted share of its attention mass on sampled rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.tiles import by_geometry
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.quality import sample_rows
from winnow.workers.prefill.scoring import (
    SLAB_BYTES,
    keep_share,
    on_device,
    pool_sum,
    quick_logits,
    score_kernels,
    sink_and_own_tiles,
)

# Shares of a scorer's own mass that are tried, from its forced tiles alone to everything: finer where little is left out.
_TRIED = (0.0, *(1.0 - 2.0 ** (-step / 4) for step in range(1, 45)), 1.0)

_CACHE_BYTES = 4 << 20  # of logits at once on a CPU: larger tensors are new memory each time, whose pages cost more than the work


@prefill_methods.register("recall")
@dataclass(frozen=True)
class Recall(TileListMethod):
    """Choose tiles by the exact attention of one row in 32, and how many of them by that of a few others.

    A tile's score is the mean share of attention mass that the scored rows of its query tile give it: unbiased, and for rows that
    mostly agree a better guide than sums of pooled or antidiagonal products, which see keys through their neighbours. A scorer's
    share of *its* mass still says little about the mass of rows it did not look at, and how little differs by head, layer and
    text; that is why published methods carry thresholds for each model. Here a head's threshold is the smallest tried one
    whose tiles hold, on rows drawn evenly at random over the prompt,

        mean_i R_i - z * std(R_i) / sqrt(rows) >= recall,   R_i = sum of the exact probabilities of row i on kept tiles

    The rows are a stratified sample, so mean_i R_i estimates the mean over all rows without bias for every threshold tried;
    the subtracted error makes up for choosing the threshold by the same rows. A head for which no threshold will do is dense.

    Source: own design. Forced are column 0, the own tiles and those just before them: for the first rows of a tile the words
    before them lie there, which a mean over the tile's rows hides. The samples make the plan depend on all of the rows, so it
    is not prefix-safe. Layers with a sliding window, and prompts of up to two tiles, are left dense.

    Attributes:
        recall: share of each head's attention mass to keep, mean over its rows, in (0, 1]; 1 keeps everything.
        rows: rows sampled, 8 or more; their exact attention is what control costs.
        confidence: z, standard errors that the estimate must lie above `recall`; 0 or more.
        block: rows and keys of a tile, a power of two up to 128.
        every: one row in so many scores its tile, a power of two up to 128; one a tile at least.
        window_tiles: tiles before the own ones that are forced, 0 or more.
        seed: of the samples.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="per head, the fewest tiles that keep a wanted share of the attention mass, by exact attention of sampled rows",
    )
    recall: float = 0.99
    rows: int = 64
    confidence: float = 1.0
    block: int = 128
    every: int = 32
    window_tiles: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.recall <= 1.0:
            raise InvalidRequest(f"recall: recall must be in (0, 1], got {self.recall}; 0.99 is the default, 1 keeps everything")
        if self.rows < 8:
            raise InvalidRequest(f"recall: rows must be 8 or more, got {self.rows}; fewer say nothing about a head")
        if not 0.0 <= self.confidence < float("inf"):
            raise InvalidRequest(f"recall: confidence must be 0 or more standard errors, got {self.confidence}")
        if self.window_tiles < 0:
            raise InvalidRequest(f"recall: window_tiles must be 0 or more, got {self.window_tiles}; 1 is the default")
        if not 0 <= self.seed < 1 << 31:
            raise InvalidRequest(f"recall: seed must be 0 to {(1 << 31) - 1}, got {self.seed}; 0 is the default")
        for name in ("block", "every"):
            value = getattr(self, name)
            if not 1 <= value <= 128 or value & (value - 1):
                raise InvalidRequest(f"recall: {name} must be a power of two up to 128, got {value}")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head: the tiles of the largest scores up to the head's own threshold. See the class.

        Cost: O(Hq N M D / every) for the scores and O(Hq rows M D) for the sample: 1 / every + rows / N of dense attention's
        logits. Mutates nothing.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        if self.recall >= 1.0 or m <= 2 * b or layer.window:
            return None
        shares = tile_shares(q, k, layer, b, min(self.every, b), self.seed)
        forced = sink_and_own_tiles(n, m, b, b, q.device, self.window_tiles)
        sampled = _sampled_rows(n, self.rows, self.seed + 1, q.device)  # others than those that score
        mass = tile_mass(q, k, layer, sampled, b)  # [B, Hq, rows, nK]
        tiles = sampled // b
        share = self._threshold(shares[:, :, tiles], forced[tiles], mass)
        wanted = share.unsqueeze(-1) - (shares * forced).sum(-1)
        mask = keep_share(shares.masked_fill(forced, 0.0), wanted) | forced | (share >= 1.0)[..., None, None]
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=b, block_k=b, mean_correction=self.correction)

    def _threshold(self, shares: Tensor, forced: Tensor, mass: Tensor) -> Tensor:
        """[B, Hq] float32: the smallest tried share whose tiles hold `recall` of the sampled rows' mass; 1 where none does.

        Args:
            shares, mass: [B, Hq, rows, nK], scorer's and exact; each row sums to 1. forced: [rows, nK] bool.
        """
        order = shares.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        ordered = shares.gather(-1, order)
        before = ordered.cumsum(-1) - ordered
        held = mass.gather(-1, order).cumsum(-1)
        tried = _tried(shares.device)
        count = torch.searchsorted(before.contiguous(), tried.expand(*before.shape[:-1], -1).contiguous())
        count = torch.maximum(count, forced.sum(-1)[:, None])
        recalls = held.gather(-1, count.clamp(min=1) - 1)  # [B, Hq, rows, tried]
        error = recalls.std(2, correction=0) / recalls.shape[2] ** 0.5
        enough = recalls.mean(2) - self.confidence * error >= self.recall
        enough[..., -1] = True
        return tried[enough.int().argmax(-1)]


@by_geometry
def _tried(device: torch.device) -> Tensor:
    """`_TRIED`, [T] float32."""
    return on_device(torch.tensor(_TRIED), device)


_sampled_rows = by_geometry(sample_rows)


@by_geometry
def scored_rows(n: int, every: int, seed: int, device: torch.device) -> Tensor:
    """Rows, int64, ascending: one drawn evenly from each `every` rows, the last of which may be fewer. Drawn on the CPU."""
    first = torch.arange(0, n, every)
    drawn = torch.rand(first.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return on_device(first + (drawn * (n - first).clamp(max=every)).long(), device)


def tile_shares(q: Tensor, k: Tensor, layer: LayerSpec, block: int, every: int, seed: int) -> Tensor:
    """Mean exact attention mass that some rows of each query tile give to each key tile.

    Args:
        q: [B, Hq, N, D]. k: [B, Hkv, M, D], any float dtype.
        block: rows and keys of a tile. every: one row in so many is looked at; divides block. seed: of which one.

    Returns:
        [B, Hq, ceil(N / block), ceil(M / block)] float32; each row sums to 1. Holds at most about `SLAB_BYTES` at once besides.
    """
    batch, hq, n, _ = q.shape
    hkv, m = k.shape[1], k.shape[2]
    rows, per_tile, n_q, n_k = scored_rows(n, every, seed, q.device), block // every, -(-n // block), -(-m // block)
    fast, group = score_kernels(q, layer), hq // hkv
    width = max(1, int(SLAB_BYTES / (4 * batch * group * rows.numel() * n_k)))
    found = []
    for first in range(0, hkv, width):
        keys, picked = k[:, first : first + width], q[:, first * group : (first + width) * group]
        if fast is not None:
            lse, _ = fast.tile_lse(picked[:, :, rows], keys, rows + (m - n + 1), scale=layer.scale, block=block)
            found.append(fast.sum_shares(lse, per_tile))
        else:
            mass = tile_mass(picked, keys, layer, rows, block)
            mass = torch.nn.functional.pad(mass, (0, 0, 0, n_q * per_tile - rows.numel()))
            found.append(mass.unflatten(2, (n_q, per_tile)).sum(3))
    shares = torch.cat(found, 1)
    return shares / shares.sum(-1, keepdim=True)


def tile_mass(q: Tensor, k: Tensor, layer: LayerSpec, rows: Tensor, block: int) -> Tensor:
    """Exact attention mass of some rows on each key tile.

    Args:
        q: [B, Hq, N, D]. k: [B, Hkv, M, D]. rows: int64, ascending: which rows of q.

    Returns:
        [B, Hq, rows, ceil(M / block)] float32; each row sums to 1. Holds at most about `SLAB_BYTES` of probabilities at once,
        on a CPU what fits its cache.
    """
    batch, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    fast = score_kernels(q, layer)
    if fast is not None:
        lse, _ = fast.tile_lse(q[:, :, rows], k, rows + (m - n + 1), scale=layer.scale, block=block)
        return torch.softmax(lse, -1)
    past, is_cpu = m - n, k.device.type == "cpu"
    mass = torch.zeros(batch, hq, rows.numel(), -(-m // block), device=k.device)
    step = max(1, int((_CACHE_BYTES if is_cpu else SLAB_BYTES) / ((q.element_size() + 4) * batch * hq * m)))
    for start in range(0, rows.numel(), step):
        part = rows[start : start + step]
        # keys that all of these rows see, and those that some do; on an accelerator the host does not know
        low, upto = (int(part[0]) + past + 1, min(m, -(-(int(part[-1]) + past + 1) // block) * block)) if is_cpu else (0, m)
        picked = q[:, :, part].reshape(batch, hkv, -1, d)
        logits = quick_logits(picked, k[:, :, :upto], layer).view(batch, hq, -1, upto)
        logits[..., low:].masked_fill_(torch.arange(low, upto, device=k.device) > (part + past)[:, None], -torch.inf)
        mass[:, :, start : start + step, : -(-upto // block)] = pool_sum(torch.softmax(logits, -1, dtype=torch.float32), block)
    return mass
