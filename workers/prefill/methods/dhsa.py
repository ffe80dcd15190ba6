"""DHSA, second version: four ways to choose tiles of 128 queries and 32 keys within a share of the row, none of them trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.rope_bands import check_pooling, pooled_logits
from winnow.workers.prefill.scoring import forbidden_tiles, keep_top, pool_max, pool_mean, recent_mass, sink_and_own_tiles

MASKS = ("topk", "a", "vs", "vsb")


@prefill_methods.register("dhsa")
@dataclass(frozen=True)
class DHSA(TileListMethod):
    """Keep `density` of a row's tiles, chosen by one of four masks.

    - `topk`: the largest products of mean query and mean key of a tile.
    - `a`: the same, within what the first tile and the row's own tiles leave of the budget.
    - `vs`: columns and distances with most of the last query tile's attention, `split` of the budget for columns, counted in
      tokens; a tile is kept when a column or a distance runs through it.
    - `vsb`: the same in whole key tiles and from raw products instead of attention, which needs no scores of single keys.

    Source: "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (arXiv 2510.24606), the
    block-sparse masks of its second version. The method with learnt chunk borders is `dhsa-v1`. Deviations:
    - tiles that causality forbids are left out before tiles are ranked; published, they used up the budget of early rows;
    - the budget of `topk` and `a` is a share of the tiles that a row may read, not of all tiles;
    - every mask keeps the first tile and all tiles that hold a row's own keys;
    - `a`: a row keeps at least those; published, rows within the budget of the longest were dense, which a budget that
      shrinks with the row has no use for. `vs` and `vsb`: rows within the whole budget and the last query tile are dense;
    - means are over a ragged tile's real tokens; published, padding took part;
    - `vsb` adds up products of tile sums, which equals adding up the products of single keys; soft-capping is not applied to
      them;
    - K is not repeated for grouped heads, and nothing loops over heads or tiles.
    The last rows steer `vs` and `vsb`, and with pooling="bands" all tiles steer the temperatures of `topk` and `a`, so the
    method counts as not prefix-safe; `topk` and `a` with pooling="mean" by themselves would be.
    Layers with a sliding window, and prompts within one query tile, are left dense.

    Attributes:
        mask: "topk", "a", "vs" or "vsb". Which keeps most at equal density depends on the layer: vs where little is kept of
            a layer whose attention is hard, topk and vsb elsewhere.
        density: share of a row's tiles (topk, a), of the prompt's tokens (vs) or key tiles (vsb); 1 = all.
        split: share of the budget of vs and vsb that goes to columns.
        pooling: of topk and a: "mean" compares mean queries with mean keys; "bands" fast and slow rotary pairs apart
            (`rope_bands`).
        block_q, block_k: tile sizes in tokens: 32, 64 or 128, block_k at most block_q.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="a fixed share of tiles: pooled top-k (topk, a) or columns and distances of the last queries (vs, vsb)",
    )
    mask: str = "vs"
    density: float = 0.125
    split: float = 0.5
    block_q: int = 128
    block_k: int = 32
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling)
        if self.mask not in MASKS:
            raise InvalidRequest(f"dhsa: mask must be one of {', '.join(MASKS)}, got {self.mask!r:.40}")
        if not 0.0 < self.density <= 1.0:
            raise InvalidRequest(
                f"dhsa: density must be above 0 and at most 1, got {self.density}; 0.125 is the published default"
            )
        if not 0.0 <= self.split <= 1.0:
            raise InvalidRequest(f"dhsa: split must be in 0 to 1, got {self.split}; 0.5 is the published default")
        for name in ("block_q", "block_k"):
            if getattr(self, name) not in (32, 64, 128):
                raise InvalidRequest(f"dhsa: {name} must be 32, 64 or 128, got {getattr(self, name)}")
        if self.block_k > self.block_q:
            raise InvalidRequest(f"dhsa: block_k must be at most block_q={self.block_q}, got {self.block_k}")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head, the tiles of `mask`. See the class.

        Cost: O(Hq nQ nK (D + log nK)) for topk and a; O(Hq block_q M D) for vs; O(Hq nK D block_q / block_k) for vsb.
        """
        n, m = q.shape[2], k.shape[2]
        if m <= self.block_q or layer.window:
            return None
        if self.mask in ("topk", "a"):
            mask = self._pooled(q, k, layer)
        else:
            if n <= self.block_q:
                return None  # the last query tile is all there is
            mask = self._by_tokens(q, k, layer) if self.mask == "vs" else self._by_tiles(q, k, layer)
            mask[:, :, -1] = True
        mask[..., 0] = True
        return TilePlan.from_mask(
            mask, n_rows=n, n_keys=m, block_q=self.block_q, block_k=self.block_k, mean_correction=self.correction
        )

    def _pooled(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """Masks topk and a: [B, Hq, nQ, nK] bool."""
        n, m = q.shape[2], k.shape[2]
        forbidden = forbidden_tiles(n, m, self.block_q, self.block_k, q.device)
        pooled_q, pooled_k = pool_mean(q, self.block_q), self.pooled_keys(k, self.block_k, layer)
        scores = pooled_logits(pooled_q, pooled_k, layer, forbidden, pooling=self.pooling)
        readable = (~forbidden).sum(-1)  # [nQ]
        budget = (readable * self.density).long()
        if self.mask == "topk":
            return keep_top(scores, budget.clamp(min=1))
        forced = sink_and_own_tiles(n, m, self.block_q, self.block_k, q.device)
        return keep_top(scores.masked_fill(forced, torch.inf), torch.maximum(budget, forced.sum(-1)))

    def _by_tokens(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """Mask vs: [B, Hq, nQ, nK] bool."""
        n, m = q.shape[2], k.shape[2]
        tokens = int(self.density * m)
        n_columns = int(tokens * self.split)
        vertical, slash = recent_mass(q[:, :, -self.block_q :], k, layer)
        columns = pool_max(keep_top(vertical, n_columns).float(), self.block_k) > 0  # [B, Hq, nK]
        # a row's tile holds keys at the distances x - Bk + 1 to x + Bq - 1, where x is from its first row to the tile's first key
        crossed = kept_within(keep_top(slash, tokens - n_columns), self.block_k - 1, self.block_q - 1)  # [B, Hq, M]
        first = torch.arange(0, n, self.block_q, device=q.device)[:, None] + (m - n)
        x = first - torch.arange(columns.shape[-1], device=q.device) * self.block_k
        short = (first + self.block_q).clamp(max=m) <= tokens
        return columns.unsqueeze(2) | (crossed[..., x.clamp(min=0)] & (x >= 0)) | short

    def _by_tiles(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """Mask vsb: [B, Hq, nQ, nK] bool."""
        n, m, size = q.shape[2], k.shape[2], self.block_k
        n_k = -(-m // size)
        budget = max(2, int(self.density * n_k))  # a column and the diagonal at least
        n_columns = min(max(1, int(budget * self.split)), budget - 1)
        start = m - self.block_q
        own = torch.arange(start // size, (m - 1) // size + 1, device=q.device)  # key tiles that hold the last rows' own keys
        belongs = torch.arange(start, m, device=q.device) // size == own[:, None]
        rows = torch.matmul(belongs.float(), q[:, :, -self.block_q :].float()).unflatten(1, (k.shape[1], -1))
        keys = self.pooled_keys(k, size, layer)
        keys = keys * torch.clamp(m - torch.arange(0, m, size, device=q.device), max=size)[:, None]  # sums
        scores = torch.matmul(rows, keys.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * layer.scale  # [B, Hq, own, nK]
        tile = torch.arange(n_k, device=q.device)
        vertical = scores.masked_fill(tile > own[:, None], 0.0).sum(2)
        vertical[..., 0] = torch.inf
        at = own[:, None] - tile  # tile of each distance
        slash = scores.gather(-1, at.clamp(min=0).expand(scores.shape)).masked_fill(at < 0, 0.0).sum(2)
        slash[..., 0] = torch.inf
        first = torch.arange(0, n, self.block_q, device=q.device)[:, None] + (m - n)
        span = ((m - n) % size + self.block_q - 1) // size  # own tiles of a whole query tile, less one
        crossed = kept_within(keep_top(slash, budget - n_columns), 0, span)
        back = first // size - tile
        short = ((first + self.block_q).clamp(max=m) - 1) // size < budget
        return keep_top(vertical, n_columns).unsqueeze(2) | (crossed[..., back.clamp(min=0)] & (back >= 0)) | short


def kept_within(keep: Tensor, before: int, after: int) -> Tensor:
    """[..., L] bool: whether keep [..., L] has an entry at x - before to x + after, for each x."""
    below = torch.nn.functional.pad(keep.cumsum(-1, dtype=torch.int32), (1, 0))
    x, size = torch.arange(keep.shape[-1], device=keep.device), keep.shape[-1]
    return below[..., (x + after + 1).clamp(max=size)] > below[..., (x - before).clamp(min=0)]
