"""Tile attention in Triton: the forward pass over a plan's tile lists. Importing this module imports triton.

`tile_attention` is the one way in. 16-bit calls on compute capability 9.0 run in `hopper_kernel`, everything else here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.kernels.tile_attention import hopper
from winnow.workers.attention.kernels.tile_attention.pseudo_keys import pseudo_keys
from winnow.workers.attention.lowering import lower
from winnow.workers.attention.plan import TilePlan

_LOG2_E = 1.4426950408889634


@triton.jit
def _step(
    acc, top, total, q, k_base, v_base, key, loaded, allowed, bias, d_idx, stride_kn, stride_vn, scale_log2,
    HEAD_SIZE: tl.constexpr, LOADED: tl.constexpr, ALLOWED: tl.constexpr, BIASED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) over the keys [STEP]; rows without a key so far keep top = -inf.

    With LOADED only keys set in loaded [STEP] exist; with ALLOWED only pairs set in allowed are read; with BIASED bias is added.
    """
    inside = (d_idx < HEAD_SIZE)[None, :]
    if LOADED:
        inside = inside & loaded[:, None]
    k = tl.load(k_base + key[:, None] * stride_kn + d_idx[None, :], mask=inside, other=0.0)
    v = tl.load(v_base + key[:, None] * stride_vn + d_idx[None, :], mask=inside, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if BIASED:
        logits = logits + bias
    if ALLOWED:
        logits = tl.where(allowed, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf is nan
    weights = tl.math.exp2(logits - shift[:, None])
    decay = tl.math.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def tile_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, full_offsets, full_ids, partial_offsets, partial_ids, sink_ptr, recent_ptr,
    intervals_ptr, column_offsets, column_ids, pooled_k_ptr, pooled_v_ptr, pooled_weights,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, n_rows, n_keys, n_q_heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch, n_q_tiles,
    scale_log2,
    HEAD_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    UPCAST: tl.constexpr, STREAMS: tl.constexpr, INTERVALS: tl.constexpr, COLUMNS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """One program owns one query tile of one query head: out and lse of its rows, nothing else.

        o_i = sum_j exp(l_ij - lse_i) v_j,  l_ij = scale q_i . k_j,  over the pairs of the lists

    The lists are full tiles, partial tiles (with the masks of `Lowered`), with COLUMNS single keys, and with POOLED the
    pseudo-keys [B, Hkv, M // Bk, D], contiguous, of the tiles whose weight [B * Hm * nQ, M // Bk] is not -inf.
    Grid: (nQ, B * Hq), query tiles from the last, which are the heaviest under a causal plan.
    Reads per program: 4 D Bq bytes of q and out (16-bit), 4 D bytes per key of a listed tile or single key and 4 bytes per
    listed id; with POOLED 4 D + 4 bytes per key tile before its rows. Writes out once.
    Numerics: logits and sums in float32, base 2; weights are rounded to v's dtype for the second product. Offsets in 64 bit.
    """
    q_tile = n_q_tiles - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // n_q_heads).to(tl.int64)
    head = (tl.program_id(1) % n_q_heads).to(tl.int64)
    mask_head = tl.minimum(batch, plan_batch - 1) * mask_heads + head // heads_per_mask
    row_of_lists = mask_head * n_q_tiles + q_tile

    row = q_tile.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    position = row + (n_keys - n_rows)
    if STREAMS:
        sink = tl.load(sink_ptr + mask_head)
        recent = tl.load(recent_ptr + mask_head)
    if INTERVALS:
        lo = tl.load(intervals_ptr + (mask_head * n_rows + row) * 2, mask=row < n_rows, other=0)
        hi = tl.load(intervals_ptr + (mask_head * n_rows + row) * 2 + 1, mask=row < n_rows, other=0)
    d_idx = tl.arange(0, D)
    step_idx = tl.arange(0, STEP).to(tl.int64)
    valid = (row < n_rows)[:, None] & (d_idx < HEAD_SIZE)[None, :]
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + row[:, None] * stride_qn + d_idx[None, :], mask=valid, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    kv_head = head // heads_per_kv
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh

    acc = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_K // STEP
    first = tl.load(full_offsets + row_of_lists)
    steps = (tl.load(full_offsets + row_of_lists + 1) - first).to(tl.int32) * STEPS
    for i in range(steps):  # a full tile lies inside the keys and is read by every row
        key = tl.load(full_ids + first + i // STEPS).to(tl.int64) * BLOCK_K + (i % STEPS) * STEP + step_idx
        acc, top, total = _step(
            acc, top, total, q, k_base, v_base, key, 0, 0, 0, d_idx, stride_kn, stride_vn, scale_log2,
            HEAD_SIZE, False, False, False, UPCAST,
        )  # fmt: skip
    if COLUMNS:
        first = tl.load(column_offsets + row_of_lists)
        count = (tl.load(column_offsets + row_of_lists + 1) - first).to(tl.int32)
        for i in range(tl.cdiv(count, STEP)):
            listed = i * STEP + step_idx < count
            key = tl.load(column_ids + first + i * STEP + step_idx, mask=listed, other=0).to(tl.int64)
            acc, top, total = _step(
                acc, top, total, q, k_base, v_base, key, listed, listed[None, :], 0, d_idx, stride_kn, stride_vn, scale_log2,
                HEAD_SIZE, True, True, False, UPCAST,
            )  # fmt: skip
    if POOLED:
        n_tiles = n_keys // BLOCK_K
        seen = (q_tile * BLOCK_Q + (n_keys - n_rows) + 1) // BLOCK_K  # full tiles: only those can have been left out
        pooled_at = (batch * (n_q_heads // heads_per_kv) + kv_head) * n_tiles * HEAD_SIZE
        for i in range(tl.cdiv(seen, STEP)):
            tile = i * STEP + step_idx
            exists = tile < seen
            weight = tl.load(pooled_weights + row_of_lists * n_tiles + tile, mask=exists, other=float("-inf"))
            acc, top, total = _step(
                acc, top, total, q, pooled_k_ptr + pooled_at, pooled_v_ptr + pooled_at, tile, exists, 0, weight[None, :], d_idx,
                HEAD_SIZE, HEAD_SIZE, scale_log2, HEAD_SIZE, True, False, True, UPCAST,
            )  # fmt: skip
    first = tl.load(partial_offsets + row_of_lists)
    steps = (tl.load(partial_offsets + row_of_lists + 1) - first).to(tl.int32) * STEPS
    for i in range(steps):  # a partial tile may hang over the end of the keys
        key = tl.load(partial_ids + first + i // STEPS).to(tl.int64) * BLOCK_K + (i % STEPS) * STEP + step_idx
        allowed = key[None, :] <= position[:, None]
        if STREAMS:
            allowed = allowed & ((key < sink)[None, :] | (key[None, :] > position[:, None] - recent))
        if INTERVALS:
            allowed = allowed & (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        acc, top, total = _step(
            acc, top, total, q, k_base, v_base, key, key < n_keys, allowed, 0, d_idx, stride_kn, stride_vn, scale_log2,
            HEAD_SIZE, True, True, False, UPCAST,
        )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    out_at = out_ptr + batch * stride_ob + head * stride_oh + row[:, None] * stride_on + d_idx[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * n_rows + row, lse, mask=row < n_rows)


@dataclass(frozen=True)
class Launch:
    """Compile-time choices for one kind of call."""

    head_size: int
    padded_size: int
    block_q: int
    block_k: int
    step: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, dtype: torch.dtype, head_size: int, block_q: int, block_k: int) -> Launch:
        """Sizes that fit the shared memory and registers of compute capability 8.0 and up.

        Raises:
            Unsupported: tiles that are no power of two in 16..128, or heads above 256.
        """
        if reason := why_not(head_size, block_q, block_k):
            raise Unsupported(f"tile attention: {reason}")
        padded = max(16, triton.next_power_of_2(head_size))
        wide = dtype == torch.float32
        step = min(block_k, (64 if padded <= 64 else 32 if padded <= 128 else 16) if wide else (64 if padded <= 128 else 32))
        return cls(head_size, padded, block_q, block_k, step, 8 if wide or padded > 128 else 4, 1 if wide else 2)

    def constants(
        self, *, upcast: bool = False, streams: bool = False, intervals: bool = False, columns: bool = False, pooled: bool = False
    ) -> dict[str, Any]:
        """The kernel's constexpr arguments."""
        return {
            "HEAD_SIZE": self.head_size,
            "D": self.padded_size,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "STEP": self.step,
            "UPCAST": upcast,
            "STREAMS": streams,
            "INTERVALS": intervals,
            "COLUMNS": columns,
            "POOLED": pooled,
        }


def why_not(head_size: int, block_q: int, block_k: int) -> str:
    """Why the kernel cannot run these sizes; "" if it can."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in (16, 32, 64, 128):
            return f"{name} must be 16, 32, 64 or 128, got {size}"
    return f"head size must be at most 256, got {head_size}" if head_size > 256 else ""


def tile_attention(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `tile_attention_kernel`: everything a plan says except its residual, mean correction included.

    Args:
        plan: on q's device, heads of any class.
        q: [B, Hq, N, D]; k, v: [B, Hkv, M, D]; float32, float16 or bfloat16; copied only if their innermost stride is not 1.
        out, lse: where to write: [B, Hq, N, D] of q's dtype with innermost stride 1, and [B, Hq, N] float32 contiguous.
            Every element is written. None = allocated.

    Returns:
        (out, lse).

    Raises:
        Unsupported: tile or head sizes the kernel is not made for; bfloat16 in Triton's interpreter, whose results are wrong.
    """
    interpreted = not isinstance(tile_attention_kernel, triton.JITFunction)
    if interpreted and q.dtype == torch.bfloat16:
        raise Unsupported("tile attention: Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")
    choice = Launch.choose(q.dtype, q.shape[3], plan.block_q, plan.block_k)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse is None else lse
    lists, columns = lower(plan), plan.token_columns
    if (
        not interpreted
        and hopper.takes(plan, q, scale=scale)
        and hopper.launch(plan, lists, q, k, v, scale=scale, out=out, lse=lse)
    ):
        return out, lse
    pooled_k, pooled_v, weights = pseudo_keys(plan, k, v) if plan.mean_correction else (k, v, lse)
    unused = lists.full
    b, hq, n, _ = q.shape
    constants = choice.constants(
        upcast=interpreted,
        streams=lists.sink is not None,
        intervals=lists.intervals is not None,
        columns=columns is not None,
        pooled=plan.mean_correction,
    )
    tile_attention_kernel[(plan.n_q_tiles, b * hq)](
        q, k, v, out, lse,
        lists.full.offsets, lists.full.ids, lists.partial.offsets, lists.partial.ids,
        unused.ids if lists.sink is None else lists.sink, unused.ids if lists.recent is None else lists.recent,
        unused.ids if lists.intervals is None else lists.intervals,
        (columns or unused).offsets, (columns or unused).ids, pooled_k, pooled_v, weights,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        n, k.shape[2], hq, hq // k.shape[1], hq // plan.mask_heads, plan.mask_heads, plan.batch, plan.n_q_tiles,
        scale * _LOG2_E,
        **constants, num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
    return out, lse
