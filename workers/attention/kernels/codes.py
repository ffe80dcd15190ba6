"""Low-bit codes of queries and keys in Triton, for selectors that score every pair. Imports triton.

A code is a whole number of -top..top, kept in 8 bits, times a scale that some tokens share: with cells of 16 queries, those 8
apart; with cells of 32 keys, 8 of them, as the threads of a matrix instruction hold them. `code_scores` multiplies the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_Q, BLOCK_K = 64, 32  # of the tiles that are scored
CODE_KEYS = 128  # keys that `code_scores` takes at once: codes are made for whole blocks of them


@dataclass(frozen=True)
class Known:
    """Which keys a query tile reads in any case: see `methods.sale.SALE`, whose attributes these are. All in tokens."""

    sink: int
    local: int
    segment: int
    dense_below: int

    def start(self, first_position: int) -> int:
        """First key of the local window of a query tile whose first row stands there: a multiple of segment."""
        return max(0, first_position + 1 - self.local) // self.segment * self.segment


@dataclass(frozen=True, eq=False)
class KeyCodes:
    """codes [B, Hkv, K, D] int8 and scales [B, Hkv, K] float32 of the first keys, K a multiple of CODE_KEYS."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, eq=False)
class RowCodes:
    """Of units, the query tiles of the heads of a group: unit u is tile u // g of the group's head u % g.

    Attributes:
        codes: [B, Hkv, units, 64, D] int8, of rows less their tile's mean. scales: [B, Hkv, units, 64] float32, the layer's
            scale included.
        offsets: [B, Hkv, units, 64] float32, what is added to each logit: (row - mean) . shift less the row's known
            log-sum-exp; -inf for rows past the end.
        means: [B, Hkv, units, 2, D] in the queries' dtype; the two add up to the mean of the tile.
    Of units that read every key in any case codes are undefined and all else is 0.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    means: Tensor


@triton.jit
def _rounded(x):
    """To the nearest whole number, halves to even, |x| < 2^22: float32 has no places left beyond 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["m"])  # else new lengths would be compiled anew
def key_codes_kernel(
    k_ptr, shift_ptr, codes_ptr, scales_ptr, stride_kb, stride_kh, stride_kn, m, coded, heads, top,
    D: tl.constexpr, TOKEN_SCALES: tl.constexpr,
):  # fmt: skip
    """codes[j] = round((k_j - shift) / scale_j), scale_j = the largest |k - shift| of the keys that share it / top.

    One program: 32 keys of one head. Reads them once, writes a byte per number. Grid: (coded / 32, B * Hkv).
    """
    key, d = tl.program_id(0) * 32 + tl.arange(0, 32), tl.arange(0, D)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = k_ptr + batch * stride_kb + head * stride_kh + key[:, None].to(tl.int64) * stride_kn + d[None, :]
    inside = (key < m)[:, None]
    shift = tl.load(shift_ptr + tl.program_id(1) * D + d)
    x = tl.where(inside, tl.load(at, mask=inside, other=0.0).to(tl.float32) - shift[None, :], 0.0)
    peak = tl.max(tl.abs(x), 1)
    if not TOKEN_SCALES:
        shared = tl.max(tl.max(tl.reshape(peak, (4, 4, 2)), 2), 0)
        peak = tl.reshape(tl.broadcast_to(shared[None, :, None], (4, 4, 2)), (32,))
    scale = tl.math.div_rn(tl.maximum(peak, 1e-20), top)
    codes = _rounded(tl.math.div_rn(x, tl.broadcast_to(scale[:, None], (32, D))))
    out = tl.program_id(1).to(tl.int64) * coded + key
    tl.store(codes_ptr + out[:, None] * D + d[None, :], codes.to(tl.int8))
    tl.store(scales_ptr + out, scale)


@triton.jit
def _exp_sums(q, base, stride_kn, key, end, allowed, d, scale_log2, top, total):
    """One step of a running log-sum-exp, base 2, over keys [STEP] before end where allowed [rows or 1, STEP]."""
    k = tl.load(base + key[:, None].to(tl.int64) * stride_kn + d[None, :], mask=(key < end)[:, None], other=0.0)
    logits = tl.where(allowed, tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.math.exp2(top - shift) + tl.sum(tl.math.exp2(logits - shift[:, None]), 1)


@triton.jit(do_not_specialize=["n", "past", "tiles"])  # else new lengths would be compiled anew
def row_codes_kernel(
    q_ptr, k_ptr, shift_ptr, codes_ptr, scales_ptr, offsets_ptr, means_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    n, past, tiles, kv_heads, group, sink, local, segment, dense_below, top, scale,
    D: tl.constexpr, STEP: tl.constexpr, TOKEN_SCALES: tl.constexpr,
):  # fmt: skip
    """Everything of `RowCodes` for one query tile of one head, and the exact log-sum-exp of its rows over sink and local window.

    Reads q once and the known keys, local + segment + 62 + sink at most, per program. Grid: (nQ, B * Hq).
    Numerics: products in the inputs' dtype, sums in float32.
    """
    tile, d = tl.program_id(0), tl.arange(0, D)
    heads = kv_heads * group
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first = tile * 64 + past
    start = tl.maximum(first + 1 - local, 0) // segment * segment
    if (start > sink) & (first >= dense_below):
        row = tile * 64 + tl.arange(0, 64)
        is_row = row < n
        q_at = q_ptr + batch * stride_qb + head * stride_qh + row[:, None].to(tl.int64) * stride_qn + d[None, :]
        q = tl.load(q_at, mask=is_row[:, None], other=0.0)
        x = q.to(tl.float32)
        mean = tl.math.div_rn(tl.sum(x, 0), tl.broadcast_to(tl.minimum(n - tile * 64, 64).to(tl.float32), (D,)))
        x = tl.where(is_row[:, None], x - mean[None, :], 0.0)
        peak = tl.max(tl.abs(x), 1)
        if not TOKEN_SCALES:
            shared = tl.max(tl.reshape(peak, (4, 2, 8)), 1)
            peak = tl.reshape(tl.broadcast_to(shared[:, None, :], (4, 2, 8)), (64,))
        unit = tl.math.div_rn(tl.maximum(peak, 1e-20), top)
        codes = _rounded(tl.math.div_rn(x, tl.broadcast_to(unit[:, None], (64, D))))

        kv_head = head // group
        base = k_ptr + batch * stride_kb + kv_head * stride_kh
        position, step = row + past, tl.arange(0, STEP)
        high = tl.full((64,), float("-inf"), tl.float32)
        total = tl.zeros((64,), tl.float32)
        scale_log2 = scale * 1.4426950408889634
        for key0 in range(0, sink, STEP):
            key = key0 + step
            allowed = (key < sink)[None, :]
            high, total = _exp_sums(q, base, stride_kn, key, sink, allowed, d, scale_log2, high, total)
        for key0 in range(start, tl.minimum(first + 64, n + past), STEP):
            key = key0 + step  # a row past the end may "see" keys past the end too: its score is -inf
            allowed = key[None, :] <= position[:, None]
            high, total = _exp_sums(q, base, stride_kn, key, n + past, allowed, d, scale_log2, high, total)
        known = (high + tl.math.log2(total)) * 0.6931471805599453

        shift = tl.load(shift_ptr + (batch * kv_heads + kv_head) * D + d)
        offset = tl.sum(x * shift[None, :], 1) * scale - known
        units = tiles * group
        at = (batch * kv_heads + kv_head) * units + tile * group + head % group
        out = at * 64 + tl.arange(0, 64)
        tl.store(codes_ptr + out[:, None] * D + d[None, :], codes.to(tl.int8))
        tl.store(scales_ptr + out, unit * scale)
        tl.store(offsets_ptr + out, tl.where(is_row, offset, float("-inf")))
        coarse = mean.to(means_ptr.dtype.element_ty)
        tl.store(means_ptr + at * 2 * D + d, coarse)
        tl.store(means_ptr + (at * 2 + 1) * D + d, (mean - coarse.to(tl.float32)).to(means_ptr.dtype.element_ty))


def code_keys(k: Tensor, shift: Tensor, count: int, *, bits: int, token_scales: bool) -> KeyCodes:
    """Codes of the first `count` keys less shift.

    Args:
        k: [B, Hkv, M, D], innermost stride 1. shift: [B, Hkv, 1, D] float32. count: at most M, a multiple of 32.
        bits: 2 to 8; a code has bits - 1 of them and a sign. token_scales: a scale for each key.

    Returns:
        count rounded up to CODE_KEYS; the keys past M are 0, those past count are coded as the others are.
    """
    batch, heads, m, d = k.shape
    coded = triton.cdiv(count, CODE_KEYS) * CODE_KEYS
    codes = torch.empty(batch, heads, coded, d, dtype=torch.int8, device=k.device)
    scales = torch.empty(batch, heads, coded, dtype=torch.float32, device=k.device)
    key_codes_kernel[(coded // BLOCK_K, batch * heads)](
        k, shift.contiguous(), codes, scales, *k.stride()[:3], m, coded, heads, float(2 ** (bits - 1) - 1),
        D=d, TOKEN_SCALES=token_scales, num_warps=4,
    )  # fmt: skip
    return KeyCodes(codes, scales)


def code_rows(
    q: Tensor, k: Tensor, shift: Tensor, known: Known, *, scale: float, bits: int, token_scales: bool
) -> RowCodes:  # fmt: skip
    """Codes, offsets and means of all query tiles. Args: as `code_keys`; q [B, Hq, N, D], innermost stride 1."""
    batch, hq, n, d = q.shape
    hkv, tiles = k.shape[1], -(-n // BLOCK_Q)
    group = hq // hkv
    shape = (batch, hkv, tiles * group, BLOCK_Q)
    codes = torch.empty(*shape, d, dtype=torch.int8, device=q.device)
    scales, offsets = (torch.zeros(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    means = torch.zeros(*shape[:3], 2, d, dtype=q.dtype, device=q.device)
    row_codes_kernel[(tiles, batch * hq)](
        q, k, shift.contiguous(), codes, scales, offsets, means, *q.stride()[:3], *k.stride()[:3],
        n, k.shape[2] - n, tiles, hkv, group, known.sink, known.local, known.segment, known.dense_below,
        float(2 ** (bits - 1) - 1), scale,
        D=d, STEP=32 if d == 256 else 64, TOKEN_SCALES=token_scales, num_warps=4 if d <= 128 else 8, num_stages=2,
    )  # fmt: skip
    return RowCodes(codes, scales, offsets, means)
