"""Compaction of rows in Triton: what `tiles` does with scans and scatters of the whole map, in one reading. Imports triton.

Without it the lists of a 128K prompt (32 heads, 1024 x 1024 tiles) take longer than many a selection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def compact_rows_kernel(
    keep_ptr, ids_ptr, offsets_ptr, out_ptr, columns, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[offsets[x] + i] = the i-th kept id of row x. One program a row; without HAS_IDS ids are the columns themselves.

    Reads a byte per candidate (and its id, 4 or 8), writes 4 per kept one. Grid: (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(offsets_ptr + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        keep = tl.load(keep_ptr + row * columns + column, mask=inside, other=0).to(tl.int32)
        place = tl.cumsum(keep, 0) - 1
        ids = column
        if HAS_IDS:
            ids = tl.load(ids_ptr + row * columns + column, mask=inside, other=0).to(tl.int32)
        tl.store(out_ptr + at + place, ids, mask=keep != 0)
        at += tl.sum(keep, 0)


@triton.jit
def compact_kernel(keep_ptr, before_ptr, ids_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out[before[i]] = ids[i] where keep[i]: a scatter in which nothing that is dropped is written. Grid: (n / BLOCK,)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(keep_ptr + i, mask=i < n, other=0) != 0
    place = tl.load(before_ptr + i, mask=keep, other=0)
    tl.store(out_ptr + place, tl.load(ids_ptr + i, mask=keep, other=0).to(tl.int32), mask=keep)


def compact_rows(keep: Tensor, ids: Tensor | None, offsets: Tensor) -> Tensor:
    """The kept ids, row by row, in as many slots as there are candidates.

    Args:
        keep: [rows, C] bool. ids: [rows, C] integer, or None for the columns 0..C-1. offsets: [rows + 1] int64, of the kept ones.

    Returns:
        [rows C] int32; what lies beyond offsets[-1] is 0.
    """
    rows, columns = keep.shape
    out = torch.zeros(rows * columns, dtype=torch.int32, device=keep.device)
    if rows and columns:
        flags = keep.contiguous().view(torch.uint8)
        block = min(1024, max(16, triton.next_power_of_2(columns)))
        compact_rows_kernel[(rows,)](
            flags, flags if ids is None else ids.contiguous(), offsets, out, columns,
            HAS_IDS=ids is not None, BLOCK=block, num_warps=1 if block <= 256 else 2 if block == 512 else 4,
        )  # fmt: skip
    return out


def compact(keep: Tensor, before: Tensor, ids: Tensor) -> Tensor:
    """ids[keep] in as many slots as there are ids, int32; what lies beyond is 0.

    Args:
        keep: [n] bool. before: [>= n] integer, kept ones before each. ids: [n] integer.
    """
    out = torch.zeros(keep.numel(), dtype=torch.int32, device=keep.device)
    if keep.numel():
        grid = (triton.cdiv(keep.numel(), 1024),)
        compact_kernel[grid](keep.contiguous().view(torch.uint8), before, ids.contiguous(), out, keep.numel(), BLOCK=1024)
    return out
