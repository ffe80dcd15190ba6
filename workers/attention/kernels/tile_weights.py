"""The weights of mean correction in Triton: `estimates.log_weights` row by row, from the lists as they are. Imports triton.

Torch finds the row of every id that there is room for, and adds those that are no ids to one place, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.workers.attention.plan import HeadClass, TilePlan

_CSR = tl.constexpr(int(HeadClass.CSR))


@triton.jit
def _before(ids_ptr, first, count, bound):
    """How many of the ascending ids_ptr[first : first + count] are below bound [BLOCK]."""
    low = tl.zeros(bound.shape, tl.int32)
    high = low + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        open_ = low < high
        less = open_ & (tl.load(ids_ptr + first + middle, mask=open_, other=0) < bound)
        low = tl.where(less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
        left = left // 2
    return low


@triton.jit(do_not_specialize=["n", "past", "window", "q_tiles", "k_tiles"])  # else new lengths would be compiled anew
def log_weights_kernel(
    class_ptr, full_offsets, full_ids, column_offsets, column_ids, out_ptr, n, past, window, q_tiles, k_tiles, block_q, block_k,
    COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, J] = ln(keys of J - token columns of r in J) for full tiles J that row r of the lists leaves out, else -inf.

    One program a row. Writes 4 bytes per tile, and 4 more per listed one. Grid: (B * Hm * nQ,).
    """
    row = tl.program_id(0).to(tl.int64)
    q_tile = tl.program_id(0) % q_tiles
    first_position = q_tile * block_q + past
    last_position = tl.minimum((q_tile + 1) * block_q, n) - 1 + past
    kind = tl.load(class_ptr + row // q_tiles)
    end = tl.where(kind == _CSR, (first_position + 1) // block_k, 0)  # full tiles
    if COLUMNS:
        column_first = tl.load(column_offsets + row)
        column_count = (tl.load(column_offsets + row + 1) - column_first).to(tl.int32)
    for start in range(0, k_tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        left_out = tile < end
        if WINDOW:
            left_out = left_out & (tile * block_k > last_position - window)
        size = tl.where(left_out, block_k, 0)
        if COLUMNS:
            read = _before(column_ids, column_first, column_count, (tile + 1) * block_k)
            size -= read - _before(column_ids, column_first, column_count, tile * block_k)
        weight = tl.where(size > 0, tl.log(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
        tl.store(out_ptr + row * k_tiles + tile, weight, mask=tile < k_tiles)
    tl.debug_barrier()  # what follows is written over it by other threads
    first = tl.load(full_offsets + row)
    count = (tl.load(full_offsets + row + 1) - first).to(tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tile = tl.load(full_ids + first + i, mask=i < count, other=0)
        tl.store(out_ptr + row * k_tiles + tile, tl.full((BLOCK,), float("-inf"), tl.float32), mask=i < count)


def log_weights(plan: TilePlan, window: int = 0) -> Tensor:
    """[B, Hm, nQ, nK] float32 on the plan's device: see `estimates.log_weights`."""
    out = torch.empty(plan.batch, plan.mask_heads, plan.n_q_tiles, plan.n_k_tiles, device=plan.device)
    columns = plan.token_columns or plan.full
    block = min(1024, max(32, triton.next_power_of_2(plan.n_k_tiles)))
    log_weights_kernel[(plan.full.n_rows,)](
        plan.head_class.contiguous(), plan.full.offsets, plan.full.ids, columns.offsets, columns.ids, out,
        plan.n_rows, plan.n_keys - plan.n_rows, window, plan.n_q_tiles, plan.n_k_tiles, plan.block_q, plan.block_k,
        COLUMNS=plan.token_columns is not None, WINDOW=window > 0, BLOCK=block, num_warps=max(1, min(4, block // 256)),
    )  # fmt: skip
    return out
