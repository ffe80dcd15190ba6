"""Tile attention in Triton: the forward pass over a plan's tile lists. Importing this module imports triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.lowering import lower
from winnow.workers.attention.plan import TilePlan


@triton.jit
def _step(
    acc, top, total, q, k_base, v_base, key0, position, d_idx, sink, recent, n_keys, stride_kn, stride_vn, scale_log2,
    HEAD_SIZE: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax (Milakov and Gimelshein 2018) over STEP keys from key0 on; rows without a key so far keep top = -inf."""
    key = key0 + tl.arange(0, STEP).to(tl.int64)
    inside = (d_idx < HEAD_SIZE)[None, :]
    if MASKED:  # a full tile lies inside the keys, a partial one may hang over their end
        inside = inside & (key < n_keys)[:, None]
    k = tl.load(k_base + key[:, None] * stride_kn + d_idx[None, :], mask=inside, other=0.0)
    v = tl.load(v_base + key[:, None] * stride_vn + d_idx[None, :], mask=inside, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        allowed = (key[None, :] <= position[:, None]) & ((key < sink)[None, :] | (key[None, :] > position[:, None] - recent))
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
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, n_rows, n_keys, n_q_heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch, n_q_tiles,
    scale_log2,
    HEAD_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program owns one query tile of one query head: out and lse of its rows, nothing else.

        o_i = sum_j exp(l_ij - lse_i) v_j,  l_ij = scale q_i . k_j,  over the pairs of the lists

    Grid: (nQ, B * Hq), query tiles from the last, which are the heaviest under a causal plan.
    Reads per program: 4 D Bq bytes of q and out (16-bit), 4 D Bk bytes per listed tile, 4 bytes of its id. Writes out once.
    Numerics: logits and sums in float32, base 2; weights are rounded to v's dtype for the second product. Offsets in 64 bit.
    """
    q_tile = n_q_tiles - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // n_q_heads).to(tl.int64)
    head = (tl.program_id(1) % n_q_heads).to(tl.int64)
    mask_head = tl.minimum(batch, plan_batch - 1) * mask_heads + head // heads_per_mask
    row_of_lists = mask_head * n_q_tiles + q_tile
    sink = tl.load(sink_ptr + mask_head)
    recent = tl.load(recent_ptr + mask_head)

    row = q_tile.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    position = row + (n_keys - n_rows)
    d_idx = tl.arange(0, D)
    valid = (row < n_rows)[:, None] & (d_idx < HEAD_SIZE)[None, :]
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + row[:, None] * stride_qn + d_idx[None, :], mask=valid, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + batch * stride_kb + (head // heads_per_kv) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // heads_per_kv) * stride_vh

    acc = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_K // STEP
    first = tl.load(full_offsets + row_of_lists)
    steps = (tl.load(full_offsets + row_of_lists + 1) - first).to(tl.int32) * STEPS
    for i in range(steps):
        tile = tl.load(full_ids + first + i // STEPS).to(tl.int64)
        key0 = tile * BLOCK_K + (i % STEPS) * STEP
        acc, top, total = _step(
            acc, top, total, q, k_base, v_base, key0, position, d_idx, sink, recent, n_keys, stride_kn, stride_vn, scale_log2,
            HEAD_SIZE, STEP, False, UPCAST,
        )  # fmt: skip
    first = tl.load(partial_offsets + row_of_lists)
    steps = (tl.load(partial_offsets + row_of_lists + 1) - first).to(tl.int32) * STEPS
    for i in range(steps):
        tile = tl.load(partial_ids + first + i // STEPS).to(tl.int64)
        key0 = tile * BLOCK_K + (i % STEPS) * STEP
        acc, top, total = _step(
            acc, top, total, q, k_base, v_base, key0, position, d_idx, sink, recent, n_keys, stride_kn, stride_vn, scale_log2,
            HEAD_SIZE, STEP, True, UPCAST,
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
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            if size not in (16, 32, 64, 128):
                raise Unsupported(f"tile attention: {name} must be 16, 32, 64 or 128, got {size}")
        if head_size > 256:
            raise Unsupported(f"tile attention: head size must be at most 256, got {head_size}")
        padded = max(16, triton.next_power_of_2(head_size))
        wide = dtype == torch.float32
        step = min(block_k, (64 if padded <= 64 else 32 if padded <= 128 else 16) if wide else (64 if padded <= 128 else 32))
        return cls(head_size, padded, block_q, block_k, step, 8 if wide or padded > 128 else 4, 1 if wide else 2)

    def constants(self, *, upcast: bool) -> dict[str, Any]:
        """The kernel's constexpr arguments."""
        return {
            "HEAD_SIZE": self.head_size,
            "D": self.padded_size,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "STEP": self.step,
            "UPCAST": upcast,
        }


def tile_attention(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch `tile_attention_kernel`.

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
    launch = Launch.choose(q.dtype, q.shape[3], plan.block_q, plan.block_k)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse is None else lse
    lists = lower(plan)
    b, hq, n, _ = q.shape
    tile_attention_kernel[(plan.n_q_tiles, b * hq)](
        q, k, v, out, lse,
        lists.full.offsets, lists.full.ids, lists.partial.offsets, lists.partial.ids,
        lists.sink.contiguous(), lists.recent.contiguous(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        n, k.shape[2], hq, hq // k.shape[1], hq // plan.mask_heads, plan.mask_heads, plan.batch, plan.n_q_tiles,
        scale * 1.4426950408889634,
        **launch.constants(upcast=interpreted), num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse
