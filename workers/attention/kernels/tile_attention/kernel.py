"""Tile attention in Triton: the forward pass over a plan's tile lists. Importing this module imports triton.

`tile_attention` is the one way in for contiguous K and V: 16-bit calls on compute capability 9.0 run in `hopper_kernel`,
everything else here. Paged and float8 K and V and packs of sequences come in through `stored` and always run here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.kernels.tile_attention import hopper
from winnow.workers.attention.kernels.tile_attention.launch import Launch, Work, why_not
from winnow.workers.attention.kernels.tile_attention.online_softmax import pages, step
from winnow.workers.attention.kernels.tile_attention.pseudo_keys import pseudo_keys
from winnow.workers.attention.lowering import lower
from winnow.workers.attention.plan import TilePlan

__all__ = ["Launch", "Work", "run", "tile_attention", "tile_attention_kernel", "why_not"]

_LOG2_E = 1.4426950408889634


@triton.jit
def tile_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, full_offsets, full_ids, partial_offsets, partial_ids, sink_ptr, recent_ptr,
    intervals_ptr, column_offsets, column_ids, pooled_k_ptr, pooled_v_ptr, pooled_weights,
    page_table, k_scale_ptr, v_scale_ptr, items_ptr, sequences_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_tb, n_rows, n_keys, n_q_heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch,
    n_q_tiles, scale_log2,
    HEAD_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    UPCAST: tl.constexpr, STREAMS: tl.constexpr, INTERVALS: tl.constexpr, COLUMNS: tl.constexpr, POOLED: tl.constexpr,
    PAGE: tl.constexpr, FP8: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program owns one query tile of one query head: out and lse of its rows, nothing else.

        o_i = sum_j exp(l_ij - lse_i) v_j,  l_ij = scale q_i . k_j,  over the pairs of the lists

    The lists are full tiles, partial tiles (with the masks of `Lowered`), with COLUMNS single keys, and with POOLED the
    pseudo-keys [B, Hkv, M // Bk, D], contiguous, of the tiles whose weight [B * Hm * nQ, M // Bk] is not -inf.
    Grid: (nQ, B * Hq), query tiles from the last, which are the heaviest under a causal plan.

    With PAGE, K and V are [pages, Hkv, PAGE, D] and page_table [B, ...] int32 says which page holds keys x PAGE.. of a sequence.
    With FP8 they are float8, scaled by k_scale and v_scale [B, Hkv] float32: converted to q's dtype as they are (exact),
    k's scale goes into the logits' and v's into the output. Pseudo-keys are then means of the unscaled values.
    With PACKED sequences lie one behind another, q, K and V [tokens, H, D] and lse [Hq, tokens]; n_rows is the rows of all of
    them, a program's query tile items[program], and where its sequence's things are `sequences` says (see `Work`).
    Grid: (query tiles of all sequences, Hq).

    Reads per program: 4 D Bq bytes of q and out (16-bit), 4 D bytes (FP8: 2 D) per key of a listed tile or single key and
    4 bytes per listed id; with POOLED 4 D + 4 bytes per key tile before its rows. Writes out once.
    Numerics: logits and sums in float32, base 2; weights are rounded to q's dtype for the second product. Offsets in 64 bit.
    """
    if PACKED:
        batch = tl.load(items_ptr + tl.program_id(0) * 2).to(tl.int64)
        q_tile = tl.load(items_ptr + tl.program_id(0) * 2 + 1)
        head = tl.program_id(1).to(tl.int64)
        about = sequences_ptr + batch * 12
        lse_base = lse_ptr + head * n_rows + tl.load(about)
        q_base = q_ptr + tl.load(about) * stride_qn + head * stride_qh
        out_base = out_ptr + tl.load(about) * stride_on + head * stride_oh
        k_base = k_ptr
        v_base = v_ptr
        if not PAGE:
            k_base += tl.load(about + 1) * stride_kn
            v_base += tl.load(about + 1) * stride_vn
        n_rows = tl.load(about + 2)
        n_keys = tl.load(about + 3)
        n_q_tiles = tl.load(about + 4)
        own_mask_head = head // tl.load(about + 5)
        mask_head = tl.load(about + 6) + own_mask_head
        row_of_lists = tl.load(about + 7) + own_mask_head * n_q_tiles + q_tile
        first_interval = tl.load(about + 8) + own_mask_head * n_rows
        interval_rows = tl.where(tl.load(about + 8) >= 0, n_rows, 0)
    else:
        q_tile = n_q_tiles - 1 - tl.program_id(0)
        batch = (tl.program_id(1) // n_q_heads).to(tl.int64)
        head = (tl.program_id(1) % n_q_heads).to(tl.int64)
        mask_head = tl.minimum(batch, plan_batch - 1) * mask_heads + head // heads_per_mask
        row_of_lists = mask_head * n_q_tiles + q_tile
        first_interval = mask_head * n_rows
        interval_rows = n_rows
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        out_base = out_ptr + batch * stride_ob + head * stride_oh
        lse_base = lse_ptr + tl.program_id(1).to(tl.int64) * n_rows
        k_base = k_ptr
        v_base = v_ptr
        if not PAGE:
            k_base += batch * stride_kb
            v_base += batch * stride_vb

    row = q_tile.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    position = row + (n_keys - n_rows)
    if STREAMS:
        sink = tl.load(sink_ptr + mask_head)
        recent = tl.load(recent_ptr + mask_head)
    if INTERVALS:
        own = row < interval_rows
        lo = tl.load(intervals_ptr + (first_interval + row) * 2, mask=own, other=0)
        hi = tl.load(intervals_ptr + (first_interval + row) * 2 + 1, mask=own, other=0)
        if PACKED:
            hi = tl.where(own, hi, n_keys)  # a sequence without intervals: all keys
    d_idx = tl.arange(0, D)
    step_idx = tl.arange(0, STEP).to(tl.int64)
    valid = (row < n_rows)[:, None] & (d_idx < HEAD_SIZE)[None, :]
    q = tl.load(q_base + row[:, None] * stride_qn + d_idx[None, :], mask=valid, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    kv_head = head // heads_per_kv
    k_base += kv_head * stride_kh
    v_base += kv_head * stride_vh
    table = page_table
    if PAGE:
        table += batch * stride_tb
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scale_ptr + batch * (n_q_heads // heads_per_kv) + kv_head)

    acc = tl.zeros((BLOCK_Q, D), dtype=tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    STEPS: tl.constexpr = BLOCK_K // STEP
    first = tl.load(full_offsets + row_of_lists)
    steps = (tl.load(full_offsets + row_of_lists + 1) - first).to(tl.int32) * STEPS
    for i in range(steps):  # a full tile lies inside the keys and is read by every row
        start = tl.load(full_ids + first + i // STEPS).to(tl.int64) * BLOCK_K + (i % STEPS) * STEP
        key = start + step_idx
        acc, top, total = step(
            acc, top, total, q, k_base, v_base, key, pages(table, key, start, n_keys, PAGE, STEP), 0, 0, 0, d_idx,
            stride_kb, stride_kn, stride_vb, stride_vn, scale_log2, HEAD_SIZE, PAGE, False, False, False,
        )  # fmt: skip
    if COLUMNS:
        first = tl.load(column_offsets + row_of_lists)
        count = (tl.load(column_offsets + row_of_lists + 1) - first).to(tl.int32)
        for i in range(tl.cdiv(count, STEP)):
            listed = i * STEP + step_idx < count
            key = tl.load(column_ids + first + i * STEP + step_idx, mask=listed, other=0).to(tl.int64)
            page = 0
            if PAGE:
                page = tl.load(table + key // PAGE, mask=listed, other=0).to(tl.int64)
            acc, top, total = step(
                acc, top, total, q, k_base, v_base, key, page, listed, listed[None, :], 0, d_idx,
                stride_kb, stride_kn, stride_vb, stride_vn, scale_log2, HEAD_SIZE, PAGE, True, True, False,
            )  # fmt: skip
    if POOLED:
        n_tiles = n_keys // BLOCK_K
        seen = (q_tile * BLOCK_Q + (n_keys - n_rows) + 1) // BLOCK_K  # full tiles: only those can have been left out
        weights_at = pooled_weights + row_of_lists * n_tiles
        pooled_at = (batch * (n_q_heads // heads_per_kv) + kv_head) * n_tiles * HEAD_SIZE
        if PACKED:
            n_tiles = tl.load(about + 9)
            seen = tl.minimum(seen, n_tiles)
            weights_at = pooled_weights + tl.load(about + 11) + (own_mask_head * n_q_tiles + q_tile) * n_tiles
            pooled_at = (tl.load(about + 10) + kv_head * n_tiles) * HEAD_SIZE
        for i in range(tl.cdiv(seen, STEP)):
            tile = i * STEP + step_idx
            exists = tile < seen
            weight = tl.load(weights_at + tile, mask=exists, other=float("-inf"))
            acc, top, total = step(
                acc, top, total, q, pooled_k_ptr + pooled_at, pooled_v_ptr + pooled_at, tile, 0, exists, 0, weight[None, :],
                d_idx, 0, HEAD_SIZE, 0, HEAD_SIZE, scale_log2, HEAD_SIZE, 0, True, False, True,
            )  # fmt: skip
    first = tl.load(partial_offsets + row_of_lists)
    steps = (tl.load(partial_offsets + row_of_lists + 1) - first).to(tl.int32) * STEPS
    for i in range(steps):  # a partial tile may hang over the end of the keys
        start = tl.load(partial_ids + first + i // STEPS).to(tl.int64) * BLOCK_K + (i % STEPS) * STEP
        key = start + step_idx
        allowed = key[None, :] <= position[:, None]
        if STREAMS:
            allowed = allowed & ((key < sink)[None, :] | (key[None, :] > position[:, None] - recent))
        if INTERVALS:
            allowed = allowed & (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        acc, top, total = step(
            acc, top, total, q, k_base, v_base, key, pages(table, key, start, n_keys, PAGE, STEP), key < n_keys, allowed, 0,
            d_idx, stride_kb, stride_kn, stride_vb, stride_vn, scale_log2, HEAD_SIZE, PAGE, True, True, False,
        )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if FP8:
        acc = acc * tl.load(v_scale_ptr + batch * (n_q_heads // heads_per_kv) + kv_head)
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    out_at = out_base + row[:, None] * stride_on + d_idx[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(lse_base + row, lse, mask=row < n_rows)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel."""
    return not isinstance(tile_attention_kernel, triton.JITFunction)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise Unsupported for a q of this dtype where its results would be wrong."""
    if is_interpreted() and dtype == torch.bfloat16:
        raise Unsupported("tile attention: Triton's interpreter computes bfloat16 wrongly; use float32 or float16 there")


def run(
    work: Work, choice: Launch, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float,
    page_table: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Launch `tile_attention_kernel`; writes every element of out and lse that belongs to a row of `work`.

    Args:
        q, k, v, out: [B, H, ...] as the kernel wants them, innermost stride 1; in a pack q, out (and K and V) are
            [1, H, tokens, D].
        page_table: [B, pages] int32, rows of innermost stride 1. scales: of k and of v, [B, Hkv] float32 contiguous.
    """
    lists, columns = work.lists, work.columns
    unused = lists.full
    pooled_k, pooled_v, weights = work.pooled or (q, q, lse)
    k_scale, v_scale = scales or (None, None)
    constants = choice.constants(
        upcast=is_interpreted(),
        streams=lists.sink is not None,
        intervals=lists.intervals is not None,
        columns=columns is not None,
        pooled=work.pooled is not None,
        page=0 if page_table is None else k.shape[2],
        fp8=scales is not None,
        packed=work.items is not None,
    )
    tile_attention_kernel[work.grid](
        q, k, v, out, lse,
        lists.full.offsets, lists.full.ids, lists.partial.offsets, lists.partial.ids,
        unused.ids if lists.sink is None else lists.sink, unused.ids if lists.recent is None else lists.recent,
        unused.ids if lists.intervals is None else lists.intervals,
        (columns or unused).offsets, (columns or unused).ids, pooled_k, pooled_v, weights,
        page_table, k_scale, v_scale, work.items, work.sequences,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], 0 if page_table is None else page_table.stride(0),
        work.n_rows, work.n_keys, q.shape[1], q.shape[1] // k.shape[1], work.heads_per_mask, work.mask_heads, work.batch,
        work.n_q_tiles, scale * _LOG2_E,
        **constants, num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip


def tile_attention(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Everything a plan says except its residual, mean correction included, over contiguous K and V.

    Args:
        plan: on q's device, heads of any class.
        q: [B, Hq, N, D]; k, v: [B, Hkv, M, D]; float32, float16 or bfloat16; copied only if their innermost stride is not 1.
        out, lse: where to write: [B, Hq, N, D] of q's dtype with innermost stride 1, and [B, Hq, N] float32 contiguous.
            Every element is written. None = allocated, out with tokens before heads.

    Returns:
        (out, lse).

    Raises:
        Unsupported: tile or head sizes the kernel is not made for; bfloat16 in Triton's interpreter, whose results are wrong.
    """
    check_dtype(q.dtype)
    choice = Launch.choose(q.dtype, q.shape[3], plan.block_q, plan.block_k)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if out is None:  # what follows attention takes all heads of a token together
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse is None else lse
    lists = lower(plan)
    if (
        not is_interpreted()
        and hopper.takes(plan, q, out, scale=scale)
        and hopper.launch(plan, lists, q, k, v, scale=scale, out=out, lse=lse)
    ):
        return out, lse
    pooled = pseudo_keys(plan, k, v) if plan.mean_correction else None
    run(Work.of(plan, lists, q.shape[1], q.shape[0], pooled), choice, q, k, v, out, lse, scale=scale)
    return out, lse
