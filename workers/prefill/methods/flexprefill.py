"""FlexPrefill: each head's pattern and budget are read off the attention of the last queries."""

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
from winnow.workers.prefill.scoring import forbidden_tiles, pool_mean, pool_sum, recent_mass

_EPS = 1e-12


@prefill_methods.register("flexprefill")
@dataclass(frozen=True)
class FlexPrefill(TileListMethod):
    """Vertical-slash or query-aware tiles per head, with a budget that covers `gamma` of the attention mass.

    Source: "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference"
    (arXiv 2502.20766, ICLR 2025), algorithms 1 to 4 and the published code's constants. Deviations:
    - runs for M > N and any length: offsets are token distances from the row's own key, so tile diagonals stay aligned on
      a ragged tail; the published code needs M = N and pads;
    - the layer's own scale and soft-capping enter every score; the published code assumes 1 / sqrt(D);
    - the Jensen-Shannon test is clamped away from log 0, which gave NaN and silently chose vertical-slash;
    - the means of a ragged last tile are over its real tokens, for queries and keys both;
    - token budgets are counted in tiles of `block`; the published code divides by 128 whatever its block size is;
    - index building is vectorised over heads and stays on the device.
    Layers with a sliding window, and prompts too short to save anything, are left dense.

    Attributes:
        gamma: attention mass to cover, 0 < gamma; 1 or more covers everything.
        tau: a head is query-aware when the square root of its Jensen-Shannon divergence is below it; 0 = never.
        min_budget: fewest tokens of columns, and of diagonals, each head gets.
        max_budget: most of them; 0 = no limit.
        block: tile size of queries and keys: 32, 64 or 128.
        pooling: "mean" compares mean queries with mean keys; "bands" fast and slow rotary pairs apart (`rope_bands`).
        adjacent_diagonals: a band of token offsets inside one tile crosses two tile diagonals; also keep the second.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="per-head vertical-slash or query-aware tiles, steered by the last block of queries",
    )
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int = 0
    block: int = 128
    pooling: str = "mean"
    adjacent_diagonals: bool = False

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling)
        if not 0.0 < self.gamma < float("inf"):
            raise InvalidRequest(f"flexprefill: gamma must be above 0, got {self.gamma}; 0.9 is the published default")
        if not 0.0 <= self.tau < float("inf"):
            raise InvalidRequest(f"flexprefill: tau must be 0 or more, got {self.tau}; 0.1 is the published default")
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"flexprefill: block must be 32, 64 or 128, got {self.block}")
        if self.min_budget < 1 or self.max_budget < 0 or 0 < self.max_budget < self.min_budget:
            raise InvalidRequest(
                f"flexprefill: needs 1 <= min_budget <= max_budget (0 = no limit), got {self.min_budget} and {self.max_budget}"
            )

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head: top tile columns and tile diagonals, or tiles of the pooled map. See the class.

        Cost: O(Hq block M D) for the probe, O(Hq M log M) for the budgets, O(Hq nQ nK (D + log)) for the pooled map.
        Holds at most about 1 GiB of probe scores at once. Mutates nothing.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        shortest = -(-self.min_budget // b)
        if m <= max(2 * b, shortest * b) or layer.window:
            return None
        n_q, n_k = -(-n // b), -(-m // b)
        vertical, slash = recent_mass(q[:, :, -min(b, n) :], k, layer)
        most = min(n_k, -(-self.max_budget // b)) if self.max_budget else n_k
        columns_budget, diagonals_budget = (self._budget(x).clamp(shortest, most) for x in (vertical, slash))
        column_mass, diagonal_mass = pool_sum(vertical, b), pool_sum(slash, b)
        pooled_k = self.pooled_keys(k, b, layer)
        aware = None
        if self.tau > 0:
            mean_query = q[:, :, -min(b, n) :].float().mean(2, keepdim=True)
            guess = torch.softmax(pooled_logits(mean_query, pooled_k, layer, pooling=self.pooling), -1).squeeze(2)
            aware = _js_distance(guess, column_mass) < self.tau  # [B, Hq]
            columns_budget, diagonals_budget = (torch.where(aware, shortest, x) for x in (columns_budget, diagonals_budget))
        keep_column = _top(column_mass, columns_budget)  # [B, Hq, nK]
        keep_diagonal = _top(diagonal_mass, diagonals_budget)
        if self.adjacent_diagonals:
            keep_diagonal[..., 1:] |= keep_diagonal[..., :-1].clone()
        mask = keep_column[:, :, None, :] | _on_diagonals(keep_diagonal, n, m, b)
        if aware is not None:
            mask |= self._pooled_map(q, pooled_k, layer, n, m) & aware[:, :, None, None]
        return TilePlan.from_mask(
            mask.expand(-1, -1, n_q, -1), n_rows=n, n_keys=m, block_q=b, block_k=b, mean_correction=self.correction
        )

    def _budget(self, mass: Tensor) -> Tensor:
        """[B, Hq] int64: tiles that hold gamma of mass [B, Hq, M] when its largest tokens are taken first."""
        if self.gamma >= 1.0:  # sums round to just above or below 1
            count = torch.full(mass.shape[:2], mass.shape[2], device=mass.device)
        else:
            count = (mass.sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1) + 1
        return count // self.block + 1

    def _pooled_map(self, q: Tensor, pooled_k: Tensor, layer: LayerSpec, n: int, m: int) -> Tensor:
        """[B, Hq, nQ, nK] bool: largest entries of the pooled attention map until they sum to gamma per query tile on average."""
        b = self.block
        forbidden = forbidden_tiles(n, m, b, b, q.device)
        scores = pooled_logits(pool_mean(q, b), pooled_k, layer, forbidden, pooling=self.pooling)
        flat = torch.softmax(scores, -1).flatten(2)
        ordered, order = flat.sort(dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1)
        limit = self.gamma * scores.shape[2] if self.gamma < 1.0 else torch.inf  # sums round to just above or below 1
        taken = reached - ordered < limit
        return torch.zeros_like(taken).scatter_(-1, order, taken).view_as(scores)


def _js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence over the last axis, natural log, 0 to 0.833; zeros are allowed."""
    p, q = (x.clamp(min=_EPS) for x in (p, q))
    middle = (p + q) / 2
    divergence = (p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2
    return divergence.clamp(min=0).sqrt()


def _top(mass: Tensor, budget: Tensor) -> Tensor:
    """[B, Hq, n] bool: entry 0, always, and the largest others up to `budget` [B, Hq] in all; ties go to the lower index."""
    forced = mass.clone()
    forced[..., 0] = torch.inf
    order = forced.sort(dim=-1, descending=True, stable=True).indices
    wanted = torch.arange(mass.shape[-1], device=mass.device) < budget.unsqueeze(-1)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)


def _on_diagonals(keep: Tensor, n: int, m: int, b: int) -> Tensor:
    """[B, Hq, nQ, nK] bool: tiles that hold the key s b tokens before some row's own, for the s set in keep [B, Hq, nK]."""
    n_k = keep.shape[-1]
    first = torch.arange(0, n, b, device=keep.device) + (m - n)
    tile = torch.arange(n_k, device=keep.device)
    found = torch.zeros(1, dtype=torch.bool, device=keep.device)
    for own in (first // b, torch.clamp(first + b - 1, max=m - 1) // b):  # equal unless M - N is no multiple of b
        distance = own[:, None] - tile
        found = found | (keep[..., distance.clamp(min=0)] & (distance >= 0))
    return found
