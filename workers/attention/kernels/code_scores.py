"""Scores of all pairs from low-bit codes in Triton, of which only what each tile comes to is written. Imports triton.

    s_ij = (row scale_i)(key scale_j)(code_i . code_j) + mean_I . k_j scale + offset_i,      tile (I, J) gives max over its pairs

Codes are multiplied as 8-bit numbers, of which Hopper does twice as many a second as of 16 bits, and keys cost half the traffic.
Codes of up to 4 bits are whole numbers that float8 e4m3 holds, and their sum, at most 6272 for 128 dimensions, is exact in a
product that comes out as float32: nothing is left to convert for every pair. Longer codes, larger heads and older GPUs multiply
integers, whose sum is at most 2^22. What the mean of a query tile makes of every key is one number for 64 rows: a product of its
own, left in memory a slab at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.workers.attention.kernels.codes import BLOCK_Q, CODE_KEYS, Known, code_keys, code_rows
from winnow.workers.attention.kernels.tile_scores import fits

__all__ = ["Known", "fits", "tile_maxima"]

UNITS = 2  # query tiles that a program scores against the keys it loads
FLOAT8_BITS = 4  # longest codes that float8 e4m3 holds exactly


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["m", "first_unit", "slab_units", "units", "past"])  # else new lengths would be compiled anew
def mean_logits_kernel(
    means_ptr, k_ptr, out_ptr, stride_kb, stride_kh, stride_kn, m, first_unit, slab_units, units, width, heads, group, past,
    local, segment, scale, D: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[u, j] = scale mean_u . k_j, [B * Hkv, slab_units, width] float32, of keys that some unit of the block does not know.

    Grid: (width / BLOCK_C, slab_units / BLOCK_U, B * Hkv). Writes 4 bytes per unit and key.
    """
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    key, d = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, D)
    last = tl.minimum((tl.program_id(1) + 1) * BLOCK_U, slab_units) - 1
    end = tl.maximum((first_unit + last) // group * 64 + past + 1 - local, 0) // segment * segment
    if tl.program_id(0) * BLOCK_C < end:
        batch = (tl.program_id(2) // heads).to(tl.int64)
        head = (tl.program_id(2) % heads).to(tl.int64)
        k_at = k_ptr + batch * stride_kb + head * stride_kh + key[:, None].to(tl.int64) * stride_kn + d[None, :]
        k = tl.trans(tl.load(k_at, mask=(key < m)[:, None], other=0.0))
        here = (unit < slab_units)[:, None]
        at = (tl.program_id(2).to(tl.int64) * units + first_unit + unit[:, None]) * 2 * D + d[None, :]
        acc = tl.dot(tl.load(means_ptr + at, mask=here, other=0.0), k, input_precision="ieee")
        acc = tl.dot(tl.load(means_ptr + at + D, mask=here, other=0.0), k, acc, input_precision="ieee")
        out = (tl.program_id(2).to(tl.int64) * slab_units + unit[:, None]) * width + key[None, :]
        tl.store(out_ptr + out, acc * scale, mask=here)


@triton.jit(
    do_not_specialize=["first_unit", "slab_units", "units", "kv_heads", "first_head", "q_tiles", "k_tiles", "past"]
)  # else new lengths would be compiled anew
def code_scores_kernel(
    row_codes_ptr, row_scales_ptr, offsets_ptr, key_codes_ptr, key_scales_ptr, of_mean_ptr, limits_ptr, out_ptr,
    first_unit, slab_units, units, coded, width, group, kv_heads, first_head, all_heads, q_tiles, k_tiles, past,
    sink, local, segment, dense_below,
    D: tl.constexpr, UNITS: tl.constexpr, BLOCK_C: tl.constexpr, TOKEN_SCALES: tl.constexpr, VERDICTS: tl.constexpr,
):  # fmt: skip
    """The tiles between sink and local window of UNITS units, over their keys: out[B, Hq, nQ, nK].

    With VERDICTS out is bool and becomes true where the largest score exceeds the head's limit, else it stays what it was: a
    thread notes a bit a step and tile, and warps wait for each other once in 32 steps. Otherwise out is float32 and gets the
    largest score.

    Rows are taken as (16-row groups, pairs 8 apart, 8) and keys as (tiles, 4, 4, pairs): as a thread of the matrix instruction
    holds them, 16 pairs of one scale each. Everything up to the maximum of those stays in a thread's registers.

    One program: 64 UNITS rows, keys BLOCK_C at a time up to the last unit's window. Grid: (slab_units / UNITS, B * Hkv of the
    slab), units from the last, which see most. Reads D + 4 bytes of every key and 4 UNITS of `of_mean`. Codes are float8 e4m3 or
    int8; both give the same scores.
    """
    KT: tl.constexpr = BLOCK_C // 32
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = first_head + (tl.program_id(1) % kv_heads).to(tl.int64)  # KV head
    kv = batch * all_heads + head
    member = tl.arange(0, UNITS)
    in_slab = block * UNITS + member
    unit = first_unit + in_slab
    position = unit // group * 64 + past
    start = tl.maximum(position + 1 - local, 0) // segment * segment
    q_head = head * group + unit % group
    limit = tl.zeros((UNITS,), tl.float32)
    if VERDICTS:
        limit = tl.load(limits_ptr + q_head)
    wanted = (in_slab < slab_units) & (position >= dense_below) & (limit < float("inf"))
    seen = tl.where(wanted, start, 0)

    row, d = tl.arange(0, UNITS * 64), tl.arange(0, D)
    row_at = (kv * units + first_unit + block * UNITS) * 64 + row
    row_inside = block * UNITS * 64 + row < slab_units * 64
    codes = tl.load(row_codes_ptr + row_at[:, None] * D + d[None, :], mask=row_inside[:, None], other=0.0)
    row_scale = tl.load(row_scales_ptr + row_at, mask=row_inside, other=0.0)
    offset = tl.load(offsets_ptr + row_at, mask=row_inside, other=float("-inf"))
    offset = tl.reshape(offset, (UNITS, 4, 2, 8, 1, 1))
    row_scale = tl.reshape(row_scale, (UNITS, 4, 2, 8))
    if not TOKEN_SCALES:
        row_scale = tl.reshape(tl.max(row_scale, 2), (UNITS, 4, 1, 8))
    row_scale = row_scale[:, :, :, :, None, None, None, None]

    out_row = ((batch * all_heads * group + q_head) * q_tiles + unit // group) * k_tiles
    means_ptr = of_mean_ptr + (tl.program_id(1).to(tl.int64) * slab_units + in_slab[:, None]) * width
    keys_ptr, scales_ptr = key_codes_ptr + kv * coded * D, key_scales_ptr + kv * coded
    of_key = tl.arange(0, BLOCK_C)
    if not TOKEN_SCALES:  # the first of the 8 keys that share one
        of_key = tl.arange(0, KT)[:, None] * 32 + tl.arange(0, 4)[None, :] * 2
    end, steps = tl.max(seen, 0), 0
    bits = tl.zeros((UNITS, 4, 8, KT, 4), tl.int32)  # of a thread's pairs, one for each of the last 32 steps
    # with num_stages given here, all loads of the loop are fetched ahead, not only those that a product reads; those after
    # the product come out of shared memory as its threads need them, and take no registers while it runs
    for key0 in tl.range(sink // BLOCK_C * BLOCK_C, end, BLOCK_C, num_stages=3):
        key = key0 + tl.arange(0, BLOCK_C)
        keys = tl.load(keys_ptr + key[:, None] * D + d[None, :])
        if row_codes_ptr.dtype.element_ty == tl.int8:
            product = tl.dot(codes, tl.trans(keys), out_dtype=tl.int32).to(tl.float32)
        else:
            product = tl.dot(codes, tl.trans(keys))
        of_mean = tl.load(
            means_ptr + key[None, :], mask=(in_slab < slab_units)[:, None], other=0.0, eviction_policy="evict_first"
        )
        of_mean = tl.reshape(of_mean, (UNITS, 1, 1, 1, KT, 4, 4, 2))
        key_scale = tl.load(scales_ptr + key0 + of_key)
        if TOKEN_SCALES:
            key_scale = tl.reshape(key_scale, (1, 1, 1, 1, KT, 4, 4, 2))
        else:
            key_scale = tl.reshape(key_scale, (1, 1, 1, 1, KT, 1, 4, 1))
        scores = tl.reshape(product, (UNITS, 4, 2, 8, KT, 4, 4, 2)) * (row_scale * key_scale) + of_mean
        best = tl.max(tl.max(tl.max(scores, 7), 5) + offset, 2)  # [UNITS, 4, 8, KT, 4]
        tile = key0 // 32 + tl.arange(0, KT)
        if VERDICTS:
            bits = bits * 2 + (best > limit[:, None, None, None, None]).to(tl.int32)
            steps += 1
            if (steps == 32) | (key0 + BLOCK_C >= end):
                word = tl.reduce(tl.reduce(tl.reduce(bits, 4, _either), 2, _either), 1, _either)  # [UNITS, KT]
                back = tl.arange(0, 32)[None, :, None]
                before = tile[None, None, :] - back * KT
                inside = (back < steps) & (before * 32 >= sink) & (before * 32 < seen[:, None, None])
                kept = inside & (((word[:, None, :] >> back) & 1) == 1)
                at = out_row[:, None, None] + before
                tl.store(out_ptr + at, tl.full((UNITS, 32, KT), 1, tl.uint8), mask=kept)
                bits = tl.zeros((UNITS, 4, 8, KT, 4), tl.int32)
                steps = 0
        else:
            largest = tl.max(tl.max(tl.max(best, 4), 2), 1)
            inside = (tile * 32 >= sink)[None, :] & (tile[None, :] * 32 < seen[:, None])
            tl.store(out_ptr + out_row[:, None] + tile[None, :], largest, mask=inside)


def tile_maxima(
    q: Tensor, k: Tensor, shift: Tensor, known: Known, out: Tensor, limits: Tensor | None, *,
    scale: float, bits: int, token_scales: bool, slab_bytes: int,
) -> None:  # fmt: skip
    """Score every tile of 64 x 32 that no rule keeps already, and write what it comes to into out.

    Args:
        q: [B, Hq, N, D], k: [B, Hkv, M, D], for which `fits` is true (float32 in the tests), innermost stride 1.
        shift: [B, Hkv, 1, D] float32, taken off the keys before they are coded.
        out: [B, Hq, nQ, nK] contiguous, mutated. With limits bool: true is written where a score exceeds its head's limit;
            without float32: the largest score is written. Tiles of sink and local window, of rows before `dense_below`,
            and those after the window are not touched.
        limits: [Hq] float32; inf = this head is not looked at.
        bits, token_scales: of the codes, see `codes.code_keys`. slab_bytes: most memory for what the means make of the keys.

    Holds besides a byte per number of q and k, two for a moment where codes become float8. Does not wait for the device.
    """
    batch, hq, n, d = q.shape
    hkv, m = k.shape[1], k.shape[2]
    group, past, tiles = hq // hkv, m - n, -(-n // BLOCK_Q)
    slabs = unit_slabs(hkv, tiles * group, group, past, known, batch, slab_bytes)
    if not slabs:
        return
    keys = code_keys(k, shift, known.start(past + (tiles - 1) * BLOCK_Q), bits=bits, token_scales=token_scales)
    rows = code_rows(q, k, shift, known, scale=scale, bits=bits, token_scales=token_scales)
    if bits <= FLOAT8_BITS and d <= 128 and _multiplies_float8(q.device):
        keys = replace(keys, codes=keys.codes.to(torch.float8_e4m3fn))
        rows = replace(rows, codes=rows.codes.to(torch.float8_e4m3fn))
    coded, units = keys.codes.shape[2], tiles * group
    flags = out if limits is None else out.view(torch.uint8)
    for heads, first, stop in slabs:
        slab_units = stop - first
        width = triton.cdiv(known.start(past + (stop - 1) // group * BLOCK_Q), CODE_KEYS) * CODE_KEYS
        wide = heads.stop - heads.start
        of_mean = torch.empty(batch * wide, slab_units, width, dtype=torch.float32, device=q.device)
        keys_here = k[:, heads]
        means = rows.means[:, heads]
        means = means if batch == 1 or wide == hkv else means.contiguous()
        mean_logits_kernel[(width // CODE_KEYS, triton.cdiv(slab_units, 128), batch * wide)](
            means, keys_here, of_mean, *k.stride()[:3], m, first, slab_units, units, width, wide, group, past,
            known.local, known.segment, scale, D=d, BLOCK_U=128, BLOCK_C=CODE_KEYS, num_warps=8,
        )  # fmt: skip
        code_scores_kernel[(triton.cdiv(slab_units, UNITS), batch * wide)](
            rows.codes, rows.scales, rows.offsets, keys.codes, keys.scales, of_mean,
            of_mean if limits is None else limits, flags,
            first, slab_units, units, coded, width, group, wide, heads.start, hkv, tiles, out.shape[3], past,
            known.sink, known.local, known.segment, known.dense_below,
            D=d, UNITS=UNITS, BLOCK_C=CODE_KEYS, TOKEN_SCALES=token_scales, VERDICTS=limits is not None,
            num_warps=8,
        )  # fmt: skip


def _multiplies_float8(device: torch.device) -> bool:
    """Whether Triton compiles products of float8 e4m3 for it; its interpreter computes them anywhere."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def unit_slabs(
    heads: int, units: int, group: int, past: int, known: Known, batch: int, slab_bytes: int
) -> list[tuple[slice, int, int]]:
    """(KV heads, first unit, unit after the last): pieces whose map of units x keys has at most slab_bytes, one unit at least.

    Pieces with fewer keys hold more units. Units that know all their keys are left out.
    """
    found: list[tuple[slice, int, int]] = []
    stop = units
    while stop > 0:
        keys = known.start(past + (stop - 1) // group * BLOCK_Q)
        if keys <= known.sink or past + (stop - 1) // group * BLOCK_Q < known.dense_below:
            break
        row_bytes = 4 * batch * (triton.cdiv(keys, CODE_KEYS) * CODE_KEYS)
        step = max(1, min(stop, int(slab_bytes / row_bytes)))
        step = min(step, max(64 * group, -(-units // 8)))  # shorter pieces need fewer keys
        width = max(1, min(heads, int(slab_bytes / (row_bytes * step))))
        first = max(0, stop - step)
        found += [(slice(head, min(head + width, heads)), first, stop) for head in range(0, heads, width)]
        stop = first
    return found
