"""What a gate looks at, in Triton: tiles of q and k taken back to before RoPE and pooled, in one reading. Imports triton.

Plain torch writes the turned copy, which is as large as q in float32, several times before a tile of it becomes one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.workers.attention.kernels import row_choice

HEADS = 8  # heads that a program pools with the angles it has loaded


@triton.jit(do_not_specialize=["tokens", "tiles"])  # else new lengths would be compiled anew
def pool_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_b, stride_h, stride_t, tokens, tiles, heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, EXTREMES: tl.constexpr,
):  # fmt: skip
    """x = [l, r] before RoPE is, with its token's c and s,  [l' c + r' s, r' c - l' s] / (c^2 + s^2)  of the rotated [l', r'].

    out[b, h, I] = its mean over the real tokens of tile I, or with EXTREMES its max, min and mean.

    One program: a tile of HEADS heads. Reads x once and the angles once per program. Grid: (tiles, heads / HEADS, B).
    """
    token, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF)
    inside = (token < tokens)[:, None]
    angle = token[:, None] * (2 * HALF) + d[None, :]
    c = tl.load(cos_ptr + angle, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)  # its first half holds -sin
    size = c * c + s * s
    c, s = c / size, s / size
    count = tl.minimum(tokens - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    batch = tl.program_id(2).to(tl.int64)
    width: tl.constexpr = 6 * HALF if EXTREMES else 2 * HALF
    for member in range(tl.program_id(1) * HEADS, tl.minimum((tl.program_id(1) + 1) * HEADS, heads)):
        head = tl.cast(member, tl.int64)
        at = x_ptr + batch * stride_b + head * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :]
        left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        turned = left * c + right * s
        right = right * c - left * s
        left = turned
        out = out_ptr + ((batch * heads + head) * tiles + tl.program_id(0)) * width + d
        if EXTREMES:
            tl.store(out, tl.max(tl.where(inside, left, float("-inf")), 0))
            tl.store(out + HALF, tl.max(tl.where(inside, right, float("-inf")), 0))
            tl.store(out + 2 * HALF, tl.min(tl.where(inside, left, float("inf")), 0))
            tl.store(out + 3 * HALF, tl.min(tl.where(inside, right, float("inf")), 0))
        tl.store(out + width - 2 * HALF, tl.sum(left, 0) / count)
        tl.store(out + width - HALF, tl.sum(right, 0) / count)


def fits(q: Tensor, n_tiles: int) -> bool:
    """Whether the kernels take these queries, keys like them, and rows of so many tiles."""
    sizes = q.shape[-1] in (32, 64, 128, 256) and n_tiles <= row_choice.MOST_COLUMNS
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and sizes


def pool(x: Tensor, cos: Tensor, sin: Tensor, block: int, *, extremes: bool) -> Tensor:
    """Tiles of x before RoPE, pooled over their real tokens.

    Args:
        x: [B, H, T, D] rotated, innermost stride 1. cos, sin: [T, D] contiguous, the rows of `RopeTable` that turned it.
        block: tokens of a tile, a power of two.
        extremes: max, min and mean instead of the mean.

    Returns:
        [B, H, ceil(T / block), D or 3 D] float32.
    """
    batch, heads, tokens, d = x.shape
    tiles = triton.cdiv(tokens, block)
    out = torch.empty(batch, heads, tiles, 3 * d if extremes else d, dtype=torch.float32, device=x.device)
    pool_kernel[(tiles, triton.cdiv(heads, HEADS), batch)](
        x, cos, sin, out, *x.stride()[:3], tokens, tiles, heads, HALF=d // 2, BLOCK=block, HEADS=HEADS, EXTREMES=extremes,
        num_warps=8,
    )  # fmt: skip
    return out


choose_tiles = row_choice.choose_tiles
