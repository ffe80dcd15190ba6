"""Prism: the fast and the slow rotary dimensions of mean queries and keys are scored apart, each at its own temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.rope_bands import HIGH_SHARE, LOW_SHARE, band_logits, bands
from winnow.workers.prefill.scoring import forbidden_tiles, keep_share, pool_mean, sink_and_own_tiles


@prefill_methods.register("prism")
@dataclass(frozen=True)
class Prism(TileListMethod):
    """Per row of tiles, the tiles that hold `threshold` of the mass of either band's pooled softmax.

    The mean over B positions of a rotary pair of angle theta is about sinc(B theta / 2 pi) of its size: fast pairs cancel, slow
    pairs drown what is left of them in one common score. So band z of d_z dimensions is scored alone, at the temperature

        l_z[I, J] = qbar_I . kbar_J over z / (sqrt(d_z) t_z),  t_z = sqrt(d_z / D) RMS_z(qbar) / RMS(qbar) RMS_z(kbar) / RMS(kbar)

    which undoes the loss: what pooling took from a band's size it gives back to its logits.
    Source: "Prism: Spectral-Aware Block-Sparse Attention" (arXiv 2602.08426, ICML 2026) and its published code. Deviations:
    - band sizes are shares of D (the published 64 and 96 dimensions are for D = 128), the same at that size;
    - runs for M > N and any length; the means of a ragged last tile are over its real tokens, where the published code pads
      with zeros;
    - the layer's own scale and soft-capping enter every score; the published code assumes 1 / sqrt(D);
    - K is not repeated for grouped heads.
    The temperatures are taken over the whole prompt, so a plan depends on what follows: not prefix-safe, not chunked.
    Layers with a sliding window, and prompts of up to two tiles, are left dense.

    Attributes:
        threshold: share of each band's mass to keep in each row, above 0; 1 or more keeps everything.
        high_share: share of the rotary pairs, from the fastest on, that make the high band.
        low_share: share of the pairs, from the slowest on, that make the low band; the two may overlap.
        block: tile size of queries and keys: 32, 64 or 128.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="pooled tiles of two rotary bands, a share of each band's mass; temperatures from the whole prompt",
    )
    threshold: float = 0.95
    high_share: float = HIGH_SHARE
    low_share: float = LOW_SHARE
    block: int = 128

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < float("inf"):
            raise InvalidRequest(f"prism: threshold must be above 0, got {self.threshold}; 0.95 is the published default")
        for name in ("high_share", "low_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise InvalidRequest(f"prism: {name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"prism: block must be 32, 64 or 128, got {self.block}")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head and row of tiles: tile column 0, the own tiles, and what either band finds. See the class.

        Cost: one reading of q and k, O(Hq nQ nK (D + log nK)). Mutates nothing.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        if m <= 2 * b or layer.window:
            return None
        mask = sink_and_own_tiles(n, m, b, b, q.device)
        if self.threshold >= 1.0:  # sums round to just above or below 1
            mask = torch.ones_like(mask).expand(*q.shape[:2], -1, -1)
        else:
            forbidden = forbidden_tiles(n, m, b, b, q.device)
            pooled_q, pooled_k = pool_mean(q, b), self.pooled_keys(k, b, layer)
            for band in bands(q.shape[3], self.high_share, self.low_share, q.device):
                logits = band_logits(pooled_q, pooled_k, band, layer).masked_fill(forbidden, -torch.inf)
                mask = mask | keep_share(torch.softmax(logits, -1), self.threshold)
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=b, block_k=b, mean_correction=self.correction)
