"""Attention of sorted rows over the keys of their bucket and over sampled ones, in Triton. Imports triton.

`gray_ranks` says where tokens stand in the order; `attend_buckets` reads rows and keys through the sorted lists, so that no
sorted copy of q, k or v is made and no logit leaves the chip. For `prefill.hyper_squares`, whose torch path is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.workers.attention.kernels.tile_scores import fits

__all__ = ["attend_buckets", "fits", "gray_ranks"]

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["tokens"])  # else new lengths would be compiled anew
def gray_ranks_kernel(
    x_ptr, terms_ptr, out_ptr, stride_b, stride_h, stride_t, tokens, heads, levels, bits, group,
    D: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[level, b, h, t] = the Gray-code rank of the signs of x_t on the level's directions, the first one's the highest bit.

    Directions are sums of TERMS [levels, TERMS, H, WIDTH, D] in x's dtype, as exact as float32. group: heads of x for each of
    theirs. One program: BLOCK tokens of one head, read once. Grid: (tokens / BLOCK, B * heads).
    """
    token, d, bit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, WIDTH)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = x_ptr + batch * stride_b + head * stride_h + token[:, None].to(tl.int64) * stride_t + d[None, :]
    x = tl.load(at, mask=(token < tokens)[:, None], other=0.0)
    of_terms = tl.cdiv(heads, group)
    for level in range(levels):
        acc = tl.zeros((BLOCK, WIDTH), tl.float32)
        for term in tl.static_range(TERMS):
            row = ((level * TERMS + term) * of_terms + head // group) * WIDTH + bit
            part = tl.load(terms_ptr + row[:, None] * D + d[None, :])
            acc = tl.dot(x, tl.trans(part), acc, input_precision="ieee")
        signs = ((acc > 0.0) & (bit < bits)[None, :]).to(tl.int32)
        parity = tl.cumsum(signs, 1) & 1
        rank = tl.sum(tl.where((bit < bits)[None, :], parity << tl.maximum(bits - 1 - bit, 0)[None, :], 0), 1)
        out = (tl.cast(level, tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tokens + token
        tl.store(out_ptr + out, rank, mask=token < tokens)


def gray_ranks(x: Tensor, directions: Tensor) -> Tensor:
    """Ranks of all tokens for all levels.

    Args:
        x: [B, H, T, D], innermost stride 1. directions: [levels, H' , D, bits] float32, H' = 1 or a divisor of H.

    Returns:
        [levels, B, H, T] int32; as `hyper_squares.gray_rank`, but for signs of sums that are 0 up to rounding.
    """
    batch, heads, tokens, d = x.shape
    levels, own, _, bits = directions.shape
    width = 16 if bits <= 16 else 32
    rest = torch.nn.functional.pad(directions.to(x.device).transpose(-1, -2), (0, 0, 0, width - bits))
    terms = []
    for _ in range(1 if x.dtype == torch.float32 else 3):  # 24 bits in parts of 8 or 11
        terms.append(rest.to(x.dtype))
        rest = rest - terms[-1].float()
    out = torch.empty(levels, batch, heads, tokens, dtype=torch.int32, device=x.device)
    gray_ranks_kernel[(triton.cdiv(tokens, 128), batch * heads)](
        x, torch.stack(terms, 1).contiguous(), out, *x.stride()[:3], tokens, heads, levels, bits, heads // own,
        D=d, WIDTH=width, TERMS=len(terms), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _add_keys(acc, top, total, q, k_base, v_base, key, allowed, bias, d, stride_kn, stride_vn, scale_log2):
    """Online softmax over keys [STEP], -1 = none, of the pairs in allowed [rows or 1, STEP]; bias is added to logits, base 2."""
    real = (key >= 0)[:, None]
    at = tl.maximum(key, 0)[:, None].to(tl.int64)
    k = tl.load(k_base + at * stride_kn + d[None, :], mask=real, other=0.0)
    v = tl.load(v_base + at * stride_vn + d[None, :], mask=real, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 + bias
    logits = tl.where(allowed, logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.math.exp2(logits - shift[:, None])
    decay = tl.math.exp2(top - shift)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, higher, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["n", "squares", "slots"])  # else new lengths would be compiled anew
def bucket_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, keys_ptr, picks_ptr, pick_blocks_ptr, bias_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    n, squares, slots, width, samples, heads, group, scale_log2,
    D: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """BLOCK_R sorted rows of one bucket of one head over that bucket's keys and the picks of other buckets.

        lse = log(exp(lse before) + sum over the bucket's keys exp(l) + exp(bias) sum over picks exp(l)),   out alike

    Lists: rows [B, Hq, squares, slots], keys [B, Hkv, squares, slots], picks and their buckets [B, Hkv, squares, samples], all
    int32 with -1 = none. out [B, Hq, N, D] and lse [B, Hq, N] float32 hold what earlier calls found and are updated.
    Grid: (squares * buckets * (width / BLOCK_R), B * Hq). Reads q, out once, 4 D bytes per listed key (16-bit).
    Numerics: products in the inputs' dtype, sums in float32.
    """
    parts = tl.cdiv(width, BLOCK_R)
    buckets = slots // width
    square = tl.program_id(0) // (buckets * parts)
    bucket = tl.program_id(0) // parts % buckets
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv = (batch * (heads // group) + head // group) * squares + square
    place = tl.program_id(0) % parts * BLOCK_R + tl.arange(0, BLOCK_R)
    of_rows = (tl.program_id(1).to(tl.int64) * squares + square) * slots + bucket * width
    row = tl.load(rows_ptr + of_rows + place, mask=place < width, other=-1)
    if tl.max(row, 0) >= 0:
        used = row >= 0
        at = tl.maximum(row, 0).to(tl.int64)
        d, step = tl.arange(0, D), tl.arange(0, STEP)
        q_at = q_ptr + batch * stride_qb + head * stride_qh + at[:, None] * stride_qn + d[None, :]
        q = tl.load(q_at, mask=used[:, None], other=0.0)
        k_base = k_ptr + batch * stride_kb + (head // group) * stride_kh
        v_base = v_ptr + batch * stride_vb + (head // group) * stride_vh
        acc = tl.zeros((BLOCK_R, D), tl.float32)
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, width, STEP):
            key = tl.load(keys_ptr + kv * slots + bucket * width + start + step, mask=start + step < width, other=-1)
            acc, top, total = _add_keys(
                acc, top, total, q, k_base, v_base, key, (key >= 0)[None, :], 0.0, d, stride_kn, stride_vn, scale_log2
            )
        bias = tl.load(bias_ptr + square)
        for start in range(0, samples, STEP):
            inside = start + step < samples
            key = tl.load(picks_ptr + kv * samples + start + step, mask=inside, other=-1)
            own = tl.load(pick_blocks_ptr + kv * samples + start + step, mask=inside, other=-1)
            key = tl.where((own >= 0) & (own != bucket), key, -1)
            acc, top, total = _add_keys(
                acc, top, total, q, k_base, v_base, key, (key >= 0)[None, :], bias, d, stride_kn, stride_vn, scale_log2
            )
        own_row = tl.program_id(1).to(tl.int64) * n + at
        before = tl.load(lse_ptr + own_row, mask=used, other=float("-inf")) * 1.4426950408889634
        out_at = out_ptr + own_row[:, None] * D + d[None, :]
        old = tl.load(out_at, mask=used[:, None], other=0.0)
        high = tl.maximum(before, top)
        shift = tl.where(high == float("-inf"), 0.0, high)
        old_weight, weight = tl.math.exp2(before - shift), tl.math.exp2(top - shift)
        whole = old_weight + total * weight
        some = tl.where(whole == 0.0, 1.0, whole)
        merged = (old * old_weight[:, None] + acc * weight[:, None]) / some[:, None]
        lse = tl.where(whole == 0.0, float("-inf"), (shift + tl.math.log2(some)) * 0.6931471805599453)
        tl.store(out_at, merged, mask=used[:, None])
        tl.store(lse_ptr + own_row, lse, mask=used)


def attend_buckets(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, rows: Tensor, keys: Tensor, picks: Tensor, pick_buckets: Tensor,
    bias: Tensor, width: int, scale: float,
) -> None:  # fmt: skip
    """Merge into out and lse what sorted rows get from their buckets and from picks.

    Args:
        q: [B, Hq, N, D], k, v: [B, Hkv, M, D], innermost strides 1, for which `fits` is true (float32 in the tests).
        out: [B, Hq, N, D] and lse: [B, Hq, N], float32, contiguous, mutated; lse -inf = nothing yet, and out finite there.
        rows: [B, Hq, squares, slots], keys: [B, Hkv, squares, slots], int32, -1 = none, a row in at most one slot; slots are
            whole buckets of `width`.
        picks, pick_buckets: [B, Hkv, squares, S] int32: sampled keys and the bucket of their square that holds them, -1 = a
            pick that does not count. Rows of that bucket do not take it.
        bias: [squares] float32, added to the logits of picks.
    """
    batch, hq, n, d = q.shape
    squares, slots = rows.shape[2:]
    block_r = min(64 if d == 256 else 128, max(16, triton.next_power_of_2(width)))
    grid = (squares * (slots // width) * triton.cdiv(width, block_r), batch * hq)
    rows, keys, picks, pick_buckets = (x.to(torch.int32).contiguous() for x in (rows, keys, picks, pick_buckets))
    bucket_attention_kernel[grid](
        q, k, v, out, lse, rows, keys, picks, pick_buckets, bias * _LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        n, squares, slots, width, picks.shape[3], hq, hq // k.shape[1], scale * _LOG2_E,
        D=d, BLOCK_R=block_r, STEP=32 if d == 256 else 64, num_warps=8 if block_r * d >= 128 * 128 else 4, num_stages=2,
    )  # fmt: skip
