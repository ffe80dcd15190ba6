"""Launching `tile_attention_kernel` over pages, float8 and packs of sequences. Importing this module imports triton."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.kernels.tile_attention.kernel import check_dtype, run
from winnow.workers.attention.kernels.tile_attention.launch import Launch, Work
from winnow.workers.attention.kernels.tile_attention.pseudo_keys import stored_pseudo_keys
from winnow.workers.attention.kv import KVStorage
from winnow.workers.attention.lowering import Lowered, lower
from winnow.workers.attention.plan import TileLists, TilePlan


def tile_attention_stored(
    plan: TilePlan, q: Tensor, kv: KVStorage, *, scale: float, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `tile_attention`, over storage of a batch. Nothing is copied out of its pages except for mean correction.

    Raises:
        Unsupported: as `tile_attention`; float8 on a GPU below compute capability 8.9.
    """
    _check(q, kv)
    choice = Launch.choose(q.dtype, q.shape[3], plan.block_q, plan.block_k)
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse is None else lse
    pooled = stored_pseudo_keys(plan, kv, q.dtype) if plan.mean_correction else None
    work = Work.of(plan, lower(plan), q.shape[1], q.shape[0], pooled)
    run(work, choice, q, kv.k, kv.v, out, lse, scale=scale, page_table=_table(kv), scales=_scales(kv, q.shape[0]))
    return out, lse


def tile_attention_pack(
    plans: Mapping[int, TilePlan], q: Tensor, kv: KVStorage, rows: list[int], keys: list[int], *, scale: float, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Some sequences of a pack in one launch: writes their rows of out and lse, residuals left out.

    Args:
        plans: by sequence; a batch of 1 each, with tiles of the same sizes.
        q, out: [tokens, Hq, D]. kv: as `attend_pack`. rows, keys: cumulative lengths. lse: [Hq, tokens].

    Raises:
        Unsupported: as `tile_attention_stored`.

    Cost beside the attention: the plans' lists are copied behind one another, ids and all (4 bytes for every slot they have).
    """
    _check(q, kv)
    first = next(iter(plans.values()))
    choice = Launch.choose(q.dtype, q.shape[2], first.block_q, first.block_k)
    q = q if q.stride(-1) == 1 else q.contiguous()
    work = pack(plans, q, kv, rows, keys)
    k, v = (x if kv.page_table is not None else _heads_first(x) for x in (kv.k, kv.v))
    run(
        work, choice, _heads_first(q), k, v, _heads_first(out), lse,
        scale=scale, page_table=_table(kv), scales=_scales(kv, len(rows) - 1),
    )  # fmt: skip


def pack(plans: Mapping[int, TilePlan], q: Tensor, kv: KVStorage, rows: list[int], keys: list[int]) -> Work:
    """One launch out of many plans. Nothing waits for the device: lists built there are as long as their buffers.

    Query tiles that see most keys are started first, whichever sequence they belong to.
    """
    hq, block_q = q.shape[1], next(iter(plans.values())).block_q
    lowered = {i: lower(plan) for i, plan in plans.items()}
    pooled = {
        i: stored_pseudo_keys(plan, kv.sequence(i, keys[i], plan.n_keys), q.dtype)
        for i, plan in plans.items()
        if plan.mean_correction
    }
    has_intervals = any(x.intervals is not None for x in lowered.values())
    table = torch.zeros(len(rows) - 1, 12, dtype=torch.int64)
    heads, lists, intervals, pseudo, weights = 0, 0, 0, 0, 0
    for i, plan in plans.items():
        has_own = lowered[i].intervals is not None
        tiles = pooled[i][0].shape[2] if i in pooled else 0
        table[i] = torch.tensor([
            rows[i], keys[i], plan.n_rows, plan.n_keys, plan.n_q_tiles, hq // plan.mask_heads, heads, lists,
            intervals if has_own else -1, tiles, pseudo, weights,
        ])  # fmt: skip
        heads += plan.mask_heads
        lists += plan.mask_heads * plan.n_q_tiles + 1
        intervals += plan.mask_heads * plan.n_rows if has_own else 0
        pseudo += kv.kv_heads * tiles
        weights += plan.mask_heads * plan.n_q_tiles * tiles
    device = q.device
    columns = None
    if any(plan.token_columns is not None for plan in plans.values()):
        columns = _behind_one_another(
            plan.token_columns or TileLists.empty(plan.mask_heads * plan.n_q_tiles, device) for plan in plans.values()
        )
    joined = Lowered(
        _behind_one_another(x.full for x in lowered.values()),
        _behind_one_another(x.partial for x in lowered.values()),
        *_windows(plans, lowered),
        torch.cat([x.intervals.view(-1, 2) for x in lowered.values() if x.intervals is not None]) if has_intervals else None,
    )
    together = None
    if pooled:
        parts = zip(*pooled.values(), strict=True)
        mean_k, mean_v, log_weights = (torch.cat([x.reshape(-1) for x in part]) for part in parts)
        together = mean_k, mean_v, log_weights
    items = _items(list(plans), table, block_q)
    return Work(
        joined, columns, together, (items.shape[0], hq), rows[-1], items=_moved(items, device), sequences=_moved(table, device)
    )


def _items(members: list[int], table: Tensor, block_q: int) -> Tensor:
    """[query tiles, 2] int32: (sequence, query tile), by the position of their last row, descending."""
    own = table[members]
    counts = own[:, 4]
    owner = torch.repeat_interleave(torch.arange(len(members)), counts)
    tile = torch.arange(owner.numel()) - (counts.cumsum(0) - counts)[owner]
    n_rows, n_keys = own[owner, 2], own[owner, 3]
    last = torch.minimum((tile + 1) * block_q, n_rows) + n_keys - n_rows
    order = torch.argsort(last, descending=True, stable=True)
    return torch.stack((torch.tensor(members)[owner], tile), -1)[order].to(torch.int32).contiguous()


def _behind_one_another(lists: Iterable[TileLists]) -> TileLists:
    """Rows of all; each list keeps its own last offset, so a row's end is beside its start."""
    offsets, ids, before = [], [], 0
    for x in lists:
        offsets.append(x.offsets + before if before else x.offsets)
        ids.append(x.ids)
        before += x.ids.numel()
    return TileLists(torch.cat(offsets), torch.cat(ids)) if len(ids) > 1 else TileLists(offsets[0], ids[0])


def _windows(plans: Mapping[int, TilePlan], lowered: Mapping[int, Lowered]) -> tuple[Tensor | None, Tensor | None]:
    """Sinks and windows of all mask heads; a sink of all keys for those that have none."""
    if all(x.sink is None for x in lowered.values()):
        return None, None
    sinks, recents = [], []
    for i, plan in plans.items():
        sink, recent = lowered[i].sink, lowered[i].recent
        sinks.append(torch.full_like(plan.sink, plan.n_keys) if sink is None else sink)
        recents.append(torch.ones_like(plan.recent) if recent is None else recent)
    return torch.cat(sinks, 1), torch.cat(recents, 1)


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, H, D] -> [1, H, tokens, D]"""
    return x.transpose(0, 1).unsqueeze(0)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _table(kv: KVStorage) -> Tensor | None:
    table = kv.page_table
    return table if table is None or table.stride(1) == 1 else table.contiguous()


def _scales(kv: KVStorage, sequences: int) -> tuple[Tensor, Tensor] | None:
    if not kv.is_fp8:
        return None
    one = torch.ones(1, kv.kv_heads, device=kv.k.device)
    k_scale, v_scale = (one if x is None else x for x in (kv.k_scale, kv.v_scale))
    return k_scale.expand(sequences, -1).contiguous(), v_scale.expand(sequences, -1).contiguous()


def _check(q: Tensor, kv: KVStorage) -> None:
    check_dtype(q.dtype)
    if kv.is_fp8 and q.is_cuda and _capability(q.device.index) < (8, 9):
        raise Unsupported(
            "tile attention: Triton has no float8_e4m3fn below compute capability 8.9; keep K and V in 16 bits, or run "
            "attend_plan over kv.to_contiguous(q.dtype)"
        )


@functools.cache
def _capability(device_idx: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_idx)
