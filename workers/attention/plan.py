"""`TilePlan`: what a prefill method decides and the executor runs. It knows tiles and tokens, not scores, models or kernels.

Geometry. N query rows, M >= N keys, right-aligned: row i sits at position p = i + (M - N) and may read key j iff j <= p.
Query tile r holds rows [r Bq, (r+1) Bq), key tile t holds keys [t Bk, (t+1) Bk); the last of each may be shorter. For a
query tile with positions p0..p1 a key tile is

    forbidden   t Bk > p1                 never listed
    full        (t+1) Bk - 1 <= p0        every pair is allowed: no mask needed
    partial     otherwise                 the causal mask cuts through it

A partial tile always touches [p0, p1], so it is one of the tiles that hold the rows' own keys. Those *diagonal tiles* are
in every plan: no row is ever empty.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.errors import InvalidRequest


class HeadClass(enum.IntEnum):
    """What one mask head reads."""

    DENSE = 0  # every causal key
    STREAMING = 1  # keys j < sink and keys j > p - recent, exact to the token
    CSR = 2  # the tiles in its lists


@dataclass(frozen=True, eq=False)
class TileLists:
    """Ragged rows of ids. Row x is `ids[offsets[x]:offsets[x + 1]]`, ascending and without repeats.

    Attributes:
        offsets: [rows + 1] int64.
        ids: [>= offsets[-1]] int32. On an accelerator it may be longer than offsets[-1]: its exact length is known on the
            device only, and asking for it would stall the queue. What lies beyond is meaningless.
    """

    offsets: Tensor
    ids: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, *, compact: bool | None = None) -> TileLists:
        """Columns that are set, row by row.

        Args:
            mask: [..., C] bool, any device; leading axes are flattened into rows.
            compact: cut `ids` to its exact length, which waits for the device; default: only on the CPU.
        """
        flat = mask.reshape(-1, mask.shape[-1])
        offsets = torch.zeros(flat.shape[0] + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(flat.sum(-1, dtype=torch.int64), 0, out=offsets[1:])
        if mask.device.type == "cpu" if compact is None else compact:
            return cls(offsets, flat.nonzero()[:, 1].to(torch.int32))
        columns = torch.arange(flat.shape[1], dtype=torch.int32, device=mask.device).expand_as(flat)
        trash = flat.numel()  # unset entries are all written to one slot past the end
        place = torch.where(flat, flat.cumsum(-1) - 1 + offsets[:-1, None], trash)
        ids = torch.zeros(trash + 1, dtype=torch.int32, device=mask.device)
        ids.scatter_(0, place.reshape(-1), columns.reshape(-1))
        return cls(offsets, ids[:-1])

    @classmethod
    def empty(cls, rows: int, device: torch.device | str = "cpu") -> TileLists:
        """`rows` empty rows."""
        return cls(torch.zeros(rows + 1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int32, device=device))

    def counts(self) -> Tensor:
        """[rows] int64, length of each row."""
        return self.offsets.diff()

    def entries(self) -> tuple[Tensor, Tensor]:
        """(row, id) of every entry, both [n] int64. Waits for the device."""
        rows = torch.repeat_interleave(torch.arange(self.offsets.numel() - 1, device=self.ids.device), self.counts())
        return rows, self.ids[: rows.numel()].long()

    def to_mask(self, columns: int) -> Tensor:
        """[rows, columns] bool. Waits for the device."""
        mask = torch.zeros(self.offsets.numel() - 1, columns, dtype=torch.bool, device=self.ids.device)
        mask[self.entries()] = True
        return mask


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which keys each query row reads. Build it with `from_mask`, `dense` or `streaming`; run it with `attend_plan`.

    Mask heads Hm may be the query heads (one list each), the KV heads (the group shares a list) or 1 (all heads share it).

    Attributes:
        n_rows, n_keys: N and M.
        block_q, block_k: Bq and Bk in tokens.
        head_class: [B, Hm] int8, a `HeadClass` each.
        full, partial: B * Hm * nQ rows in that order, ids are key tiles; rows of DENSE and STREAMING heads are empty.
        sink, recent: [B, Hm] int32 tokens, read for STREAMING heads only; recent >= 1.
        kinds: the classes that occur in head_class, known without waiting for the device.
        token_columns: B * Hm rows of single keys that every row at or after them reads besides its tiles.
        row_intervals: [B, Hm, N, 2] int32, keys [lo, hi) that a row reads besides its tiles.
        permutation: [B, Hkv, M] int64, order in which the keys were laid out before tiling.
        column_bias: [B, Hm, M] float32 added to the logits of a key.
        residual: [B, Hq, N, D] and [B, Hq, N], an estimate (out, lse) of what was left out, merged by log-sum-exp.

    The last five are what a plan may say but no executor of this version runs: it refuses them by name.
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
    row_intervals: Tensor | None = None
    permutation: Tensor | None = None
    column_bias: Tensor | None = None
    residual: tuple[Tensor, Tensor] | None = None

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
    ) -> TilePlan:
        """The plan that reads the tiles set in `mask`.

        Forbidden tiles are dropped and diagonal tiles are added, so any mask gives a valid plan.

        Args:
            mask: [B, Hm, nQ, nK] bool, any device. Ignored for heads that are not CSR.
            head_class: [B, Hm] int8; default: all CSR. Give it on the CPU to avoid waiting for the device.
            sink, recent: [B, Hm] int32 tokens, needed when a head is STREAMING.

        Raises:
            InvalidRequest: sizes that do not fit.
        """
        n_q, n_k = _tile_counts(n_rows, n_keys, block_q, block_k)
        if mask.dim() != 4 or mask.dtype != torch.bool or tuple(mask.shape[2:]) != (n_q, n_k):
            raise InvalidRequest(
                f"plan: mask must be bool [B, Hm, {n_q}, {n_k}] for {n_rows} rows and {n_keys} keys in tiles of "
                f"{block_q}x{block_k}, got {mask.dtype} {list(mask.shape)}"
            )
        kinds, class_ = frozenset({HeadClass.CSR}), None
        if head_class is not None:
            kinds = frozenset(HeadClass(int(c)) for c in head_class.unique())
            class_ = head_class.to(mask.device, torch.int8)
            mask = mask & (class_ == HeadClass.CSR)[:, :, None, None]
        full, partial, diagonal = tile_kinds(n_rows, n_keys, block_q, block_k, mask.device)
        if class_ is not None:
            partial = partial & (class_ == HeadClass.CSR)[:, :, None, None]
            diagonal = diagonal & (class_ == HeadClass.CSR)[:, :, None, None]
        zeros = torch.zeros(mask.shape[:2], dtype=torch.int32, device=mask.device)
        return cls(
            n_rows,
            n_keys,
            block_q,
            block_k,
            class_ if class_ is not None else torch.full_like(zeros, HeadClass.CSR, dtype=torch.int8),
            TileLists.from_mask((mask | diagonal) & full),
            TileLists.from_mask(partial.expand(mask.shape)),
            sink.to(mask.device, torch.int32) if sink is not None else zeros,
            recent.to(mask.device, torch.int32) if recent is not None else zeros + 1,
            kinds,
        )

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
        return cls._uniform(HeadClass.STREAMING, sink, recent, batch, mask_heads, n_rows, n_keys, block_q, block_k, device)

    @classmethod
    def _uniform(
        cls, kind: HeadClass, sink: int, recent: int, batch: int, heads: int, n: int, m: int, bq: int, bk: int,
        device: torch.device | str,
    ) -> TilePlan:  # fmt: skip
        n_q, _ = _tile_counts(n, m, bq, bk)
        none = TileLists.empty(batch * heads * n_q, device)
        shape = (batch, heads)
        return cls(
            n, m, bq, bk,
            torch.full(shape, kind, dtype=torch.int8, device=device),
            none, none,
            torch.full(shape, sink, dtype=torch.int32, device=device),
            torch.full(shape, recent, dtype=torch.int32, device=device),
            frozenset({kind}),
        )  # fmt: skip

    def unrunnable(self) -> list[str]:
        """Names of the fields in use that the executors of this version cannot run."""
        names = ("token_columns", "row_intervals", "permutation", "column_bias", "residual")
        return [name for name in names if getattr(self, name) is not None]

    def tile_mask(self) -> Tensor:
        """[B, Hm, nQ, nK] bool: tiles in the lists, full or partial. Waits for the device."""
        both = self.full.to_mask(self.n_k_tiles) | self.partial.to_mask(self.n_k_tiles)
        return both.view(self.batch, self.mask_heads, self.n_q_tiles, self.n_k_tiles)

    def to_dense_mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """[B, Hm, stop - start, M] bool: the pairs these rows keep (default: all rows). As large as dense attention's logits."""
        stop = self.n_rows if stop is None else stop
        row = torch.arange(start, stop, device=self.device)
        key = torch.arange(self.n_keys, device=self.device)
        position = row[:, None] + (self.n_keys - self.n_rows)
        kept = self.tile_mask()[:, :, row // self.block_q][..., key // self.block_k]
        class_ = self.head_class[:, :, None, None]
        stream = (key < self.sink[:, :, None, None]) | (key > position - self.recent[:, :, None, None])
        kept = torch.where(class_ == HeadClass.STREAMING, stream, kept | (class_ == HeadClass.DENSE))
        return kept & (key <= position)

    def density(self) -> float:
        """Kept (query, key) pairs over causal pairs, exact, mean over mask heads. Waits for the device."""
        n, m = self.n_rows, self.n_keys
        offset = m - n
        causal = n * offset + n * (n + 1) // 2
        budget = torch.where(self.head_class == HeadClass.STREAMING, self.sink.long() + self.recent.long(), m)
        kept = _pairs(torch.tensor(offset), torch.tensor(m - 1), budget.cpu())
        total = int(torch.where(self.head_class.cpu() == HeadClass.CSR, 0, kept).sum())
        for lists in (self.full, self.partial):
            rows, tiles = (x.cpu() for x in lists.entries())
            first = (rows % self.n_q_tiles) * self.block_q
            last = torch.clamp(first + self.block_q, max=n) - 1
            start = tiles * self.block_k
            width = torch.clamp(start + self.block_k, max=m) - start
            total += int(_pairs(first + offset - start, last + offset - start, width).sum())
        return total / (causal * self.batch * self.mask_heads)

    def check(self) -> None:
        """Raise AssertionError unless every invariant of this class holds. Waits for the device; for tests and debugging."""
        n_q, n_k = _tile_counts(self.n_rows, self.n_keys, self.block_q, self.block_k)
        rows = self.batch * self.mask_heads * n_q
        assert self.head_class.dtype == torch.int8, f"head_class is {self.head_class.dtype}"
        assert self.sink.shape == self.recent.shape == self.head_class.shape, "sink, recent and head_class differ in shape"
        assert self.kinds == frozenset(HeadClass(int(c)) for c in self.head_class.unique()), "kinds does not match head_class"
        streaming = self.head_class == HeadClass.STREAMING
        assert bool((self.recent[streaming] >= 1).all()) and bool((self.sink[streaming] >= 0).all()), "sink < 0 or recent < 1"
        full, partial, diagonal = tile_kinds(self.n_rows, self.n_keys, self.block_q, self.block_k, self.device)
        for name, lists, allowed in (("full", self.full, full), ("partial", self.partial, partial)):
            assert lists.offsets.dtype == torch.int64 and lists.ids.dtype == torch.int32, f"{name}: wrong integer types"
            assert lists.offsets.shape == (rows + 1,) and int(lists.offsets[0]) == 0, f"{name}: offsets have the wrong length"
            assert bool((lists.counts() >= 0).all()) and int(lists.offsets[-1]) <= lists.ids.numel(), f"{name}: bad offsets"
            row, tile = lists.entries()
            assert bool(((tile >= 0) & (tile < n_k)).all()), f"{name}: tile id out of range"
            same_row = row[1:] == row[:-1]
            assert bool((tile[1:] > tile[:-1])[same_row].all()), f"{name}: ids not ascending or repeated"
            assert bool(allowed[row % n_q, tile].all()), f"{name}: lists a tile of the other kind or a forbidden one"
            csr = (self.head_class == HeadClass.CSR).reshape(-1).repeat_interleave(n_q)
            assert bool((lists.counts()[~csr] == 0).all()), f"{name}: lists tiles of a head that is not CSR"
        csr_heads = self.tile_mask()[self.head_class == HeadClass.CSR]
        assert bool((csr_heads | ~diagonal).all()), "a row does not keep its diagonal tile"


def tile_kinds(n_rows: int, n_keys: int, block_q: int, block_k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Three masks [nQ, nK] bool: full, partial, and diagonal (holds some row's own key; full or partial)."""
    n_q, n_k = _tile_counts(n_rows, n_keys, block_q, block_k)
    first = torch.arange(n_q, device=device)[:, None] * block_q
    last = torch.clamp(first + block_q, max=n_rows) - 1
    p0, p1 = first + (n_keys - n_rows), last + (n_keys - n_rows)
    start = torch.arange(n_k, device=device) * block_k
    end = start + block_k - 1
    full = end <= p0
    return full, (start <= p1) & ~full, (start <= p1) & (end >= p0)


def _tile_counts(n_rows: int, n_keys: int, block_q: int, block_k: int) -> tuple[int, int]:
    if not 1 <= n_rows <= n_keys:
        raise InvalidRequest(f"plan: needs 1 <= rows <= keys (right-aligned), got {n_rows} rows and {n_keys} keys")
    if block_q < 1 or block_k < 1:
        raise InvalidRequest(f"plan: block_q and block_k must be >= 1, got {block_q} and {block_k}")
    return -(-n_rows // block_q), -(-n_keys // block_k)


def _pairs(first: Tensor, last: Tensor, width: Tensor) -> Tensor:
    """Sum over p in first..last of clamp(p + 1, 0, width), int64: causal pairs of rows at these positions with `width` keys."""

    def upto(p: Tensor) -> Tensor:  # the same sum from p = 0
        ramp = torch.minimum(p + 1, width).clamp(min=0)
        return ramp * (ramp + 1) // 2 + (p + 1 - width).clamp(min=0) * width

    return upto(last) - upto(first - 1)
