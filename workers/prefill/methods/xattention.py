"""XAttention: tiles scored by the antidiagonals of small cells, kept until they hold a share of each row's mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.scoring import keep_share, quick_logits, score_kernels, sink_and_own_tiles, slabs


@prefill_methods.register("xattention")
@dataclass(frozen=True)
class XAttention(TileListMethod):
    """Per row of tiles, the fewest tiles that hold `threshold` of the mass of a softmax over cells.

    A cell is `stride` queries by `stride` keys; its logit is the mean over its antidiagonal, which crosses every column and
    every diagonal that passes through it. One product of concatenated vectors gives it at 1 / stride of the cost of q k^T.

        l[r, c] = scale / S  sum_d  q[rS + S-1-d] . k[cS + d],   share[I, J] = sum over cells of the tile of softmax_c(l)

    Source: "XAttention: Block Sparse Attention with Antidiagonal Scoring" (arXiv 2503.16428, ICML 2025), algorithm 1, and
    the published code's selection: tile column 0 and the own tile are kept and count first. Deviations:
    - so it is for every row; where the published code scores a prompt from its first token, the own tiles overwrite its mark on
      column 0, and each row keeps one tile more than it needs instead;
    - a cell of keys is seen by a cell of rows only if it ends at or before the last of them, whatever M - N is, so that a
      plan never depends on later tokens; the published code aligns both to its own padding;
    - the means are over real tokens: a shorter last cell of rows is averaged over its rows, a shorter last cell of keys is
      left out (its tile is the last rows' own); the published code pads both with zeros;
    - the layer's own scale and soft-capping enter every score; the published code assumes 1 / sqrt(D);
    - one threshold for all heads: the published per-head thresholds belong to one model, and how they were found is not;
    - heads are scored in slabs, each against the keys up to its own last row.
    Layers with a sliding window, and prompts of up to two tiles, are left dense.

    Attributes:
        stride: side of a cell, 8 or 16 as published; half the work and less acuity each time it doubles.
        threshold: share of each row's mass to keep, above 0; 1 or more keeps everything.
        block: tile size of queries and keys: 32, 64 or 128.
    """

    caps = Capabilities(
        tensor_parallel=True,
        fallback="dense",
        notes="tiles by antidiagonal sums, a share of each row's mass; chunks must be whole tiles (128 tokens)",
    )
    stride: int = 8
    threshold: float = 0.9
    block: int = 128

    def __post_init__(self) -> None:
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"xattention: block must be 32, 64 or 128, got {self.block}")
        if self.stride < 1 or self.block % self.stride:
            raise InvalidRequest(
                f"xattention: stride must divide block ({self.block}), got {self.stride}; 8 and 16 are published"
            )
        if not 0.0 < self.threshold < float("inf"):
            raise InvalidRequest(f"xattention: threshold must be above 0, got {self.threshold}; 0.9 is the published default")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head and row of tiles: tile column 0, the own tiles, and the largest others. See the class.

        Cost: O(Hq N M D / stride) for the cells, O(Hq nQ nK log nK) for the choice. Holds at most about 1 GiB of cells at
        once. Mutates nothing.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        if m <= 2 * b or layer.window:
            return None
        if self.threshold >= 1.0:  # sums round to just above or below 1
            mask = torch.ones(*q.shape[:2], -(-n // b), -(-m // b), dtype=torch.bool, device=q.device)
            return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=b, block_k=b, mean_correction=self.correction)
        shares = self.tile_shares(q, k, layer)
        forced = sink_and_own_tiles(n, m, b, b, q.device)
        wanted = self.threshold * shares.sum(-1) - (shares * forced).sum(-1)
        mask = keep_share(shares.masked_fill(forced, 0.0), wanted) | forced
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=b, block_k=b, mean_correction=self.correction)

    def tile_shares(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """[B, Hq, nQ, nK] float32: mass of each tile, summed over the cells of its rows."""
        b, size = self.block, self.stride
        batch, hq, n, d = q.shape
        hkv, m = k.shape[1], k.shape[2]
        group, past, per_tile = hq // hkv, m - n, b // size
        keys = torch.nn.functional.pad(k, (0, 0, 0, -m % b)) if m % b else k
        cells_k = keys.unflatten(2, (-1, size)).flatten(3)  # [B, Hkv, nK per_tile, S D]; a view of whole tiles of cached keys
        shares = torch.zeros(batch, hq, -(-n // b), -(-m // b), device=q.device)
        fast = score_kernels(q, layer)
        cell_bytes = (8.0 if fast is None else 2.0 + 4 / per_tile) / size**2
        for heads, first, end in slabs(hkv, n, m, b, cell_bytes * batch * group, 2048 if fast is None else 8192):
            width = -(-(end + past) // b) * per_tile
            own_heads = slice(heads.start * group, heads.stop * group)
            rows = q[:, own_heads, first:end]
            if (end - first) % b:
                rows = torch.nn.functional.pad(rows, (0, 0, 0, -(end - first) % b))
                if end % size:  # the last cell has fewer rows to average over
                    rows[:, :, end // size * size - first :] *= size / (end % size)
            # Reversed are the rows, of which there may be fewer than keys and which are copied anyway.
            cells_q = rows.unflatten(2, (-1, size)).flip(3)  # [B, heads, cells, S, D]
            n_cells = cells_q.shape[2]
            cells_q = cells_q.contiguous().view(batch, -1, group * n_cells, size * d)
            logits = quick_logits(cells_q, cells_k[:, heads, :width], layer, 1 / size).view(batch, -1, n_cells, width)
            # keys of cells that end at or before a cell's last row: all but those of a band on the right
            start = torch.arange(first, first + n_cells * size, size, device=q.device)
            seen = (torch.clamp(start + size, max=n) + past) // size
            place = (slice(None), own_heads, slice(first // b, -(-end // b)), slice(width // per_tile))
            if fast is not None:
                lse = fast.cell_lse(logits, torch.where(start < end, seen, 0), per_tile)
                shares[place] = fast.sum_shares(lse, per_tile)
                continue
            band = (min(first + size, n) + past) // size
            logits[..., band:].masked_fill_(torch.arange(band, width, device=q.device) >= seen[:, None], -torch.inf)
            weights = torch.softmax(logits, -1, dtype=torch.float32)
            weights.masked_fill_((start >= end)[:, None], 0.0)  # cells beyond the last row
            shares[place] = weights.unflatten(2, (-1, per_tile)).unflatten(4, (-1, per_tile)).sum((3, 5))
        return shares
