"""The executor over keys and values as serving keeps them: in pages, in float8, and many sequences in one launch.

On CUDA a plan runs where K and V lie, in the general Triton kernel. What that kernel has no words for (soft-capping, a window
beside a plan, odd tile sizes), dense attention outside of packs (cuDNN's is the fastest there is) and the CPU take K and V out
of their pages and scales first, and packs sequence by sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported
from winnow.workers.attention.executor import attend_plan, check_plan, fits_kernel
from winnow.workers.attention.kv import KVStorage
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plan import HeadClass, TilePlan

_DENSE_TILES = (128, 64)  # in which a dense sequence joins a pack where no other says its own


def attend_stored(
    plan: TilePlan | None, q: Tensor, kv: KVStorage, *, scale: float, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """`attend_plan` over keys and values in pages or in float8; over plain ones it is `attend_plan`.

    Args:
        plan: None = dense.
        q: [B, Hq, N, D], float32, float16 or bfloat16, innermost stride 1; K and V have the same dtype or float8.
        kv: storage of a batch.
        scale, softcap, window: as `attend_plan`.

    Returns:
        out [B, Hq, N, D] in q's dtype, and lse [B, Hq, N] float32, natural log.

    Raises:
        InvalidRequest: shapes that do not fit each other, the plan or the pages.
        Unsupported: a dtype that cannot be run; float8 on a GPU below compute capability 8.9, where K and V come back into 16
            bits by `kv.to_contiguous`.

    Mutates nothing; where the kernel runs, does not wait for the device.
    """
    if q.dim() != 4:
        raise InvalidRequest(f"kv: q must be [B, Hq, N, D], got {list(q.shape)}; sequences of unlike lengths go to attend_pack")
    if kv.page_table is not None and kv.n_keys is None:
        if plan is None:
            raise InvalidRequest("kv: n_keys is missing: pages without a plan do not say how many keys a sequence has")
        kv = replace(kv, n_keys=plan.n_keys)
    if kv.k.dim() != 4:
        raise InvalidRequest("kv: k and v of a pack, [tokens, Hkv, D], go to attend_pack")
    _check_heads(q, kv)
    n_keys = int(kv.k.shape[2] if kv.n_keys is None else kv.n_keys)
    if not 1 <= q.shape[2] <= n_keys:
        raise InvalidRequest(f"kv: needs 1 <= rows <= keys (right-aligned), got {q.shape[2]} rows and {n_keys} keys")
    kv.check([n_keys] * q.shape[0])
    window = 0 if window >= n_keys else window
    in_place = (kv.is_fp8 or kv.page_table is not None) and not softcap and not window
    if plan is None or not in_place or plan.kinds == {HeadClass.DENSE} or not fits_kernel(plan, q):
        return attend_plan(plan, q, *kv.to_contiguous(q.dtype), scale=scale, softcap=softcap, window=window)
    check_plan(plan, q, n_keys, kv.kv_heads)
    # triton: absent on most CPU machines
    from winnow.workers.attention.kernels.tile_attention.stored import tile_attention_stored

    out, lse = tile_attention_stored(plan, q, kv, scale=scale)
    return _with_residual(plan, out, lse, q, kv, scale)


def attend_pack(
    plans: Sequence[TilePlan | None],
    q: Tensor,
    kv: KVStorage,
    cu_seqlens_q: Sequence[int] | Tensor,
    cu_seqlens_k: Sequence[int] | Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sequences of unlike lengths in one call, each with its own plan and right-aligned causality, without padding.

    Sequence s has rows cu_seqlens_q[s]..cu_seqlens_q[s + 1] - 1 of q and as many keys as cu_seqlens_k says; it reads its own
    keys only.

    Args:
        plans: one for each sequence, made for its rows and keys with a batch of 1; None = dense. Sequences whose plans have
            tiles of the same sizes run in one launch; a dense one joins it, which for a single long sequence is slower than
            `attend_plan`.
        q: [tokens, Hq, D], float32, float16 or bfloat16, innermost stride 1.
        kv: [tokens, Hkv, D], or pages with a row of the page table for each sequence; q's dtype or float8.
        cu_seqlens_q, cu_seqlens_k: [S + 1] cumulative lengths from 0, strictly ascending, as ints or a tensor on the CPU: the
            host has to know them. Every sequence has 1 <= rows <= keys.
        scale, softcap, window: as `attend_plan`, for all sequences.

    Returns:
        out [tokens, Hq, D] in q's dtype, and lse [Hq, tokens] float32, natural log.

    Raises:
        InvalidRequest: lengths, plans or storage that do not fit each other; the message names the sequence.
        Unsupported: as `attend_stored`.

    Mutates nothing; where the kernel runs, does not wait for the device.
    """
    rows, keys = _lengths("cu_seqlens_q", cu_seqlens_q), _lengths("cu_seqlens_k", cu_seqlens_k)
    if not len(plans) == len(rows) - 1 == len(keys) - 1:
        raise InvalidRequest(f"pack: {len(plans)} plans, {len(rows) - 1} lengths of q and {len(keys) - 1} of k; give one of each")
    if q.dim() != 3 or q.shape[0] != rows[-1]:
        raise InvalidRequest(f"pack: q must be [{rows[-1]}, Hq, D] as cu_seqlens_q says, got {list(q.shape)}")
    if kv.page_table is None and (kv.k.dim() != 3 or kv.k.shape[0] != keys[-1]):
        raise InvalidRequest(f"pack: k must be [{keys[-1]}, Hkv, D] as cu_seqlens_k says, or pages, got {list(kv.k.shape)}")
    _check_heads(q, kv)
    kv.check([end - start for start, end in itertools.pairwise(keys)])
    parts = [_part(i, q, kv, rows, keys, plan) for i, plan in enumerate(plans)]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    tiles = next(((p.block_q, p.block_k) for p in plans if p is not None and fits_kernel(p, parts[0][0])), _DENSE_TILES)
    groups: dict[tuple[int, int], dict[int, TilePlan]] = {}
    for i, plan in enumerate(plans):
        one, own = parts[i]
        here = slice(rows[i], rows[i + 1])
        known = plan if plan is not None else TilePlan.dense(
            batch=1, mask_heads=1, n_rows=one.shape[2], n_keys=keys[i + 1] - keys[i], block_q=tiles[0], block_k=tiles[1],
            device=q.device,
        )  # fmt: skip
        if not softcap and (not window or window >= known.n_keys) and fits_kernel(known, one):
            groups.setdefault((known.block_q, known.block_k), {})[i] = known
            continue
        found = attend_stored(plan, one, own, scale=scale, softcap=softcap, window=window)
        out[here], lse[:, here] = found[0][0].transpose(0, 1), found[1][0]
    for group in groups.values():
        # triton: absent on most CPU machines
        from winnow.workers.attention.kernels.tile_attention.stored import tile_attention_pack

        tile_attention_pack(group, q, kv, rows, keys, scale=scale, out=out, lse=lse)
        for i, plan in group.items():
            if plan.residual is not None:
                here = slice(rows[i], rows[i + 1])
                one, own = parts[i]
                merged, total = _with_residual(plan, out[here].transpose(0, 1)[None], lse[None, :, here], one, own, scale)
                out[here], lse[:, here] = merged[0].transpose(0, 1), total[0]
    return out, lse


def _part(i: int, q: Tensor, kv: KVStorage, rows: list[int], keys: list[int], plan: TilePlan | None) -> tuple[Tensor, KVStorage]:
    """Sequence i as a batch of one: its rows [1, Hq, N, D] and its storage."""
    one = q[rows[i] : rows[i + 1]].transpose(0, 1).unsqueeze(0)
    n_keys = keys[i + 1] - keys[i]
    try:
        if not one.shape[2] <= n_keys:
            raise InvalidRequest(f"has {one.shape[2]} rows and {n_keys} keys, needs rows <= keys (right-aligned)")
        if plan is not None:
            check_plan(plan, one, n_keys, kv.kv_heads)
    except InvalidRequest as error:
        raise InvalidRequest(f"pack: sequence {i}: {error}") from None
    return one, kv.sequence(i, keys[i], n_keys)


def _lengths(name: str, cumulative: Sequence[int] | Tensor) -> list[int]:
    if isinstance(cumulative, Tensor):
        if cumulative.device.type != "cpu":
            raise InvalidRequest(f"pack: {name} lies on {cumulative.device}; keep it on the CPU, the launch depends on it")
        cumulative = cumulative.tolist()
    found = [int(x) for x in cumulative]
    if len(found) < 2 or found[0] != 0 or any(end <= start for start, end in itertools.pairwise(found)):
        raise InvalidRequest(
            f"pack: {name} must be 0 and then ascend, a sequence of no tokens is left out; got {len(found)} values"
        )
    return found


def _check_heads(q: Tensor, kv: KVStorage) -> None:
    hq, d = int(q.shape[1]), int(q.shape[-1])
    if hq % kv.kv_heads or d != kv.k.shape[-1] or q.device != kv.k.device:
        raise InvalidRequest(
            f"kv: q has {hq} heads of {d} on {q.device}, k and v {kv.kv_heads} of {kv.k.shape[-1]} on {kv.k.device}; query heads "
            "must be a multiple of KV heads, of one size, on one device"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not (kv.is_fp8 or kv.k.dtype == q.dtype):
        raise Unsupported(
            f"kv: q must be float32, float16 or bfloat16, and k and v of its dtype or float8_e4m3fn; got {q.dtype} and "
            f"{kv.k.dtype}"
        )


def _with_residual(plan: TilePlan, out: Tensor, lse: Tensor, q: Tensor, kv: KVStorage, scale: float) -> tuple[Tensor, Tensor]:
    """Merge the plan's residual into a batch's output; an estimator gets plain K and V."""
    if plan.residual is None:
        return out, lse
    if isinstance(plan.residual, tuple):
        other, other_lse = plan.residual
    else:
        other, other_lse = plan.residual(q, *kv.to_contiguous(q.dtype), scale=scale, softcap=0.0)
    merged, total = merge((out, other), (lse, other_lse))
    return merged.to(q.dtype), total
