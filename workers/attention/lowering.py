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
        sink, recent: [B, Hm] int32; heads that are not STREAMING have sink = M, which lets everything pass.
        intervals: [B, Hm, N, 2] int32; rows of heads that are not INTERVAL have (0, M). None where no head is.
    """

    full: TileLists
    partial: TileLists
    sink: Tensor
    recent: Tensor
    intervals: Tensor | None = None


def lower(plan: TilePlan) -> Lowered:
    """The same pairs as `plan`, on its device, without waiting for it unless classes are mixed with CSR.

    Cost: nothing for a plan of CSR heads; O(B Hm nQ nK) otherwise. Mutates nothing.
    """
    everything = torch.full_like(plan.sink, plan.n_keys)
    if plan.kinds == {HeadClass.CSR}:
        return Lowered(plan.full, plan.partial, everything, torch.ones_like(everything))
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
        intervals = torch.where(own, plan.row_intervals, torch.tensor((0, plan.n_keys), dtype=torch.int32, device=plan.device))
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
    is_streaming = plan.head_class == HeadClass.STREAMING
    return Lowered(
        TileLists.from_mask(full_mask),
        TileLists.from_mask(partial_mask),
        torch.where(is_streaming, plan.sink, everything),
        plan.recent,
        intervals,
    )
