"""Scores of key tiles in Triton: the logits of a selector are reduced to one number a tile where they are computed, and only
that is written. Imports triton.

`tile_lse` serves sampled rows, probes and proxies; `cell_lse` logits that a matrix product has left in memory, which pays where
it has many terms; `probe_mass` the mass of the last rows by key and distance; `pooled_energy` full queries against mean keys.
All take float16 or bfloat16 on CUDA; float32 for the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
_PROGRAMS = 1024  # few rows are divided by keys until there are about so many: some for each processor of a large GPU


@triton.jit(do_not_specialize=["m", "rows", "tiles", "splits", "steps"])  # else new lengths would be compiled anew
def tile_lse_kernel(
    q_ptr, k_ptr, seen_ptr, lse_ptr, top_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    m, rows, tiles, splits, steps, heads, group, scale_log2,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PER_TILE: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """lse[h, r, J] = ln sum over keys j of tile J, j < seen[r], of exp(scale q_r . k_j), and with TOP the largest logit.

    One program: BLOCK_R rows, which stay on the chip, and `steps` times BLOCK_C keys, PER_TILE of them a tile; only where some
    of the rows see only some of the keys are logits masked. Grid: (row blocks * splits, B * Hq), from the last rows, which see
    most. Numerics: products in the inputs' dtype, sums in float32.
    """
    T: tl.constexpr = BLOCK_C // PER_TILE
    row_block = tl.num_programs(0) // splits - 1 - tl.program_id(0) // splits
    low = (tl.program_id(0) % splits) * steps * BLOCK_C
    high = tl.minimum(low + steps * BLOCK_C, tiles * PER_TILE)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row, d = row_block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, D)
    is_row = row < rows
    seen = tl.load(seen_ptr + row, mask=is_row, other=0)
    q_at = q_ptr + batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qn + d[None, :]
    q = tl.load(q_at, mask=is_row[:, None], other=0.0)
    k_at = k_ptr + batch * stride_kb + (head // group) * stride_kh + d[None, :]
    tile = tl.arange(0, T)
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * tiles + tile[None, :]
    by_all = tl.minimum(tl.min(tl.where(is_row, seen, m), 0), high)
    whole = tl.maximum(low, low + (by_all - low) // BLOCK_C * BLOCK_C)  # keys from low up to here are seen by all rows
    some = tl.minimum(tl.max(seen, 0), high)
    for key0 in range(low, whole, BLOCK_C):
        k = tl.load(k_at + (key0 + tl.arange(0, BLOCK_C))[:, None].to(tl.int64) * stride_kn)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        found, top = _by_tile(tl.reshape(logits, (BLOCK_R, T, PER_TILE)), scale_log2, True)
        tl.store(lse_ptr + at + key0 // PER_TILE, found * 0.6931471805599453, mask=is_row[:, None])
        if TOP:
            tl.store(top_ptr + at + key0 // PER_TILE, top * 0.6931471805599453, mask=is_row[:, None])
    for key0 in range(whole, some, BLOCK_C):
        key = key0 + tl.arange(0, BLOCK_C)
        k = tl.load(k_at + key[:, None].to(tl.int64) * stride_kn, mask=(key < m)[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = tl.where(key[None, :] < seen[:, None], logits, float("-inf"))
        found, top = _by_tile(tl.reshape(logits, (BLOCK_R, T, PER_TILE)), scale_log2, False)
        inside = is_row[:, None] & (key0 // PER_TILE + tile < tiles)[None, :]
        tl.store(lse_ptr + at + key0 // PER_TILE, found * 0.6931471805599453, mask=inside)
        if TOP:
            tl.store(top_ptr + at + key0 // PER_TILE, top * 0.6931471805599453, mask=inside)
    nothing = tl.full((BLOCK_R, T), float("-inf"), tl.float32)
    for key0 in range(whole + tl.cdiv(tl.maximum(some - whole, 0), BLOCK_C) * BLOCK_C, high, BLOCK_C):
        inside = is_row[:, None] & (key0 // PER_TILE + tile < tiles)[None, :]
        tl.store(lse_ptr + at + key0 // PER_TILE, nothing, mask=inside)
        if TOP:
            tl.store(top_ptr + at + key0 // PER_TILE, nothing, mask=inside)


@triton.jit
def _by_tile(logits, factor, SEEN: tl.constexpr):
    """Logits [rows, tiles, keys] -> their log-sum-exp after multiplying by factor > 0, to base 2, -inf where none is seen; and
    the largest of them. With SEEN all are seen.
    """
    top = tl.max(logits, 2) * factor
    if SEEN:
        found = top + tl.math.log2(tl.sum(tl.math.exp2(logits * factor - top[:, :, None]), 2))
    else:
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.math.exp2(logits * factor - shift[:, :, None]), 2)
        found = tl.where(total > 0.0, shift + tl.math.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    return found, top


def fits(q: Tensor, softcap: float = 0.0) -> bool:
    """Whether the kernels take these queries (and keys like them)."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in (32, 64, 128, 256) and not softcap


def tile_lse(q: Tensor, k: Tensor, seen: Tensor, *, scale: float, block: int, top: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of some rows' logits over the keys of each tile.

    Args:
        q: [B, Hq, R, D], innermost stride 1. k: [B, Hkv, M, D].
        seen: [R] int, how many keys each row sees, ascending. block: keys of a tile, a power of two up to 128.
        top: also give each tile's largest logit.

    Returns:
        [B, Hq, R, ceil(M / block)] float32, -inf where nothing is seen; and the same of the largest, or None.
    """
    batch, hq, rows, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    tiles = -(-m // block)
    lse = torch.empty(batch, hq, rows, tiles, dtype=torch.float32, device=q.device)
    largest = torch.empty_like(lse) if top else lse
    block_r, block_c = min(64 if d > 128 else 128, max(16, triton.next_power_of_2(rows))), 128
    row_blocks, columns = triton.cdiv(rows, block_r), triton.cdiv(tiles * block, block_c)
    steps = triton.cdiv(columns, max(1, min(columns, _PROGRAMS // (row_blocks * batch * hq))))
    splits = triton.cdiv(columns, steps)
    tile_lse_kernel[(row_blocks * splits, batch * hq)](
        q, k, seen.to(torch.int32), lse, largest, *q.stride()[:3], *k.stride()[:3],
        m, rows, tiles, splits, steps, hq, hq // hkv, scale * _LOG2_E,
        D=d, BLOCK_R=block_r, BLOCK_C=block_c, PER_TILE=block, TOP=top,
        num_warps=4, num_stages=2 if d <= 128 else 1,
    )  # fmt: skip
    return lse, largest if top else None


@triton.jit
def cell_lse_kernel(
    logits_ptr, seen_ptr, lse_ptr, rows, width, tiles, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PER_TILE: tl.constexpr
):  # fmt: skip
    """As `tile_lse_kernel`, of logits [H, rows, width] in memory, natural. Grid: (width / BLOCK_C, rows / BLOCK_R, H)."""
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    cell = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    seen = tl.load(seen_ptr + row, mask=row < rows, other=0)
    at = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * width + cell[None, :]
    inside = cell[None, :] < tl.minimum(seen, width)[:, None]
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    T: tl.constexpr = BLOCK_C // PER_TILE
    found, _ = _by_tile(tl.reshape(logits, (BLOCK_R, T, PER_TILE)), 1.4426950408889634, False)
    tile = tl.program_id(0) * T + tl.arange(0, T)
    at = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * tiles + tile[None, :]
    tl.store(lse_ptr + at, found * 0.6931471805599453, mask=(row < rows)[:, None] & (tile < tiles)[None, :])


def cell_lse(logits: Tensor, seen: Tensor, per_tile: int) -> Tensor:
    """Log-sum-exp of rows of cells over the cells of each tile: one reading of the logits.

    Args:
        logits: [..., rows, width], contiguous, width a multiple of per_tile, a power of two up to 128.
        seen: [rows] int, how many cells each row sees; what lies beyond is not read.

    Returns:
        [..., rows, width / per_tile] float32, -inf where nothing is seen.
    """
    rows, width = logits.shape[-2:]
    heads = logits.numel() // (rows * width)
    lse = torch.empty(*logits.shape[:-1], width // per_tile, dtype=torch.float32, device=logits.device)
    grid = (triton.cdiv(width, 256), triton.cdiv(rows, 16), heads)
    cell_lse_kernel[grid](
        logits, seen.to(torch.int32), lse, rows, width, width // per_tile, BLOCK_R=16, BLOCK_C=256, PER_TILE=per_tile, num_warps=4
    )
    return lse


@triton.jit
def sum_shares_kernel(lse_ptr, out_ptr, rows, tiles, PER_TILE: tl.constexpr, BLOCK: tl.constexpr):
    """out[h, I, J] = sum over rows r of tile I of exp(lse[h, r, J] - ln sum_J exp lse[h, r, J]). Grid: (nQ, B * Hq)."""
    row = tl.program_id(0) * PER_TILE + tl.arange(0, PER_TILE)
    tile = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (tile < tiles)[None, :]
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * tiles + tile[None, :]
    x = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    top = tl.max(x, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(x - shift[:, None])
    total = tl.sum(weights, 1)
    shares = tl.sum(weights / tl.where(total > 0.0, total, 1.0)[:, None], 0)
    out_at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * tiles + tile
    tl.store(out_ptr + out_at, shares, mask=tile < tiles)


def sum_shares(lse: Tensor, per_tile: int) -> Tensor:
    """[B, H, rows, nK] log-sums -> [B, H, ceil(rows / per_tile), nK] float32: the rows' normalised shares, summed by tile."""
    batch, heads, rows, tiles = lse.shape
    block = triton.next_power_of_2(tiles)
    if per_tile & (per_tile - 1) or per_tile * block > 1 << 15:
        shares = torch.softmax(lse, -1)
        return torch.nn.functional.pad(shares, (0, 0, 0, -rows % per_tile)).unflatten(2, (-1, per_tile)).sum(3)
    out = torch.empty(batch, heads, -(-rows // per_tile), tiles, dtype=torch.float32, device=lse.device)
    sum_shares_kernel[(out.shape[2], batch * heads)](lse, out, rows, tiles, PER_TILE=per_tile, BLOCK=block, num_warps=8)
    return out


@triton.jit
def probe_weights_kernel(
    q_ptr, k_ptr, lse_ptr, weights_ptr, vertical_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    b, m, heads, group, scale_log2, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """weights[h, i, j] = exp(scale q_i . k_j - lse_i) for keys up to the row's own, and their means over the b last rows.

    Grid: (M / BLOCK_C, B * Hq). Writes 4 b bytes a key and head.
    """
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row, key, d = tl.arange(0, BLOCK_R), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, D)
    q = tl.load(
        q_ptr + batch * stride_qb + head * stride_qh + row[:, None] * stride_qn + d[None, :], mask=(row < b)[:, None], other=0.0
    )
    k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
    k = tl.load(k_base + key[:, None].to(tl.int64) * stride_kn + d[None, :], mask=(key < m)[:, None], other=0.0)
    lse = tl.load(lse_ptr + tl.program_id(1) * b + row, mask=row < b, other=0.0)
    weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - (lse * 1.4426950408889634)[:, None])
    seen = (row < b)[:, None] & (key[None, :] <= (m - b + row)[:, None])
    weights = tl.where(seen, weights, 0.0)
    at = (tl.program_id(1).to(tl.int64) * b + row[:, None]) * m + key[None, :]
    tl.store(weights_ptr + at, weights, mask=(row < b)[:, None] & (key < m)[None, :])
    tl.store(vertical_ptr + tl.program_id(1).to(tl.int64) * m + key, tl.sum(weights, 0) / b, mask=key < m)


@triton.jit
def slash_kernel(weights_ptr, slash_ptr, b, m, BLOCK: tl.constexpr):
    """slash[h, s] = mean over the b rows of weights[h, i, m - b + i - s]. Grid: (M / BLOCK, B * Hq)."""
    distance = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(b):
        key = m - b + i - distance
        acc += tl.load(weights_ptr + (head * b + i) * m + key, mask=(key >= 0) & (distance < m), other=0.0)
    tl.store(slash_ptr + head * m + distance, acc / b, mask=distance < m)


def probe_mass(probe: Tensor, k: Tensor, *, scale: float, slab_bytes: int) -> tuple[Tensor, Tensor]:
    """Mean attention of the last rows by key and by distance; see `scoring.recent_mass`.

    Args:
        probe: [B, Hq, b, D], the last b <= 256 query rows. k: [B, Hkv, M, D]. slab_bytes: most weights held at once.
    """
    batch, hq, b, d = probe.shape
    hkv, m = k.shape[1], k.shape[2]
    group = hq // hkv
    probe = probe.contiguous()
    seen = torch.arange(m - b + 1, m + 1, dtype=torch.int32, device=k.device)
    vertical, slash = (torch.empty(batch, hq, m, dtype=torch.float32, device=k.device) for _ in range(2))
    width = max(1, min(hkv, int(slab_bytes / (4 * batch * group * b * m))))
    block_r, block_c = max(16, triton.next_power_of_2(b)), 128
    for first in range(0, hkv, width):
        keys = k[:, first : first + width]
        heads = slice(first * group, (first + width) * group)
        rows = probe[:, heads]
        lse, _ = tile_lse(rows, keys, seen, scale=scale, block=128)
        lse = lse.logsumexp(-1)
        weights = torch.empty(*rows.shape[:3], m, dtype=torch.float32, device=k.device)
        own = (torch.empty(batch, rows.shape[1], m, dtype=torch.float32, device=k.device) for _ in range(2))
        by_key, by_distance = own
        grid = (triton.cdiv(m, block_c), batch * rows.shape[1])
        probe_weights_kernel[grid](
            rows, keys, lse, weights, by_key, *rows.stride()[:3], *keys.stride()[:3], b, m, rows.shape[1], group,
            scale * _LOG2_E, D=d, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=8 if block_r >= 128 else 4,
        )  # fmt: skip
        slash_kernel[(triton.cdiv(m, 512), batch * rows.shape[1])](weights, by_distance, b, m, BLOCK=512, num_warps=4)
        vertical[:, heads], slash[:, heads] = by_key, by_distance
    return vertical, slash


@triton.jit
def pooled_energy_kernel(
    q_ptr, k_ptr, out_ptr, stride_qb, stride_qh, stride_qn, n, past, tiles, heads, group, block, scale_log2,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[h, I, J] = ln sum over rows i of I that see all of tile J of exp(scale q_i . kbar_J); kbar [B, Hkv, nK, D] contiguous.

    Grid: (nQ, B * Hq), query tiles from the last, which see most. Reads q once.
    """
    q_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row, d = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, D)
    q_at = q_ptr + batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qn + d[None, :]
    q = tl.load(q_at, mask=(row < n)[:, None], other=0.0)
    k_base = k_ptr + (batch * (heads // group) + head // group) * tiles * D
    out_base = out_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + q_tile) * tiles
    seen = tl.where(row < n, (row + past + 1) // block, 0)
    for first in range(0, tl.max(seen, 0), BLOCK_C):
        tile = first + tl.arange(0, BLOCK_C)
        k = tl.load(k_base + tile[:, None] * D + d[None, :], mask=(tile < tiles)[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        logits = tl.where(tile[None, :] < seen[:, None], logits, float("-inf"))
        top = tl.max(logits, 0)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.math.exp2(logits - shift[None, :]), 0)
        found = tl.where(total > 0.0, shift + tl.math.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(out_base + tile, found * 0.6931471805599453, mask=tile < tiles)


def pooled_energy(q: Tensor, pooled: Tensor, *, past: int, block: int, block_q: int, scale: float) -> Tensor:
    """Log-sum over the rows of each query tile of exp(logit against each tile's mean key), of rows that see the whole tile.

    Args:
        q: [B, Hq, N, D], innermost stride 1. pooled: [B, Hkv, nK, D] contiguous, q's dtype. past: M - N.
        block: keys of a tile. block_q: rows of a query tile, a power of two from 16 on.

    Returns:
        [B, Hq, ceil(N / block_q), nK] float32, -inf where no row sees the tile.
    """
    batch, hq, n, d = q.shape
    hkv, tiles = pooled.shape[1], pooled.shape[2]
    out = torch.full((batch, hq, -(-n // block_q), tiles), -torch.inf, device=q.device)
    pooled_energy_kernel[(out.shape[2], batch * hq)](
        q, pooled, out, *q.stride()[:3], n, past, tiles, hq, hq // hkv, block, scale * _LOG2_E,
        D=d, BLOCK_Q=block_q, BLOCK_C=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
