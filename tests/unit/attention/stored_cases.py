"""Plans of every kind, and the same keys and values kept in every way, for the tests of storage and of packs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from attention_cases import random_intervals, random_plan
from torch import Tensor

from winnow.workers.attention.kv import FP8, KVStorage
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.reference import attend_reference
from winnow.workers.attention.tiles import TileLists

STORAGES = ["contiguous", "paged", "fp8", "paged-fp8"]
Geometry = tuple[int, ...]  # B, Hq, Hkv, N, M, Bq, Bk


def _intervals(g: Geometry, heads: int) -> TilePlan:
    b, n, m = g[0], g[3], g[4]
    gen = torch.Generator().manual_seed(n)
    return TilePlan.intervals(random_intervals(b, heads, n, m, gen), n_keys=m, block_q=g[5], block_k=g[6])


def _streaming(g: Geometry, heads: int) -> TilePlan:
    return TilePlan.streaming(
        batch=g[0], mask_heads=heads, n_rows=g[3], n_keys=g[4], sink=3, recent=21, block_q=g[5], block_k=g[6]
    )


PLANS: dict[str, Callable[[Geometry, int], TilePlan]] = {
    "tiles": lambda g, heads: random_plan(g, heads, 0.4),
    "diagonal": lambda g, heads: random_plan(g, heads, 0.0),
    "streaming": _streaming,
    "intervals": _intervals,
    "columns": lambda g, heads: random_plan(g, heads, 0.2, columns=0.2),
    "mean": lambda g, heads: random_plan(g, heads, 0.2, columns=0.1, mean_correction=True),
    "mixed": lambda g, heads: random_plan(g, heads, 0.3, classes=True, columns=0.2, mean_correction=True),
    "dense": lambda g, heads: TilePlan.dense(
        batch=1, mask_heads=1, n_rows=g[3], n_keys=g[4], block_q=g[5], block_k=g[6]
    ),
}  # fmt: skip


def moved(plan: TilePlan, device: str, room: int = 0) -> TilePlan:
    """The plan on another device, its lists with room for more ids, as on an accelerator: what lies there is no tile."""

    def lists(x: TileLists | None) -> TileLists | None:
        unused = torch.full((room,), 1 << 30, dtype=torch.int32)
        return None if x is None else TileLists(x.offsets.to(device), torch.cat((x.ids, unused)).to(device))

    rest = {name: getattr(plan, name) for name in ("head_class", "sink", "recent", "row_intervals")}
    return dataclasses.replace(
        plan, full=lists(plan.full), partial=lists(plan.partial), token_columns=lists(plan.token_columns),
        **{name: None if x is None else x.to(device) for name, x in rest.items()},
    )  # fmt: skip


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store(how: str, k: Tensor, v: Tensor, *, page: int = 16) -> tuple[KVStorage, Tensor, Tensor]:
    """k and v [B, Hkv, M, D] kept this way, and what they then stand for, float64. What may not be read is NaN."""
    b, hkv = k.shape[:2]
    k_scale = v_scale = None
    meant_k, meant_v = k.double(), v.double()
    if how.endswith("fp8"):
        k, v = (x.float().mul(60.0).clamp(-448, 448).to(FP8) for x in (k, v))
        k_scale, v_scale = (0.01 + 0.02 * torch.rand(b, hkv, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        meant_k, meant_v = (x.double() * scale.double()[..., None, None] for x, scale in ((k, k_scale), (v, v_scale)))
    if not how.startswith("paged"):
        return KVStorage(k, v, k_scale=k_scale, v_scale=v_scale), meant_k, meant_v
    k, v, table = in_pages(k, v, page)
    return KVStorage(k, v, table, k_scale=k_scale, v_scale=v_scale), meant_k, meant_v


def in_pages(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of a pool in random order, with pages of nobody between them. The table's rows end with ids that do not exist."""
    b, hkv, m, d = k.shape
    each = -(-m // page)
    order = torch.randperm(b * each + 3, generator=torch.Generator().manual_seed(m))
    table = torch.full((b, each + 2), 2**30, dtype=torch.int32)
    table[:, :each] = order[: b * each].view(b, each)
    pools = []
    for x in (k, v):
        pool = torch.full((order.numel(), page, hkv, d), torch.nan).to(x.dtype).transpose(1, 2)  # heads second, not laid out so
        for at in range(m):
            pool[table[:, at // page].long(), :, at % page] = x[:, :, at]
        pools.append(pool)
    return pools[0], pools[1], table


def pack_of(stored: list[KVStorage], page: int = 16) -> KVStorage:
    """Batches of one, one behind another; those in pages share one pool."""
    k_scale, v_scale = (
        None if stored[0].k_scale is None else torch.cat([getattr(x, name) for x in stored]) for name in ("k_scale", "v_scale")
    )
    if stored[0].page_table is None:
        k, v = (torch.cat([getattr(x, name)[0].transpose(0, 1) for x in stored]) for name in ("k", "v"))
        return KVStorage(k, v, k_scale=k_scale, v_scale=v_scale)
    tables, before = [], 0
    width = max(x.page_table.shape[1] for x in stored if x.page_table is not None)
    for x in stored:
        assert x.page_table is not None
        table = torch.where(x.page_table < 2**30, x.page_table + before, 2**30)
        tables.append(torch.nn.functional.pad(table, (0, width - table.shape[1]), value=2**30))
        before += x.k.shape[0]
    k, v = (torch.cat([getattr(x, name) for x in stored]) for name in ("k", "v"))
    return KVStorage(k, v, torch.cat(tables).to(torch.int32), k_scale=k_scale, v_scale=v_scale)


def to_device(kv: KVStorage, device: str) -> KVStorage:
    """The storage on another device, strides kept."""
    fields = {x.name: getattr(kv, x.name) for x in dataclasses.fields(kv)}
    return KVStorage(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in fields.items()})


def truth(plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor, scale: float, **kwargs: float) -> tuple[Tensor, Tensor]:
    """float64, on the CPU."""
    out, lse = attend_reference(plan, q.cpu().double(), k, v, scale=scale, **kwargs)  # type: ignore[arg-type]
    return out, lse


def assert_near(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Relative in the output's norm, absolute in lse; nothing is NaN."""
    out, lse = (x.cpu().double() for x in got)
    assert bool(out.isfinite().all())
    assert float((out - expected[0]).norm() / expected[0].norm()) < tolerance
    torch.testing.assert_close(lse, expected[1], atol=max(1e-5, tolerance), rtol=1e-5)
