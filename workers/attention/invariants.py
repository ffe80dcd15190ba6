"""What must hold of every `TilePlan`, written out once. Constructors see to it; other plans are checked before a CPU runs them,
and tests check what methods plan. Costs a few passes over the lists; nothing of the size of a mask is made."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import TileLists, tile_counts


def check(plan: TilePlan) -> None:
    """Waits for the device.

    Raises:
        InvalidRequest: an invariant of `TilePlan` does not hold; the message names the field.
    """
    n_q, n_k = tile_counts(plan.n_rows, plan.n_keys, plan.block_q, plan.block_k)
    _check_heads(plan)
    full = _entries(plan, "full", plan.full, n_q, n_k)
    partial = _entries(plan, "partial", plan.partial, n_q, n_k)
    first = torch.arange(n_q, device=plan.device) * plan.block_q + (plan.n_keys - plan.n_rows)  # position of a tile's first row
    last = (first + plan.block_q).clamp(max=plan.n_keys) - 1
    (row, tile), end = full, (full[1] + 1) * plan.block_k - 1
    _require(bool((end <= first[row % n_q]).all()), "full: lists a tile that is partial or forbidden")
    row, tile = partial
    inside = ((tile + 1) * plan.block_k - 1 > first[row % n_q]) & (tile * plan.block_k <= last[row % n_q])
    _require(bool(inside.all()), "partial: lists a tile that is full or forbidden")
    read = torch.cat([row * n_k + tile for row, tile in (full, partial)]).sort().values
    csr = (plan.head_class == HeadClass.CSR).reshape(-1).repeat_interleave(n_q).nonzero().view(-1)
    own = first[csr % n_q] // plan.block_k  # a row's diagonal tiles: from that of the first row's own key on
    while bool((here := own * plan.block_k <= last[csr % n_q]).any()):
        _require(bool(_among(csr[here] * n_k + own[here], read).all()), "full, partial: a row does not keep its diagonal tiles")
        own = own + 1
    if plan.token_columns is not None:
        row, key = _entries(plan, "token_columns", plan.token_columns, n_q, plan.n_keys)
        _require(bool((key <= first[row % n_q]).all()), "token_columns: lists a key that not every row of its tile may read")
        _require(
            not bool(_among(row * n_k + key // plan.block_k, read).any()), "token_columns: lists a key of a tile that is read"
        )
    _check_intervals(plan)
    _check_residual(plan)


def _check_heads(plan: TilePlan) -> None:
    _require(plan.head_class.dtype == torch.int8, f"head_class: must be int8, got {plan.head_class.dtype}")
    _require(
        plan.head_class.dim() == 2 and plan.sink.shape == plan.recent.shape == plan.head_class.shape,
        "head_class, sink, recent: must be [B, Hm] alike",
    )
    known = {*HeadClass}
    found = set(plan.head_class.unique().tolist())
    _require(found <= known and plan.kinds == found, f"kinds: must be the classes of head_class, {sorted(found)}")
    streaming = plan.head_class == HeadClass.STREAMING
    _require(
        bool((plan.recent[streaming] >= 1).all()) and bool((plan.sink[streaming] >= 0).all()),
        "sink, recent: a STREAMING head needs sink >= 0 and recent >= 1",
    )


def _entries(plan: TilePlan, name: str, lists: TileLists, n_q: int, n_ids: int) -> tuple[Tensor, Tensor]:
    """(row, id) of every entry, [n] int64 each, of lists that are well made."""
    rows = plan.batch * plan.mask_heads * n_q
    offsets, ids = lists.offsets, lists.ids
    _require(offsets.dtype == torch.int64 and ids.dtype == torch.int32, f"{name}: offsets must be int64 and ids int32")
    _require(offsets.shape == (rows + 1,) and int(offsets[0]) == 0, f"{name}: offsets must be {rows + 1} numbers from 0 on")
    counts = lists.counts()
    _require(bool((counts >= 0).all()) and int(offsets[-1]) <= ids.numel(), f"{name}: offsets fall, or go beyond the ids")
    row, id_ = lists.entries()
    _require(bool(((id_ >= 0) & (id_ < n_ids)).all()), f"{name}: ids must be 0 to {n_ids - 1}")
    _require(bool((id_[1:] > id_[:-1])[row[1:] == row[:-1]].all()), f"{name}: ids of a row must ascend without repeats")
    csr = (plan.head_class == HeadClass.CSR).reshape(-1).repeat_interleave(n_q)
    _require(bool((counts[~csr] == 0).all()), f"{name}: lists something for a head that is not CSR")
    return row, id_


def _check_intervals(plan: TilePlan) -> None:
    own = plan.head_class == HeadClass.INTERVAL
    if plan.row_intervals is None:
        _require(not bool(own.any()), "row_intervals: missing for an INTERVAL head")
        return
    shape = (*plan.head_class.shape, plan.n_rows, 2)
    _require(
        plan.row_intervals.shape == shape and plan.row_intervals.dtype == torch.int32,
        f"row_intervals: must be int32 {list(shape)}, got {plan.row_intervals.dtype} {list(plan.row_intervals.shape)}",
    )
    lo, hi = plan.row_intervals[own].unbind(-1)
    end = torch.arange(plan.n_keys - plan.n_rows, plan.n_keys, device=plan.device) + 1
    _require(
        bool(((lo >= 0) & (lo < hi) & (hi <= end)).all()), "row_intervals: one is empty, or reads a key that causality forbids"
    )


def _check_residual(plan: TilePlan) -> None:
    if not isinstance(plan.residual, tuple):
        _require(plan.residual is None or callable(plan.residual), "residual: must be (out, lse) or a ResidualEstimator")
        return
    _require(len(plan.residual) == 2, "residual: must be (out, lse)")
    out, lse = plan.residual
    _require(out.shape[:3] == lse.shape and out.shape[2] == plan.n_rows, "residual: out and lse do not fit the rows")
    _require(not bool(lse.isnan().any()) and not bool((lse == float("inf")).any()), "residual: lse is not a number or +inf")


def _among(wanted: Tensor, ascending: Tensor) -> Tensor:
    """[n] bool: which of wanted [n] occur in `ascending`."""
    if not ascending.numel():
        return torch.zeros_like(wanted, dtype=torch.bool)
    return ascending[torch.searchsorted(ascending, wanted).clamp(max=ascending.numel() - 1)] == wanted


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidRequest(f"plan: {what}; build it with TilePlan.from_mask or another constructor")
