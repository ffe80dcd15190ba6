"""Attention of single rows over keys listed one by one, in Triton. Imports triton.

For plans in tiles of 1 x 1, whose rows share nothing that a matrix instruction could use: what costs is reading 4 D bytes a key
(16-bit), from the cache, so one warp takes one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.workers.attention.plan import HeadClass, TilePlan

_LOG2_E = 1.4426950408889634


@triton.jit
def _add_listed(
    acc, top, total, q, ids_ptr, first, count, k_base, v_base, stride_kn, stride_vn, least, scale, softcap, step, d, inside_d,
    SOFTCAP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Online softmax of one row, natural, over the listed keys from least on."""
    for start in range(0, count, STEP):
        listed = start + step < count
        key = tl.load(ids_ptr + first + start + step, mask=listed, other=-1)
        listed = listed & (key >= least)
        at = tl.where(listed, key, 0)[:, None].to(tl.int64)
        real = listed[:, None] & inside_d
        k = tl.load(k_base + at * stride_kn + d[None, :], mask=real, other=0.0).to(tl.float32)
        v = tl.load(v_base + at * stride_vn + d[None, :], mask=real, other=0.0).to(tl.float32)
        logits = tl.sum(k * q[None, :], 1) * scale
        if SOFTCAP:
            logits = (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0) * softcap  # tanh
        logits = tl.where(listed, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - shift)
        decay = tl.exp(top - shift)
        acc = acc * decay + tl.sum(weights[:, None] * v, 0)
        total = total * decay + tl.sum(weights, 0)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["n", "past", "plan_batch"])  # else new lengths would be compiled anew
def row_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_offsets, tile_ids, column_offsets, column_ids,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    n, past, heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch, window, scale, softcap,
    HEAD_SIZE: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out[b, h, i] = sum over the row's keys of exp(l_ij - lse_i) v_j; out contiguous in q's dtype, lse float32.

    One program: one row of one query head. Grid: (N, B * Hq). Reads 4 D bytes and an id per key (16-bit). float32 inside.
    """
    row = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    lists = (tl.minimum(batch, plan_batch - 1) * mask_heads + head // heads_per_mask) * n + row
    step, d = tl.arange(0, STEP), tl.arange(0, D)
    inside_d = (d < HEAD_SIZE)[None, :]
    q_at = q_ptr + batch * stride_qb + head * stride_qh + row.to(tl.int64) * stride_qn + d
    q = tl.load(q_at, mask=d < HEAD_SIZE, other=0.0).to(tl.float32)
    k_base = k_ptr + batch * stride_kb + (head // heads_per_kv) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // heads_per_kv) * stride_vh
    least = 0
    if WINDOW:
        least = row + past - window + 1
    acc = tl.zeros((D,), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    first = tl.load(tile_offsets + lists)
    count = (tl.load(tile_offsets + lists + 1) - first).to(tl.int32)
    acc, top, total = _add_listed(
        acc, top, total, q, tile_ids, first, count, k_base, v_base, stride_kn, stride_vn, least, scale, softcap, step, d,
        inside_d, SOFTCAP, STEP,
    )  # fmt: skip
    if COLUMNS:
        first = tl.load(column_offsets + lists)
        count = (tl.load(column_offsets + lists + 1) - first).to(tl.int32)
        acc, top, total = _add_listed(
            acc, top, total, q, column_ids, first, count, k_base, v_base, stride_kn, stride_vn, least, scale, softcap, step, d,
            inside_d, SOFTCAP, STEP,
        )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(some))
    at = tl.program_id(1).to(tl.int64) * n + row
    tl.store(out_ptr + at * HEAD_SIZE + d, (acc / some).to(out_ptr.dtype.element_ty), mask=d < HEAD_SIZE)
    tl.store(lse_ptr + at, lse)


def fits(plan: TilePlan, q: Tensor) -> bool:
    """Whether `row_attention` runs this plan: tiles of one key and one row, no head of another class, on CUDA."""
    single = plan.block_q == plan.block_k == 1 and plan.kinds == {HeadClass.CSR}
    return q.is_cuda and single and not plan.mean_correction and q.shape[3] <= 256


def row_attention(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """What a plan for which `fits` is true reads, its residual apart.

    Args and returns: as `attend_plan`. Any float dtype. Does not wait for the device.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, hq, n, d = q.shape
    out = torch.empty(b, hq, n, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, hq, n, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(d))
    columns = plan.token_columns
    lists = plan.full if columns is None else columns
    row_attention_kernel[(n, b * hq)](
        q, k, v, out, lse, plan.full.offsets, plan.full.ids, lists.offsets, lists.ids,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        n, k.shape[2] - n, hq, hq // k.shape[1], hq // plan.mask_heads, plan.mask_heads, plan.batch, window, scale, softcap,
        HEAD_SIZE=d, D=padded, STEP=max(8, 2048 // padded), COLUMNS=columns is not None, WINDOW=window > 0, SOFTCAP=softcap > 0.0,
        num_warps=1 if padded <= 128 else 2,
    )  # fmt: skip
    return out, lse
