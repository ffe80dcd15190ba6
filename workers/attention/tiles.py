"""Tiles and ragged lists of ids: the geometry that plans, executors and kernels share. It knows no heads and no scores.

N query rows, M >= N keys, right-aligned: row i sits at position p = i + (M - N) and may read key j iff j <= p.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.kernels import kernel_module

P = ParamSpec("P")
T = TypeVar("T")
_MOST_KEPT_BYTES = 32 << 20


def by_geometry(make: Callable[P, T]) -> Callable[P, T]:
    """Keep the last four results of a function of sizes and a device: all layers of a chunk ask for the same.

    On an accelerator such small tensors cost the host more time than the device. Large ones are made anew each time, so that
    tiles of one key do not hold maps of a whole prompt. Results are shared: nobody writes to them.
    """
    kept: dict[Any, T] = {}

    @functools.wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, *kwargs.items())
        if key in kept:
            return kept[key]
        with torch.inference_mode(False):  # training reads them too
            found = make(*args, **kwargs)
        if _nbytes(found) <= _MOST_KEPT_BYTES:
            kept[key] = found
            for oldest in list(kept)[:-4]:
                kept.pop(oldest, None)  # another thread may have been here
        return found

    return call


def _nbytes(x: Any) -> int:
    """Of the tensors in a tensor, a tuple or a dataclass."""
    return int(x.nbytes) if isinstance(x, Tensor) else sum(map(_nbytes, x if isinstance(x, tuple) else vars(x).values()))


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
        flat = _rows(mask)
        offsets = _offsets(flat)
        if _compacts(flat, compact):
            return cls(offsets, _kernels().compact_rows(flat, None, offsets))
        columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
        return cls(offsets, _gathered(columns.expand(flat.shape), flat, compact))

    @classmethod
    def from_ids(cls, ids: Tensor, valid: Tensor | None = None, *, compact: bool | None = None) -> TileLists:
        """Rows of equally many candidates, of which some count: keys that a head chose, for every query tile.

        Args:
            ids: [..., K] integer, ascending and without repeats where valid; leading axes are flattened into rows.
            valid: [..., K] bool, what to take; None = all.
            compact: as `from_mask`.
        """
        flat = _rows(ids)
        if valid is None:
            rows, width = flat.shape
            return cls(torch.arange(rows + 1, device=ids.device) * width, flat.reshape(-1).to(torch.int32))
        chosen = valid.reshape(flat.shape)
        offsets = _offsets(chosen)
        if _compacts(flat, compact):
            return cls(offsets, _kernels().compact_rows(chosen, flat, offsets))
        return cls(offsets, _gathered(flat, chosen, compact))

    @classmethod
    def empty(cls, rows: int, device: torch.device | str = "cpu") -> TileLists:
        """`rows` empty rows."""
        return cls(torch.zeros(rows + 1, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int32, device=device))

    @property
    def n_rows(self) -> int:
        return self.offsets.numel() - 1

    def counts(self) -> Tensor:
        """[rows] int64, length of each row."""
        return self.offsets.diff()

    def row_of_ids(self) -> Tensor:
        """[len(ids)] int64: the row each id belongs to; `n_rows` for what lies beyond the last row."""
        place = torch.arange(self.ids.numel(), device=self.ids.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), place, right=True)

    def only(self, keep: Tensor, *, compact: bool | None = None) -> TileLists:
        """The same rows with the ids set in keep [len(ids)] bool. Does not wait for the device unless compact."""
        keep = keep & (torch.arange(keep.numel(), device=keep.device) < self.offsets[-1])
        before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        if _compacts(keep, compact):
            return TileLists(before[self.offsets], _kernels().compact(keep, before, self.ids))
        return TileLists(before[self.offsets], _gathered(self.ids, keep, compact))

    def entries(self) -> tuple[Tensor, Tensor]:
        """(row, id) of every entry, both [n] int64. Waits for the device."""
        rows = torch.repeat_interleave(torch.arange(self.n_rows, device=self.ids.device), self.counts())
        return rows, self.ids[: rows.numel()].long()

    def to_mask(self, columns: int) -> Tensor:
        """[rows, columns] bool. Does not wait for the device: ids beyond the last row go to a row past the end."""
        at = self.row_of_ids() * columns + self.ids.clamp(0, columns - 1)
        mask = torch.zeros((self.n_rows + 1) * columns, dtype=torch.bool, device=self.ids.device)
        return mask.scatter_(0, at, True).view(-1, columns)[:-1]


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n], where n may be 0: reshape cannot tell the rows of nothing."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _offsets(chosen: Tensor) -> Tensor:
    """[rows + 1] int64: how many entries of chosen [rows, C] are set before each row."""
    offsets = torch.zeros(chosen.shape[0] + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(chosen.sum(-1, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def _compacts(x: Tensor, compact: bool | None) -> bool:
    """Whether the kernels do it: on CUDA, unless the exact length is asked for."""
    return x.is_cuda and not compact and kernel_module("tile_lists") is not None


def _kernels() -> ModuleType:
    """Where `_compacts` says so."""
    found = kernel_module("tile_lists")
    assert found is not None
    return found


def partial_lists(n_rows: int, n_keys: int, block_q: int, block_k: int, heads: Tensor) -> TileLists:
    """The partial tiles of every query tile, from the geometry alone: the same for all heads that have lists.

    Args:
        heads: [..., Hm] bool, which heads have lists. Leading axes and Hm are flattened into the rows' outer order.

    Returns:
        heads.numel() * nQ rows. Does not wait for the device.
    """
    ids, valid = partial_tiles(n_rows, n_keys, block_q, block_k, heads.device)
    valid = valid & heads.reshape(-1, 1, 1)
    return TileLists.from_ids(ids.expand(valid.shape), valid)


def partial_tiles(
    n_rows: int, n_keys: int, block_q: int, block_k: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[nQ, most] each: key tiles, int64, from the one that holds key p0 + 1; and whether they begin at p1 or before."""
    p0, p1 = tile_positions(n_rows, n_keys, block_q, block_k, device)
    ids = ((p0 + 1) // block_k)[:, None] + torch.arange((block_q - 2) // block_k + 2, device=device)
    return ids, ids <= (p1 // block_k)[:, None]


def tile_positions(n_rows: int, n_keys: int, block_q: int, block_k: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """[nQ] int64 each: positions p0 and p1 of the first and the last row of every query tile."""
    n_q, _ = tile_counts(n_rows, n_keys, block_q, block_k)
    first = torch.arange(n_q, device=device) * block_q
    past = n_keys - n_rows
    return first + past, torch.clamp(first + block_q, max=n_rows) - 1 + past


def _gathered(ids: Tensor, keep: Tensor, compact: bool | None) -> Tensor:
    """The kept ids in order, int32: cut to their number, or as many slots as there are ids."""
    if ids.device.type == "cpu" if compact is None else compact:
        return ids[keep].to(torch.int32)
    keep, trash = keep.reshape(-1), ids.numel()  # what is not kept is written to one slot past the end
    place = torch.where(keep, keep.cumsum(0) - 1, trash)
    out = torch.zeros(trash + 1, dtype=torch.int32, device=ids.device)
    return out.scatter_(0, place, ids.reshape(-1).to(torch.int32))[:-1]


def tile_counts(n_rows: int, n_keys: int, block_q: int, block_k: int) -> tuple[int, int]:
    """(nQ, nK).

    Raises:
        InvalidRequest: sizes that make no plan.
    """
    if not 1 <= n_rows <= n_keys:
        raise InvalidRequest(f"plan: needs 1 <= rows <= keys (right-aligned), got {n_rows} rows and {n_keys} keys")
    if block_q < 1 or block_k < 1:
        raise InvalidRequest(f"plan: block_q and block_k must be >= 1, got {block_q} and {block_k}")
    return -(-n_rows // block_q), -(-n_keys // block_k)


@by_geometry
def tile_kinds(n_rows: int, n_keys: int, block_q: int, block_k: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Three masks [nQ, nK] bool: full, partial, and diagonal (holds some row's own key; full or partial). Not to be written."""
    _, n_k = tile_counts(n_rows, n_keys, block_q, block_k)
    p0, p1 = (x[:, None] for x in tile_positions(n_rows, n_keys, block_q, block_k, device))
    start = torch.arange(n_k, device=device) * block_k
    end = start + block_k - 1
    full = end <= p0
    return full, (start <= p1) & ~full, (start <= p1) & (end >= p0)


@by_geometry
def partial_pairs(n_rows: int, n_keys: int, block_q: int, block_k: int, device: torch.device | str) -> Tensor:
    """int64: causal pairs in a head's partial tiles. Not to be written."""
    tile, valid = partial_tiles(n_rows, n_keys, block_q, block_k, device)
    start = tile * block_k
    p0, p1 = (x[:, None] - start for x in tile_positions(n_rows, n_keys, block_q, block_k, device))
    return (causal_pairs(p0, p1, torch.clamp(start + block_k, max=n_keys) - start) * valid).sum()


def causal_pairs(first: Tensor, last: Tensor, width: Tensor) -> Tensor:
    """Sum over p in first..last of clamp(p + 1, 0, width), int64: causal pairs of rows at these positions with `width` keys."""

    def upto(p: Tensor) -> Tensor:  # the same sum from p = 0
        ramp = torch.minimum(p + 1, width).clamp(min=0)
        return ramp * (ramp + 1) // 2 + (p + 1 - width).clamp(min=0) * width

    return upto(last) - upto(first - 1)


def keys_in_tiles(keys: TileLists, tiles: Tensor, block_k: int, n_keys: int) -> TileLists:
    """Of each row's keys those that lie in its tiles, each once. Does not wait for the device.

    Args:
        keys: rows of keys, ascending. tiles: [..., nK] bool, as many rows when flattened.

    Raises:
        InvalidRequest: another number of rows.
    """
    flat = tiles.reshape(-1, tiles.shape[-1])
    if keys.n_rows != flat.shape[0]:
        raise InvalidRequest(
            f"plan: token_columns must have a row per mask head and query tile, {flat.shape[0]}, got {keys.n_rows} rows"
        )
    if keys.ids.numel() == 0:
        return keys
    key, row = keys.ids, keys.row_of_ids().clamp(max=flat.shape[0] - 1)
    keep = (key >= 0) & (key < n_keys)
    keep &= flat[row, torch.where(keep, key // block_k, 0)]
    keep[1:] &= (key[1:] != key[:-1]) | (row[1:] != row[:-1])
    return keys.only(keep)


def causal_intervals(intervals: Tensor, n_rows: int, n_keys: int) -> Tensor:
    """[B, Hm, N, 2] int32, (lo, hi) cut to the keys a row may read, and to its own key where that leaves none.

    Raises:
        InvalidRequest: a shape that does not fit.
    """
    if intervals.dim() != 4 or tuple(intervals.shape[2:]) != (n_rows, 2):
        raise InvalidRequest(f"plan: row_intervals must be [B, Hm, {n_rows}, 2], got {list(intervals.shape)}")
    position = torch.arange(n_keys - n_rows, n_keys, device=intervals.device)
    lo = intervals[..., 0].clamp(min=0)
    hi = torch.minimum(intervals[..., 1], position + 1)
    lo = torch.where(lo < hi, lo, position)
    return torch.stack((lo, torch.where(lo == position, position + 1, hi)), -1).to(torch.int32)
