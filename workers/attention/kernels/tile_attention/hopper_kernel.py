"""Tile attention for compute capability 9.0 in Gluon: one warp feeds tiles through TMA, warpgroups of 64 rows compute.

Importing this module imports triton's Gluon. The layouts, barriers and register shares are ours to set here, which plain
Triton does not let us do: that is what makes the difference in speed (docs/executor.md has the figures).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed between triton 3.6 and later versions.
_view = getattr(gl.shared_memory_descriptor, "_reinterpret", None) or gl.shared_memory_descriptor.reinterpret
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_fetch_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

_NO_KEY = gl.constexpr(2147483647)  # what stands for a key in a slot that holds none: after every row's position
FULL, MASKED, COLUMN, POOLED = (gl.constexpr(kind) for kind in range(4))  # how the logits of a step become weights


@gluon.jit
def _place(work, n_q_tiles, slab):
    """Query tile and head of a work item: within a slab of heads, whose K and V fit in L2, heavy query tiles first."""
    per_slab = n_q_tiles * slab
    rest = work % per_slab
    return n_q_tiles - 1 - rest // slab, (work // per_slab) * slab + rest % slab


@gluon.jit
def _copy(desc, views, full, stage, part, batch, head, row, PARTS: gl.constexpr, CHUNKS: gl.constexpr):
    for chunk in gl.static_range(CHUNKS):
        at = views.index((stage * CHUNKS + chunk) * PARTS + part)
        _fetch(desc, [batch, head, row, chunk * 64], full, at)


@gluon.jit
def _listed(ids, partial, rest, n_partial, entry, ROWS: gl.constexpr, BLOCK_K: gl.constexpr):
    """First key of a masked step's entry: the full tiles that fill no step of their own, the partial tiles, nothing."""
    SUB: gl.constexpr = BLOCK_K // ROWS
    in_full = entry < rest
    in_partial = (entry >= rest) & (entry < rest + n_partial)
    of_partial = entry - rest
    tile = gl.load(ids + entry // SUB, mask=in_full, other=0) + gl.load(partial + of_partial // SUB, mask=in_partial, other=0)
    inside = gl.where(in_full, entry % SUB, of_partial % SUB)
    return gl.where(in_full | in_partial, tile * BLOCK_K + inside * ROWS, _NO_KEY)


@gluon.jit
def _gather(
    base, stride, ids, count, views, stage, GATHER: gl.constexpr, STEP: gl.constexpr, CHUNKS: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """A step's rows of K or V that lie anywhere, each on its own into the place TMA would have put it; zeros after the last."""
    inside = gl.arange(0, 16, gl.SliceLayout(1, GATHER))
    d_idx = gl.arange(0, 64, gl.SliceLayout(0, GATHER))
    for part in range(STEP // 16):
        place = part * 16 + inside
        key = gl.load(ids + place, mask=place < count, other=0)
        rows = base + key.to(gl.int64) * stride
        for chunk in gl.static_range(CHUNKS):
            at = gl.max_contiguous(gl.multiple_of(rows[:, None] + (chunk * 64 + d_idx)[None, :], [1, 16]), [1, 8])
            valid = (place < count)[:, None] & (chunk * 64 + d_idx < HEAD_SIZE)[None, :]
            _fetch_rows(views.index((stage * CHUNKS + chunk) * (STEP // 16) + part), at, mask=valid)
    async_copy.commit_group()


@gluon.jit
def _produce(
    feed, HEAD_SIZE: gl.constexpr, CHUNKS: gl.constexpr, BLOCK_K: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PACK: gl.constexpr, HAS_COLUMNS: gl.constexpr,
    HAS_POOLED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the ring of K and V tiles, step by step and item by item, and tell the consumers what each item is."""
    descs, tiles, barriers, board, pointers, shape = feed
    q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc = descs
    q_view, k_view, v_view, k_rows, v_rows, k_pooled, v_pooled, notes, biases = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, board_full, board_empty = barriers
    (k_ptr, v_ptr, full_offsets, full_ids, partial_offsets, partial_ids, column_offsets, column_ids, pooled_weights,
     counter) = pointers  # fmt: skip
    (n_items, n_q_tiles, slab, n_rows, n_keys, heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch, stride_kb, stride_kh,
     stride_kn, stride_vb, stride_vh, stride_vn) = shape  # fmt: skip
    ROWS: gl.constexpr = BLOCK_K if BLOCK_K < STEP else STEP
    PARTS: gl.constexpr = STEP // ROWS
    SUB: gl.constexpr = BLOCK_K // ROWS
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS // PACK
    TILE_BYTES: gl.constexpr = STEP * CHUNKS * 128
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    column = gl.arange(0, STEP, VECTOR)
    field = gl.arange(0, 8, VECTOR)
    work = gl.program_id(0)
    it = 0
    item = 0
    while work < n_items:
        q_tile, at = _place(work, n_q_tiles, slab)
        batch = at // heads
        head = at % heads * PACK
        mask_head = gl.minimum(batch, plan_batch - 1) * mask_heads + head // heads_per_mask
        row = mask_head.to(gl.int64) * n_q_tiles + q_tile
        kv_head = head // heads_per_kv
        first_full = gl.load(full_offsets + row)
        first_partial = gl.load(partial_offsets + row)
        n_full = (gl.load(full_offsets + row + 1) - first_full).to(gl.int32) * SUB
        n_partial = (gl.load(partial_offsets + row + 1) - first_partial).to(gl.int32) * SUB
        ids = full_ids + first_full
        partial = partial_ids + first_partial
        rest = n_full % PARTS
        if n_partial + rest == 0:  # the first step of an item is always a masked one
            rest = gl.minimum(n_full, PARTS)
        masked_steps = gl.maximum((n_partial + rest + PARTS - 1) // PARTS, 1)
        full_steps = (n_full - rest) // PARTS
        column_steps = 0
        if HAS_COLUMNS:
            first_column = gl.load(column_offsets + row)
            n_columns = (gl.load(column_offsets + row + 1) - first_column).to(gl.int32)
            column_steps = (n_columns + STEP - 1) // STEP
        pooled_steps = 0
        if HAS_POOLED:
            seen = (q_tile * BLOCK_Q + (n_keys - n_rows) + 1) // BLOCK_K  # full tiles: only those can have been left out
            pooled_steps = (seen + STEP - 1) // STEP

        slot = item % 2
        mbarrier.wait(board_empty.index(slot), (item // 2 & 1) ^ 1)
        line = gl.where(field == 0, work, gl.where(field == 1, full_steps, gl.where(field == 2, column_steps, pooled_steps)))
        board.index(slot).store(gl.where(field == 4, masked_steps, line))
        _barrier()
        mbarrier.arrive(board_full.index(slot), count=1)
        first_row = q_tile * BLOCK_Q
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), (item & 1) ^ 1)
            mbarrier.expect(q_full.index(consumer), CHUNKS * 64 * 128)
            if PACK > 1:
                _copy(q_desc, q_view, q_full.index(consumer), consumer, 0, batch, head + consumer, first_row, 1, CHUNKS)
            else:
                _copy(q_desc, q_view, q_full.index(consumer), consumer, 0, batch, head, first_row + consumer * 64, 1, CHUNKS)

        for i in range(masked_steps):
            stage = it % STAGES
            phase = (it // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), TILE_BYTES)
            for part in gl.static_range(PARTS):
                key = _listed(ids, partial, rest, n_partial, i * PARTS + part, ROWS, BLOCK_K)
                _copy(k_desc, k_view, k_full.index(stage), stage, part, batch, kv_head, gl.minimum(key, n_keys), PARTS, CHUNKS)
            mbarrier.wait(v_empty.index(stage), phase)
            key = _listed(ids, partial, rest, n_partial, i * PARTS + column // ROWS, ROWS, BLOCK_K)
            notes.index(stage).store(gl.where(key == _NO_KEY, key, key + column % ROWS))
            _barrier()
            mbarrier.expect(v_full.index(stage), TILE_BYTES)
            for part in gl.static_range(PARTS):
                key = _listed(ids, partial, rest, n_partial, i * PARTS + part, ROWS, BLOCK_K)
                _copy(v_desc, v_view, v_full.index(stage), stage, part, batch, kv_head, gl.minimum(key, n_keys), PARTS, CHUNKS)
            it += 1

        for i in range(full_steps):
            stage = it % STAGES
            phase = (it // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), TILE_BYTES)
            for part in gl.static_range(PARTS):
                entry = rest + i * PARTS + part
                key = gl.load(ids + entry // SUB) * BLOCK_K + entry % SUB * ROWS
                _copy(k_desc, k_view, k_full.index(stage), stage, part, batch, kv_head, key, PARTS, CHUNKS)
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), TILE_BYTES)
            for part in gl.static_range(PARTS):
                entry = rest + i * PARTS + part
                key = gl.load(ids + entry // SUB) * BLOCK_K + entry % SUB * ROWS
                _copy(v_desc, v_view, v_full.index(stage), stage, part, batch, kv_head, key, PARTS, CHUNKS)
            it += 1
        if HAS_COLUMNS:
            k_base = k_ptr + batch.to(gl.int64) * stride_kb + kv_head.to(gl.int64) * stride_kh
            v_base = v_ptr + batch.to(gl.int64) * stride_vb + kv_head.to(gl.int64) * stride_vh
            for i in range(column_steps):
                stage = it % STAGES
                phase = (it // STAGES & 1) ^ 1
                keys = column_ids + first_column + i * STEP
                left = n_columns - i * STEP
                mbarrier.wait(k_empty.index(stage), phase)
                _gather(k_base, stride_kn, keys, left, k_rows, stage, GATHER, STEP, CHUNKS, HEAD_SIZE)
                mbarrier.wait(v_empty.index(stage), phase)
                _gather(v_base, stride_vn, keys, left, v_rows, stage, GATHER, STEP, CHUNKS, HEAD_SIZE)
                notes.index(stage).store(gl.where(column < left, 0, _NO_KEY))
                async_copy.wait_group(1)
                fence_async_shared()
                _barrier()
                mbarrier.arrive(k_full.index(stage), count=1)
                async_copy.wait_group(0)
                fence_async_shared()
                _barrier()
                mbarrier.arrive(v_full.index(stage), count=1)
                it += 1
        if HAS_POOLED:
            weights = pooled_weights + row * (n_keys // BLOCK_K)
            for i in range(pooled_steps):
                stage = it % STAGES
                phase = (it // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), TILE_BYTES)
                _copy(pooled_k_desc, k_pooled, k_full.index(stage), stage, 0, batch, kv_head, i * STEP, 1, CHUNKS)
                mbarrier.wait(v_empty.index(stage), phase)
                tile = i * STEP + column
                biases.index(stage).store(gl.load(weights + tile, mask=tile < seen, other=float("-inf")))
                _barrier()
                mbarrier.expect(v_full.index(stage), TILE_BYTES)
                _copy(pooled_v_desc, v_pooled, v_full.index(stage), stage, 0, batch, kv_head, i * STEP, 1, CHUNKS)
                it += 1
        item += 1
        work = gl.atomic_add(counter, 1) + gl.num_programs(0)
    slot = item % 2
    mbarrier.wait(board_empty.index(slot), (item // 2 & 1) ^ 1)
    board.index(slot).store(gl.full([8], 0, gl.int32, VECTOR) + work)
    _barrier()
    mbarrier.arrive(board_full.index(slot), count=1)


@gluon.jit
def _weigh(s, top, total, scale, KIND: gl.constexpr, note, bias, rows, STREAMS: gl.constexpr, INTERVALS: gl.constexpr):
    """Online softmax (Milakov and Gimelshein 2018) in base 2: weights, decay of what came before, new top and total."""
    position, sink, recent, lo, hi = rows
    if KIND == POOLED:
        s = s * scale + bias[None, :]
        new_top = gl.maximum(top, gl.max(s, 1))
    else:
        if KIND == MASKED:
            key = note[None, :]
            allowed = key <= position  # rows after the last one may read anything: they are not stored
            if STREAMS:
                allowed = allowed & ((key < sink) | (key > position - recent))
            if INTERVALS:
                allowed = allowed & (key >= lo) & (key < hi)
            s = gl.where(allowed, s, float("-inf"))
        if KIND == COLUMN:
            s = gl.where((note != _NO_KEY)[None, :], s, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, 1) * scale)
    shift = new_top
    if KIND == MASKED or KIND == POOLED:  # noqa: SIM109 - Gluon knows no "in"
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf is nan
    if KIND != POOLED:
        s = s * scale
    weights = gl.exp2(s - shift[:, None])
    decay = gl.exp2(top - shift)
    return weights, decay, new_top, total * decay + gl.sum(weights, 1)


@gluon.jit
def _read(KIND: gl.constexpr, v_full, notes, biases, it, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr):
    """What the producer noted about the keys of a step; it is written before V's barrier completes."""
    stage = it % STAGES
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    note, bias = 0, 0.0
    if KIND != FULL:
        mbarrier.wait(v_full.index(stage), it // STAGES & 1)
    if KIND == MASKED or KIND == COLUMN:  # noqa: SIM109
        note = notes.index(stage).load(COLUMNS)
    if KIND == POOLED:
        bias = biases.index(stage).load(COLUMNS)
    return note, bias


@gluon.jit
def _steps(
    n, weights, acc, top, total, it, q, tiles, barriers, rows, scale, KIND: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, STREAMS: gl.constexpr, INTERVALS: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """n steps of one kind after step `it`, whose weights are given and have not met their V yet.

    A step's logits are begun first, then the product of the weights before it with their V, which runs on while the logits
    become weights. Weights go from one iteration to the next in float32: halves would be unpacked and packed again.
    """
    k_smem, v_smem, notes, biases = tiles
    k_full, k_empty, v_full, v_empty = barriers
    nothing = gl.zeros([64, STEP], gl.float32, S_LAYOUT)
    for _ in range(n):
        before = it % STAGES
        phase = it // STAGES & 1
        it += 1
        stage = it % STAGES
        mbarrier.wait(k_full.index(stage), it // STAGES & 1)
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        p = gl.convert_layout(weights.to(v_smem.dtype), P_LAYOUT)
        mbarrier.wait(v_full.index(before), phase)
        acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        s, acc = warpgroup_mma_wait(1, deps=[s, acc])
        mbarrier.arrive(k_empty.index(stage), count=1)
        note, bias = _read(KIND, v_full, notes, biases, it, STAGES, S_LAYOUT)
        weights, decay, top, total = _weigh(s, top, total, scale, KIND, note, bias, rows, STREAMS, INTERVALS)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return weights, acc, top, total, it


@gluon.jit
def _consume(
    WHICH: gl.constexpr, given, scale, HEAD_SIZE: gl.constexpr, D: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, PACK: gl.constexpr, STREAMS: gl.constexpr,
    INTERVALS: gl.constexpr, HAS_COLUMNS: gl.constexpr, HAS_POOLED: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of one query head at a time, from the first tile to out and lse."""
    tiles, barriers, board, pointers, shape = given
    q_smem, k_smem, v_smem, notes, biases = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, board_full, board_empty = barriers
    out_ptr, lse_ptr, sink_ptr, recent_ptr, intervals_ptr = pointers
    (n_items, n_q_tiles, slab, n_rows, n_keys, heads, heads_per_mask, mask_heads, plan_batch, stride_ob, stride_oh,
     stride_on) = shape  # fmt: skip
    BLOCK_Q: gl.constexpr = 64 * CONSUMERS // PACK
    LINE: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    ring = (k_smem, v_smem, notes, biases)
    signals = (k_full, k_empty, v_full, v_empty)
    field = gl.arange(0, 8, LINE)
    nothing = gl.zeros([64, STEP], gl.float32, S_LAYOUT)
    q = q_smem.index(WHICH)
    it = 0
    item = 0
    mbarrier.wait(board_full.index(0), 0)
    line = board.index(0).load(LINE)
    mbarrier.arrive(board_empty.index(0), count=1)
    work = gl.sum(gl.where(field == 0, line, 0), 0)
    while work < n_items:
        full_steps = gl.sum(gl.where(field == 1, line, 0), 0)
        column_steps = gl.sum(gl.where(field == 2, line, 0), 0)
        pooled_steps = gl.sum(gl.where(field == 3, line, 0), 0)
        masked_steps = gl.sum(gl.where(field == 4, line, 0), 0)
        q_tile, at = _place(work, n_q_tiles, slab)
        batch = at // heads
        head = at % heads * PACK
        mask_head = gl.minimum(batch, plan_batch - 1) * mask_heads + head // heads_per_mask
        first_row = q_tile * BLOCK_Q
        if PACK > 1:
            head = head + WHICH
        else:
            first_row = first_row + WHICH * 64
        row = first_row + gl.arange(0, 64, S_ROWS)
        position = (row + (n_keys - n_rows))[:, None]
        sink, recent, lo, hi = 0, 0, 0, 0
        if STREAMS:
            sink = gl.load(sink_ptr + mask_head)
            recent = gl.load(recent_ptr + mask_head)
        if INTERVALS:
            interval = intervals_ptr + (mask_head.to(gl.int64) * n_rows + row) * 2
            lo = gl.load(interval, mask=row < n_rows, other=0)[:, None]
            hi = gl.load(interval + 1, mask=row < n_rows, other=0)[:, None]
        rows = (position, sink, recent, lo, hi)
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        top = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([64], gl.float32, S_ROWS)

        mbarrier.wait(q_full.index(WHICH), item & 1)
        mbarrier.wait(k_full.index(it % STAGES), it // STAGES & 1)
        s = warpgroup_mma(q, k_smem.index(it % STAGES).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(it % STAGES), count=1)
        note, bias = _read(MASKED, v_full, notes, biases, it, STAGES, S_LAYOUT)
        weights, _, top, total = _weigh(s, top, total, scale, MASKED, note, bias, rows, STREAMS, INTERVALS)
        weights, acc, top, total, it = _steps(
            masked_steps - 1, weights, acc, top, total, it, q, ring, signals, rows, scale, MASKED, STEP, STAGES,
            STREAMS, INTERVALS, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        weights, acc, top, total, it = _steps(
            full_steps, weights, acc, top, total, it, q, ring, signals, rows, scale, FULL, STEP, STAGES,
            STREAMS, INTERVALS, S_LAYOUT, O_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        if HAS_COLUMNS:
            weights, acc, top, total, it = _steps(
                column_steps, weights, acc, top, total, it, q, ring, signals, rows, scale, COLUMN, STEP, STAGES,
                STREAMS, INTERVALS, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        if HAS_POOLED:
            weights, acc, top, total, it = _steps(
                pooled_steps, weights, acc, top, total, it, q, ring, signals, rows, scale, POOLED, STEP, STAGES,
                STREAMS, INTERVALS, S_LAYOUT, O_LAYOUT, P_LAYOUT,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(WHICH), count=1)
        p = gl.convert_layout(weights.to(v_smem.dtype), P_LAYOUT)
        mbarrier.wait(v_full.index(it % STAGES), it // STAGES & 1)
        acc = warpgroup_mma(p, v_smem.index(it % STAGES), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(it % STAGES), count=1)
        it += 1
        item += 1

        empty = total == 0.0
        lse = gl.where(empty, float("-inf"), (top + gl.log2(gl.where(empty, 1.0, total))) * 0.6931471805599453)
        lse_at = lse_ptr + (batch * heads * PACK + head).to(gl.int64) * n_rows + row
        gl.store(lse_at, lse, mask=row < n_rows)
        inverse = gl.convert_layout(1.0 / gl.where(empty, 1.0, total), O_ROWS)
        out_row = first_row + gl.arange(0, 64, O_ROWS)
        d_idx = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        out_at = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        out_at = out_at + out_row.to(gl.int64)[:, None] * stride_on + d_idx[None, :]
        valid = (out_row < n_rows)[:, None] & (d_idx < HEAD_SIZE)[None, :]
        gl.store(out_at, (acc * inverse[:, None]).to(v_smem.dtype), mask=valid)
        slot = item % 2
        mbarrier.wait(board_full.index(slot), item // 2 & 1)
        line = board.index(slot).load(LINE)
        mbarrier.arrive(board_empty.index(slot), count=1)
        work = gl.sum(gl.where(field == 0, line, 0), 0)


_COUNTS = [
    "n_items",
    "n_q_tiles",
    "slab",
    "n_rows",
    "n_keys",
    "heads",
    "heads_per_kv",
    "heads_per_mask",
    "mask_heads",
    "plan_batch",
]


@gluon.jit(do_not_specialize=_COUNTS)  # else every new length would be compiled anew
def hopper_kernel(
    q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc, k_ptr, v_ptr, out_ptr, lse_ptr, full_offsets, full_ids, partial_offsets,
    partial_ids, sink_ptr, recent_ptr, intervals_ptr, column_offsets, column_ids, pooled_weights, counter,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    n_items, n_q_tiles, slab, n_rows, n_keys, heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch, scale,
    HEAD_SIZE: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, PACK: gl.constexpr, STREAMS: gl.constexpr, INTERVALS: gl.constexpr, COLUMNS: gl.constexpr,
    HAS_POOLED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `tile_attention_kernel`, for 16-bit types; the same formula, lists, masks and numerics.

    A work item is a query tile of a head, or with PACK = 2 the 64-row query tile of two heads that share a list. Each consumer,
    a warpgroup, owns 64 of its rows; both read the same K and V tiles out of a ring of STAGES steps of STEP keys. A step is
    part of one key tile, or several of them (STEP / BLOCK_K). Partial tiles and the full ones that fill no step come first.
    Grid: one program for each multiprocessor's share; items come off a counter, which must be 0, as programs get free.
    Reads per item: q once and 4 D bytes per key of a listed tile (for both consumers), single key or tile with a pseudo-key.
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    CHUNKS: gl.constexpr = D // 64  # 128 bytes, the widest swizzle
    ROWS: gl.constexpr = BLOCK_K if BLOCK_K < STEP else STEP
    PARTS: gl.constexpr = STEP // ROWS
    WARPS: gl.constexpr = 4 if COLUMNS else 1
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BOX: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)

    q_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, D], TILE)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, D], TILE)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, STEP, D], TILE)
    notes = gl.allocate_shared_memory(gl.int32, [STAGES, STEP], LINE)
    # The same memory as others see it: what is noted of pseudo-keys is a float; TMA and the gather write boxes of 64 columns.
    biases = _view(notes, gl.float32, [STAGES, STEP], LINE)
    q_view = _view(q_smem, DTYPE, [CONSUMERS * CHUNKS, 1, 1, 64, 64], BOX)
    k_view = _view(k_smem, DTYPE, [STAGES * CHUNKS * PARTS, 1, 1, ROWS, 64], BOX)
    v_view = _view(v_smem, DTYPE, [STAGES * CHUNKS * PARTS, 1, 1, ROWS, 64], BOX)
    k_rows = _view(k_smem, DTYPE, [STAGES * CHUNKS * (STEP // 16), 16, 64], TILE)
    v_rows = _view(v_smem, DTYPE, [STAGES * CHUNKS * (STEP // 16), 16, 64], TILE)
    k_pooled = _view(k_smem, DTYPE, [STAGES * CHUNKS, 1, 1, STEP, 64], BOX)
    v_pooled = _view(v_smem, DTYPE, [STAGES * CHUNKS, 1, 1, STEP, 64], BOX)
    board = gl.allocate_shared_memory(gl.int32, [2, 8], LINE)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    board_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    board_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(board_full.index(i), count=1)
        mbarrier.init(board_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, board_full, board_empty)
    consumer_tiles = (q_smem, k_smem, v_smem, notes, biases)
    consumer_pointers = (out_ptr, lse_ptr, sink_ptr, recent_ptr, intervals_ptr)
    consumer_shape = (n_items, n_q_tiles, slab, n_rows, n_keys, heads, heads_per_mask, mask_heads, plan_batch, stride_ob,
                      stride_oh, stride_on)  # fmt: skip
    if not HAS_POOLED:
        pooled_k_desc = k_desc  # never used, but a descriptor
        pooled_v_desc = v_desc
    feed = (
        (q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc),
        (q_view, k_view, v_view, k_rows, v_rows, k_pooled, v_pooled, notes, biases),
        barriers, board,
        (k_ptr, v_ptr, full_offsets, full_ids, partial_offsets, partial_ids, column_offsets, column_ids, pooled_weights, counter),
        (n_items, n_q_tiles, slab, n_rows, n_keys, heads, heads_per_kv, heads_per_mask, mask_heads, plan_batch, stride_kb,
         stride_kh, stride_kn, stride_vb, stride_vh, stride_vn),
    )  # fmt: skip
    given = (consumer_tiles, barriers, board, consumer_pointers, consumer_shape)
    # Constants go into the calls themselves: a tuple with a name would make them run-time values.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, given, scale, HEAD_SIZE, D, STEP, STAGES, CONSUMERS, PACK, STREAMS, INTERVALS, COLUMNS, HAS_POOLED,
                            S_LAYOUT, O_LAYOUT, P_LAYOUT)),
                (_consume, (1, given, scale, HEAD_SIZE, D, STEP, STAGES, CONSUMERS, PACK, STREAMS, INTERVALS, COLUMNS, HAS_POOLED,
                            S_LAYOUT, O_LAYOUT, P_LAYOUT)),
                (_produce, (feed, HEAD_SIZE, CHUNKS, BLOCK_K, STEP, STAGES, CONSUMERS, PACK, COLUMNS, HAS_POOLED, WARPS)),
            ],
            [4, WARPS], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, given, scale, HEAD_SIZE, D, STEP, STAGES, CONSUMERS, PACK, STREAMS, INTERVALS, COLUMNS, HAS_POOLED,
                            S_LAYOUT, O_LAYOUT, P_LAYOUT)),
                (_produce, (feed, HEAD_SIZE, CHUNKS, BLOCK_K, STEP, STAGES, CONSUMERS, PACK, COLUMNS, HAS_POOLED, WARPS)),
            ],
            [WARPS], [PRODUCER_REGISTERS],
        )  # fmt: skip
