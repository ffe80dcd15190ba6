"""`TilePlan`: what a prefill method decides and the executor runs. It knows tiles and tokens, not scores, models or kernels.

Geometry. N query rows, M >= N keys, right-aligned: row i sits at position p = i + (M - N) and may read key j iff j <= p.
Query tile r holds rows [r Bq, (r+1) Bq), key tile t holds keys [t Bk, (t+1) Bk); the last of each may be shorter. For a
query tile with positions p0..p1 a key tile is

    forbidden   t Bk > p1                 never listed
    full        (t+1) Bk - 1 <= p0        every pair is allowed: no mask needed
    partial     otherwise                 the causal mask cuts through it

A partial tile always touches [p0, p1], so it is one of the tiles that hold the rows' own keys. Those *diagonal tiles* are
in every plan: no row is ever empty. A key that no listed tile holds lies before those tiles or after p1; so a single key that
is read besides the tiles (a *token column*) is visible to every row of its query tile, and needs no mask either.

A plan says which keys are read where they lie, and with the layer's own logits. What a method computes otherwise (keys sorted
into buckets, sampled keys weighted for those they stand for) is its residual: an estimate merged by log-sum-exp.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.tiles import (
    TileLists,
    by_geometry,
    causal_intervals,
    causal_pairs,
    keys_in_tiles,
    partial_lists,
    partial_pairs,
    tile_counts,
    tile_kinds,
)

__all__ = ["HeadClass", "ResidualEstimator", "TileLists", "TilePlan", "tile_kinds"]


class HeadClass(enum.IntEnum):
    """What one mask head reads."""

    DENSE = 0  # every causal key
    STREAMING = 1  # keys j < sink and keys j > p - recent, exact to the token
    CSR = 2  # the tiles in its lists, and its token columns
    INTERVAL = 3  # keys lo <= j < hi of each row, exact to the token


class ResidualEstimator(Protocol):
    """Estimates what a plan leaves out, from values that the method which planned has not seen."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        """From the executor's own arguments: out [B, Hq, N, D] and lse [B, Hq, N], float32; lse -inf = nothing for this row.

        A row may depend on keys and values up to its own position only.
        """
        ...


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which keys each query row reads. Build it with `from_mask` or one of the other constructors; run it with `attend_plan`.

    Mask heads Hm may be the query heads (one list each), the KV heads (the group shares a list) or 1 (all heads share it).

    Attributes:
        n_rows, n_keys: N and M.
        block_q, block_k: Bq and Bk in tokens.
        head_class: [B, Hm] int8, a `HeadClass` each.
        full, partial: B * Hm * nQ rows in that order, ids are key tiles; rows of heads that are not CSR are empty.
        sink, recent: [B, Hm] int32 tokens, read for STREAMING heads only; recent >= 1.
        kinds: the classes that occur in head_class, known without waiting for the device.
        token_columns: B * Hm * nQ rows like `full`, ids are single keys that every row of the query tile reads besides its
            tiles; none lies in a listed tile or at or after the tiles on the diagonal. CSR heads only. None = no columns.
        row_intervals: [B, Hm, N, 2] int32, (lo, hi) of each row, 0 <= lo < hi <= p + 1; read for INTERVAL heads only.
        mean_correction: every full tile that a CSR head leaves out joins its rows' softmax as one pseudo-key, the mean of its
            keys and of its values, weighted with the number of its keys that are not token columns.
        is_made: a constructor of this class made it, so that all this holds and nobody needs to look.
        residual: an estimate of what was left out, merged by log-sum-exp: (out [B, Hq, N, D], lse [B, Hq, N]), lse -inf where
            there is none, or a `ResidualEstimator` where values are needed for it.

    Density, recall and `to_dense_mask` are about the keys that are read; mean_correction and residual add estimates to those.
    """

    n_rows: int
    n_keys: int
    block_q: int
    block_k: int
    head_class: Tensor
    full: TileLists
    partial: TileLists
    sink: Tensor
    recent: Tensor
    kinds: frozenset[HeadClass] = field(default_factory=lambda: frozenset({HeadClass.CSR}))
    token_columns: TileLists | None = None
    mean_correction: bool = False
    residual: tuple[Tensor, Tensor] | ResidualEstimator | None = None
    row_intervals: Tensor | None = None
    is_made: bool = field(default=False, init=False, repr=False)

    @property
    def batch(self) -> int:
        return int(self.head_class.shape[0])

    @property
    def mask_heads(self) -> int:
        return int(self.head_class.shape[1])

    @property
    def n_q_tiles(self) -> int:
        return -(-self.n_rows // self.block_q)

    @property
    def n_k_tiles(self) -> int:
        return -(-self.n_keys // self.block_k)

    @property
    def is_estimating(self) -> bool:
        """Whether rows get an estimate of what they do not read: their output is not attention over the kept keys alone."""
        return self.mean_correction or self.residual is not None

    @property
    def device(self) -> torch.device:
        return self.head_class.device

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        n_rows: int,
        n_keys: int,
        block_q: int,
        block_k: int,
        head_class: Tensor | None = None,
        sink: Tensor | None = None,
        recent: Tensor | None = None,
        token_columns: TileLists | None = None,
        mean_correction: bool = False,
        residual: tuple[Tensor, Tensor] | ResidualEstimator | None = None,
        row_intervals: Tensor | None = None,
    ) -> TilePlan:
        """The plan that reads the tiles set in `mask`.

        Forbidden tiles are dropped and diagonal tiles are added, so any mask gives a valid plan.

        Args:
            mask: [B, Hm, nQ, nK] bool, any device. Ignored for heads that are not CSR.
            head_class: [B, Hm] int8; default: all CSR. Give it on the CPU to avoid waiting for the device.
            sink, recent: [B, Hm] integer tokens, needed when a head is STREAMING; at least 0 and 1 count.
            token_columns: B * Hm * nQ rows of keys, ascending. Those in kept tiles, after the query tile, of heads that are not
                CSR, repeated or outside 0..M-1 are dropped. `TileLists.from_ids` makes them.
            mean_correction, residual: see the class.
            row_intervals: [B, Hm, N, 2] integer, needed when a head is INTERVAL; see `intervals`.

        Raises:
            InvalidRequest: sizes that do not fit, a class that is none of `HeadClass`, or what a class needs is missing.
        """
        n_q, n_k = tile_counts(n_rows, n_keys, block_q, block_k)
        if mask.dim() != 4 or mask.dtype != torch.bool or tuple(mask.shape[2:]) != (n_q, n_k):
            raise InvalidRequest(
                f"plan: mask must be bool [B, Hm, {n_q}, {n_k}] for {n_rows} rows and {n_keys} keys in tiles of "
                f"{block_q}x{block_k}, got {mask.dtype} {list(mask.shape)}"
            )
        full, _, diagonal = tile_kinds(n_rows, n_keys, block_q, block_k, mask.device)
        wanted = mask | diagonal
        heads = _csr_heads(*mask.shape[:2], n_rows, n_keys, block_q, block_k, mask.device)
        for name, given in (("head_class", head_class), ("sink", sink), ("recent", recent)):
            if given is not None and given.shape != mask.shape[:2]:
                raise InvalidRequest(f"plan: {name} must be [B, Hm] = {list(mask.shape[:2])}, got {list(given.shape)}")
        if row_intervals is not None and row_intervals.shape[:2] != mask.shape[:2]:
            raise InvalidRequest(f"plan: row_intervals must begin with {list(mask.shape[:2])}, got {list(row_intervals.shape)}")
        kinds, class_, partial = frozenset({HeadClass.CSR}), heads.head_class, heads.partial
        if head_class is not None:
            streams = sink is not None and recent is not None
            kinds = _kinds(head_class, can_stream=streams, has_intervals=row_intervals is not None)
            class_ = head_class.to(mask.device, torch.int8)
            is_csr = class_ == HeadClass.CSR
            full = full & is_csr[:, :, None, None]
            partial = partial_lists(n_rows, n_keys, block_q, block_k, is_csr)
        if token_columns is not None:
            token_columns = keys_in_tiles(token_columns, ~wanted & full, block_k, n_keys)
        if row_intervals is not None:
            row_intervals = causal_intervals(row_intervals.to(mask.device), n_rows, n_keys)
        return cls._made(
            n_rows,
            n_keys,
            block_q,
            block_k,
            class_,
            TileLists.from_mask(wanted & full),
            partial,
            sink.clamp(0, n_keys).to(mask.device, torch.int32) if sink is not None else heads.sink,
            recent.clamp(1, n_keys).to(mask.device, torch.int32) if recent is not None else heads.recent,
            kinds,
            token_columns,
            mean_correction,
            residual,
            row_intervals,
        )

    @classmethod
    def _made(cls, *values: Any, **others: Any) -> TilePlan:
        plan = cls(*values, **others)
        object.__setattr__(plan, "is_made", True)
        return plan

    @classmethod
    def dense(
        cls, *, batch: int, mask_heads: int, n_rows: int, n_keys: int, block_q: int = 128, block_k: int = 128,
        device: torch.device | str = "cpu",
    ) -> TilePlan:  # fmt: skip
        """Every head reads every causal key. Mostly for tests: methods say dense by returning None."""
        return cls._uniform(HeadClass.DENSE, 0, 1, batch, mask_heads, n_rows, n_keys, block_q, block_k, device)

    @classmethod
    def streaming(
        cls, *, batch: int, mask_heads: int, n_rows: int, n_keys: int, sink: int, recent: int, block_q: int = 128,
        block_k: int = 128, device: torch.device | str = "cpu",
    ) -> TilePlan:  # fmt: skip
        """Every head reads the first `sink` keys and its `recent` last ones (its own included), exact to the token.

        Raises:
            InvalidRequest: sink < 0 or recent < 1.
        """
        if sink < 0 or recent < 1:
            raise InvalidRequest(f"plan: streaming needs sink >= 0 and recent >= 1 tokens, got {sink} and {recent}")
        sink, recent = min(sink, n_keys), min(recent, n_keys)
        return cls._uniform(HeadClass.STREAMING, sink, recent, batch, mask_heads, n_rows, n_keys, block_q, block_k, device)

    @classmethod
    def intervals(cls, intervals: Tensor, *, n_keys: int, block_q: int = 128, block_k: int = 128) -> TilePlan:
        """Every row reads the keys of its own interval up to its own position, exact to the token.

        Args:
            intervals: [B, Hm, N, 2] integer, (lo, hi): row i reads lo <= j < hi, j <= p. A row for which that is empty reads its
                own key. Fast where the intervals of neighbouring rows overlap.
            block_q, block_k: tiles in which it is run.

        Raises:
            InvalidRequest: not [B, Hm, N, 2], or fewer keys than rows.
        """
        if intervals.dim() != 4:
            raise InvalidRequest(f"plan: row_intervals must be [B, Hm, N, 2], got {list(intervals.shape)}")
        batch, heads, n = intervals.shape[:3]
        return cls._uniform(
            HeadClass.INTERVAL, 0, 1, batch, heads, n, n_keys, block_q, block_k, intervals.device,
            row_intervals=causal_intervals(intervals, n, n_keys),
        )  # fmt: skip

    @classmethod
    def _uniform(
        cls, kind: HeadClass, sink: int, recent: int, batch: int, heads: int, n: int, m: int, bq: int, bk: int,
        device: torch.device | str, row_intervals: Tensor | None = None,
    ) -> TilePlan:  # fmt: skip
        n_q, _ = tile_counts(n, m, bq, bk)
        none = TileLists.empty(batch * heads * n_q, device)
        shape = (batch, heads)
        return cls._made(
            n, m, bq, bk,
            torch.full(shape, kind, dtype=torch.int8, device=device),
            none, none,
            torch.full(shape, sink, dtype=torch.int32, device=device),
            torch.full(shape, recent, dtype=torch.int32, device=device),
            frozenset({kind}),
            row_intervals=row_intervals,
        )  # fmt: skip

    def tile_mask(self, first: int = 0, end: int | None = None) -> Tensor:
        """[B, Hm, end - first, nK] bool: listed tiles of these query tiles (default: all). Waits for the device."""
        end = self.n_q_tiles if end is None else end
        return self._listed(self.full, self.n_k_tiles, first, end) | self._listed(self.partial, self.n_k_tiles, first, end)

    def _listed(self, lists: TileLists, columns: int, first: int, end: int) -> Tensor:
        """[B, Hm, end - first, columns] bool: ids of these query tiles."""
        row, id_ = lists.entries()
        head, q_tile = row // self.n_q_tiles, row % self.n_q_tiles
        here = (q_tile >= first) & (q_tile < end)
        mask = torch.zeros(self.batch * self.mask_heads, end - first, columns, dtype=torch.bool, device=self.device)
        mask[head[here], q_tile[here] - first, id_[here]] = True
        return mask.view(self.batch, self.mask_heads, end - first, columns)

    def to_dense_mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[B, Hm, stop - start, M] bool: the pairs these rows keep (default: all rows). As large as dense attention's logits."""
        stop = self.n_rows if stop is None else stop
        first, end = start // self.block_q, -(-stop // self.block_q)
        row = torch.arange(start, stop, device=self.device)
        key = torch.arange(self.n_keys, device=self.device)
        position = row[:, None] + (self.n_keys - self.n_rows)
        tile = row // self.block_q - first
        kept = self.tile_mask(first, end)[:, :, tile][..., key // self.block_k]
        if self.token_columns is not None:
            kept = kept | self._listed(self.token_columns, self.n_keys, first, end)[:, :, tile]
        class_ = self.head_class[:, :, None, None]
        stream = (key < self.sink[:, :, None, None]) | (key > position - self.recent[:, :, None, None])
        kept = torch.where(class_ == HeadClass.STREAMING, stream, kept | (class_ == HeadClass.DENSE))
        if self.row_intervals is not None:
            lo, hi = self.row_intervals[:, :, start:stop].unsqueeze(-2).unbind(-1)
            kept = torch.where(class_ == HeadClass.INTERVAL, (key >= lo) & (key < hi), kept)
        return kept & (key <= position)

    @functools.cached_property
    def kept_pairs(self) -> Tensor:
        """[B, Hm] int64: (query, key) pairs that each mask head reads, exact. Does not wait for the device."""
        n, m, device = self.n_rows, self.n_keys, self.device
        offset, heads = m - n, self.batch * self.mask_heads
        height = torch.full((self.n_q_tiles,), self.block_q, device=device)
        height[-1] -= -n % self.block_q
        # a full tile is whole, and read by all rows of its query tile: their numbers are enough
        total = (self.full.counts().view(heads, -1) * height).sum(-1) * self.block_k
        if self.token_columns is not None:
            total = total + (self.token_columns.counts().view(heads, -1) * height).sum(-1)
        total = total.view(self.batch, self.mask_heads)
        if HeadClass.CSR in self.kinds:
            partial = partial_pairs(n, m, self.block_q, self.block_k, device)
            total = total + (partial if len(self.kinds) == 1 else partial * (self.head_class == HeadClass.CSR))
        if self.kinds & {HeadClass.DENSE, HeadClass.STREAMING}:
            budget = torch.where(self.head_class == HeadClass.STREAMING, self.sink.long() + self.recent.long(), m)
            ends = torch.arange(2, device=device) * (n - 1) + offset
            listed = (self.head_class != HeadClass.DENSE) & (self.head_class != HeadClass.STREAMING)
            total = total + causal_pairs(ends[0], ends[1], budget).masked_fill(listed, 0)
        if self.row_intervals is not None:
            lengths = self.row_intervals.long().diff(dim=-1).sum((-1, -2))
            total = total + lengths.masked_fill(self.head_class != HeadClass.INTERVAL, 0)
        return total

    @property
    def n_causal_pairs(self) -> int:
        """Pairs that a head without a plan would read."""
        return self.n_rows * (self.n_keys - self.n_rows) + self.n_rows * (self.n_rows + 1) // 2

    def density(self) -> float:
        """Kept (query, key) pairs over causal pairs, exact, mean over mask heads. Waits for the device, once."""
        return int(self.kept_pairs.sum()) / (self.n_causal_pairs * self.batch * self.mask_heads)

    def check(self) -> None:
        """Raise InvalidRequest unless every invariant of this class holds. Waits for the device."""
        from winnow.workers.attention import invariants  # which needs this module

        invariants.check(self)


def _kinds(head_class: Tensor, *, can_stream: bool, has_intervals: bool) -> frozenset[HeadClass]:
    """The classes that occur in head_class [B, Hm]. Waits for its device."""
    found = set(head_class.unique().tolist())
    if unknown := found - {*HeadClass}:
        raise InvalidRequest(f"plan: head_class must hold values of HeadClass, 0 to {max(HeadClass)}, got {sorted(unknown)}")
    if HeadClass.STREAMING in found and not can_stream:
        raise InvalidRequest("plan: a STREAMING head needs sink and recent")
    if HeadClass.INTERVAL in found and not has_intervals:
        raise InvalidRequest("plan: an INTERVAL head needs row_intervals")
    return frozenset(map(HeadClass, found))


@dataclass(frozen=True, eq=False)
class _CSRHeads:
    """What plans of one geometry have in common where all heads read lists. Shared between plans: not to be written."""

    head_class: Tensor
    partial: TileLists
    sink: Tensor
    recent: Tensor


@by_geometry
def _csr_heads(
    batch: int, heads: int, n_rows: int, n_keys: int, block_q: int, block_k: int, device: torch.device
) -> _CSRHeads:  # fmt: skip
    is_csr = torch.ones(batch, heads, dtype=torch.bool, device=device)
    none = torch.zeros(batch, heads, dtype=torch.int32, device=device)
    return _CSRHeads(
        torch.full_like(none, HeadClass.CSR, dtype=torch.int8),
        partial_lists(n_rows, n_keys, block_q, block_k, is_csr),
        none,
        torch.ones_like(none),
    )
