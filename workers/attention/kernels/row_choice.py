"""Choosing entries of rows in Triton: `scoring.keep_top` and `keep_share` without sorting. Imports triton.

An entry is kept iff it lies above a threshold, and the threshold is found bit by bit, with the row in registers: 32 comparisons
and sums in place of a sort, its indices, a scan and a scatter of the whole map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 8192  # of a row: what a program's registers hold


@triton.jit
def _kept(x, usable, weight, wanted, SHARE: tl.constexpr):
    """Of one row x [BLOCK]: the fewest largest usable entries whose weights add up to wanted; ties go to the lower index.

        t = the largest value with  sum over x >= t of weight >= wanted;  kept: x > t, and the first of x = t that it takes

    Floats are compared as integers of the same order. With SHARE no usable entry is negative.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    threshold = tl.full((), 0 if SHARE else -0x80000000, tl.int32)
    for i in range(1 if SHARE else 0, 32):
        higher = threshold ^ (tl.full((), 1, tl.int32) << (31 - i))
        reached = tl.sum(tl.where(order >= higher, weight, 0.0), 0)
        threshold = tl.where(reached >= wanted, higher, threshold)
    above = usable & (order > threshold)
    tied = usable & (order == threshold)
    before = tl.sum(tl.where(above, weight, 0.0), 0)
    earlier = tl.cumsum(tied.to(tl.int32), 0) - tied.to(tl.int32)
    return above | (tied & (before + earlier.to(tl.float32) * weight < wanted))


@triton.jit
def choose_kernel(scores_ptr, wanted_ptr, out_ptr, columns, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row. With SHARE: the fewest largest entries whose sum reaches `wanted`, of those above 0; otherwise the
    `wanted` largest above -inf. Reads 4 bytes and writes 1 per entry. Grid: (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(scores_ptr + row * columns + column, mask=inside, other=float("-inf"))
    wanted = tl.load(wanted_ptr + row)
    if SHARE:
        usable = inside & (x > 0.0)
        weight = tl.where(usable, x, 0.0)
    else:
        usable = inside & (x > float("-inf"))
        weight = tl.where(usable, 1.0, 0.0)
    kept = _kept(x, usable, weight, wanted, SHARE)
    tl.store(out_ptr + row * columns + column, kept.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["n", "past", "rows"])  # else new lengths would be compiled anew
def choose_tiles_kernel(
    scores_ptr, counts_ptr, out_ptr, n, past, rows, columns, block, threshold, TOP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row of tiles, of which it sees those up to its last position: with TOP the counts[row] largest, the
    diagonal ones first; otherwise those whose share in the softmax of what it sees is threshold or more, and the diagonal.

    Reads 4 bytes per tile that is seen, writes 1 per tile. Grid: (nQ, B * H).
    """
    row = tl.program_id(0)
    at = (tl.program_id(1).to(tl.int64) * rows + row) * columns
    column = tl.arange(0, BLOCK)
    last = tl.minimum((row + 1) * block, n) - 1 + past
    seen = column <= last // block
    diagonal = seen & (column >= (row * block + past) // block)
    x = tl.load(scores_ptr + at + column, mask=seen, other=float("-inf"))
    if TOP:
        x = tl.where(diagonal, float("inf"), x)
        kept = _kept(x, seen, tl.where(seen, 1.0, 0.0), tl.load(counts_ptr + row), False)
    else:
        weights = tl.exp(x - tl.max(x, 0))
        kept = seen & (weights / tl.sum(weights, 0) >= threshold)
    tl.store(out_ptr + at + column, (kept | diagonal).to(tl.uint8), mask=column < columns)


def fits(scores: Tensor) -> bool:
    """Whether `choose` takes these scores."""
    return scores.is_cuda and scores.dtype == torch.float32 and 0 < scores.shape[-1] <= MOST_COLUMNS


def choose(scores: Tensor, wanted: Tensor | float, *, share: bool) -> Tensor:
    """[..., n] bool: see `scoring.keep_share` (share) and `scoring.keep_top`.

    Args:
        scores: [..., n] float32, n at most MOST_COLUMNS. wanted: broadcastable to [...], on the same device, or a number.

    A row in which `wanted` <= 0 keeps nothing. Sums are float32, in another order than a scan's.
    """
    columns = scores.shape[-1]
    flat = scores.contiguous().view(-1, columns)
    if isinstance(wanted, Tensor):
        limit = wanted.to(torch.float32).expand(scores.shape[:-1]).contiguous().view(-1)
    else:
        limit = torch.full((flat.shape[0],), float(wanted), device=scores.device)
    out = torch.empty(flat.shape, dtype=torch.uint8, device=scores.device)
    if flat.shape[0]:
        block = max(32, triton.next_power_of_2(columns))
        choose_kernel[(flat.shape[0],)](
            flat, limit, out, columns, SHARE=share, BLOCK=block, num_warps=max(1, min(8, block // 1024))
        )
    return out.view(torch.bool).view(scores.shape)


def choose_tiles(
    scores: Tensor, *, n: int, m: int, block: int, counts: Tensor | None = None, threshold: float = 0.0
) -> Tensor:  # fmt: skip
    """The diagonal tiles and the best of the others that causality allows, of square tiles.

    Args:
        scores: [B, H, nQ, nK] float32 logits, contiguous, nK at most MOST_COLUMNS; what a row must not see is not read.
        n, m: query rows and keys in tokens, right-aligned. block: tokens of a tile.
        counts: [nQ] on the same device, tiles of a row, the diagonal ones included and kept even where they are more; None =
            all whose share in the softmax of the tiles their row sees reaches `threshold`.

    Returns:
        [B, H, nQ, nK] bool. Ties go to the lower index.
    """
    batch, heads, rows, columns = scores.shape
    out = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    wide = max(32, triton.next_power_of_2(columns))
    choose_tiles_kernel[(rows, batch * heads)](
        scores, scores if counts is None else counts.to(torch.float32), out, n, m - n, rows, columns, block, threshold,
        TOP=counts is not None, BLOCK=wide, num_warps=max(1, min(8, wide // 1024)),
    )  # fmt: skip
    return out.view(torch.bool)
