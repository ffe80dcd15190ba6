"""What must hold of every `TilePlan`: written out once, called by tests after a method has planned."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import TileLists, tile_counts, tile_kinds


def check(plan: TilePlan) -> None:
    """Raise AssertionError unless every invariant of `TilePlan` holds. Waits for the device."""
    n_q, n_k = tile_counts(plan.n_rows, plan.n_keys, plan.block_q, plan.block_k)
    rows = plan.batch * plan.mask_heads * n_q
    assert plan.head_class.dtype == torch.int8, f"head_class is {plan.head_class.dtype}"
    assert plan.sink.shape == plan.recent.shape == plan.head_class.shape, "sink, recent and head_class differ in shape"
    assert plan.kinds == frozenset(HeadClass(int(c)) for c in plan.head_class.unique()), "kinds does not match head_class"
    streaming = plan.head_class == HeadClass.STREAMING
    assert bool((plan.recent[streaming] >= 1).all()) and bool((plan.sink[streaming] >= 0).all()), "sink < 0 or recent < 1"
    full, partial, diagonal = tile_kinds(plan.n_rows, plan.n_keys, plan.block_q, plan.block_k, plan.device)
    csr = (plan.head_class == HeadClass.CSR).reshape(-1).repeat_interleave(n_q)
    listed: list[tuple[str, TileLists, int, Tensor]] = [
        ("full", plan.full, plan.block_k, full),
        ("partial", plan.partial, plan.block_k, partial),
    ]
    if plan.token_columns is not None:
        listed.append(("token_columns", plan.token_columns, 1, full))
    for name, lists, unit, allowed in listed:
        assert lists.offsets.dtype == torch.int64 and lists.ids.dtype == torch.int32, f"{name}: wrong integer types"
        assert lists.offsets.shape == (rows + 1,) and int(lists.offsets[0]) == 0, f"{name}: offsets have the wrong length"
        assert bool((lists.counts() >= 0).all()) and int(lists.offsets[-1]) <= lists.ids.numel(), f"{name}: bad offsets"
        row, id_ = lists.entries()
        assert bool(((id_ >= 0) & (id_ * unit < plan.n_keys)).all()), f"{name}: id out of range"
        same_row = row[1:] == row[:-1]
        assert bool((id_[1:] > id_[:-1])[same_row].all()), f"{name}: ids not ascending or repeated"
        tile = id_ * unit // plan.block_k
        assert bool(allowed[row % n_q, tile].all()), f"{name}: lists a tile of the other kind or a forbidden one"
        assert bool((lists.counts()[~csr] == 0).all()), f"{name}: lists tiles of a head that is not CSR"
        if lists is plan.token_columns:
            read = plan.tile_mask().view(rows, n_k)[row, tile]
            assert not bool(read.any()), f"{name}: lists a key of a tile that is read anyway"
    csr_heads = plan.tile_mask()[plan.head_class == HeadClass.CSR]
    assert bool((csr_heads | ~diagonal).all()), "a row does not keep its diagonal tile"
    own_intervals = plan.head_class == HeadClass.INTERVAL
    assert plan.row_intervals is not None or not bool(own_intervals.any()), "row_intervals: missing for an INTERVAL head"
    if plan.row_intervals is not None:
        assert plan.row_intervals.shape == (*plan.head_class.shape, plan.n_rows, 2), "row_intervals: wrong shape"
        assert plan.row_intervals.dtype == torch.int32, "row_intervals: wrong integer type"
        lo, hi = plan.row_intervals[own_intervals].unbind(-1)
        end = torch.arange(plan.n_keys - plan.n_rows, plan.n_keys, device=plan.device) + 1
        assert bool(((lo >= 0) & (lo < hi) & (hi <= end)).all()), "row_intervals: empty, or reads a key that causality forbids"
    if isinstance(plan.residual, tuple):
        out, lse = plan.residual
        assert out.shape[:3] == lse.shape and out.shape[2] == plan.n_rows, "residual: out and lse do not fit the rows"
        assert not bool(lse.isnan().any()) and not bool((lse == float("inf")).any()), "residual: lse is not a number or +inf"
