"""A plan of mixed head classes as tile lists only: the one form a kernel has to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import TileLists, tile_kinds


@dataclass(frozen=True, eq=False)
class Lowered:
    """Every head as lists. A pair in a partial tile is read iff j <= p, (j < sink or j > p - recent) and lo <= j < hi.

    Attributes:
        full, partial: B * Hm * nQ rows of key tiles.
        sink, recent: [B, Hm] int32; heads that are not STREAMING have sink = M, which lets everything pass. None where none is.
        intervals: [B, Hm, N, 2] int32; rows of heads that are not INTERVAL have (0, M). None where no head is.

    All tensors are contiguous.
    """

    full: TileLists
    partial: TileLists
    sink: Tensor | None = None
    recent: Tensor | None = None
    intervals: Tensor | None = None


def lower(plan: TilePlan) -> Lowered:
    """The same pairs as `plan`, on its device, without waiting for it.

    Cost: nothing for a plan of CSR heads; O(B Hm nQ nK) otherwise. Mutates nothing.
    """
    if plan.kinds == {HeadClass.CSR}:
        return Lowered(plan.full, plan.partial)
    full, partial, _ = tile_kinds(plan.n_rows, plan.n_keys, plan.block_q, plan.block_k, plan.device)
    class_ = plan.head_class[:, :, None, None]
    sink, recent = plan.sink[:, :, None, None], plan.recent[:, :, None, None]
    p0 = torch.arange(plan.n_q_tiles, device=plan.device)[:, None] * plan.block_q + (plan.n_keys - plan.n_rows)
    p1 = torch.clamp(p0 + plan.block_q - 1, max=plan.n_keys - 1)
    first = torch.arange(plan.n_k_tiles, device=plan.device) * plan.block_k
    last = first + plan.block_k - 1
    some = (full | partial) & ((first < sink) | (last > p0 - recent))
    # whole for every row: inside the sink, inside the window of the last row, or sink and that window leave no gap
    whole = full & ((last < sink) | (first > p1 - recent) | (sink > p1 - recent))
    streaming, dense = class_ == HeadClass.STREAMING, class_ == HeadClass.DENSE
    full_mask, partial_mask = (streaming & whole) | (dense & full), (streaming & some & ~whole) | (dense & partial)
    intervals = None
    if plan.row_intervals is not None:
        own = class_ == HeadClass.INTERVAL
        lo, hi = plan.row_intervals.unbind(-1)
        intervals = torch.stack((torch.where(own[..., 0], lo, 0), torch.where(own[..., 0], hi, plan.n_keys)), -1)
        last_row = -plan.n_rows % plan.block_q  # rows beyond the end repeat the last one
        rows = torch.cat((intervals, intervals[:, :, -1:].expand(-1, -1, last_row, -1)), 2).unflatten(2, (-1, plan.block_q))
        lo, hi = rows[..., 0], rows[..., 1]  # [B, Hm, nQ, Bq]
        some = (first < hi.amax(-1, keepdim=True)) & (last >= lo.amin(-1, keepdim=True))
        whole = full & (first >= lo.amax(-1, keepdim=True)) & (last < hi.amin(-1, keepdim=True))
        full_mask, partial_mask = full_mask | (own & whole), partial_mask | (own & some & ~whole)
    if HeadClass.CSR in plan.kinds:
        shape = (plan.batch, plan.mask_heads, plan.n_q_tiles, plan.n_k_tiles)
        full_mask |= plan.full.to_mask(plan.n_k_tiles).view(shape)
        partial_mask |= plan.partial.to_mask(plan.n_k_tiles).view(shape)
    lists = TileLists.from_mask(full_mask), TileLists.from_mask(partial_mask)
    if HeadClass.STREAMING not in plan.kinds:
        return Lowered(*lists, intervals=intervals)
    sinks = torch.where(plan.head_class == HeadClass.STREAMING, plan.sink, plan.n_keys)
    return Lowered(*lists, sinks, plan.recent.contiguous(), intervals)
