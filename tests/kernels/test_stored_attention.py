"""The Triton kernel over pages, float8 and packs: in the interpreter on a CPU, the executor's whole matrix on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl
from stored_cases import PLANS, STORAGES, Geometry, assert_near, moved, normal, pack_of, store, to_device, truth
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention import stored as executor
from winnow.workers.attention.kernels.tile_attention import stored as launcher
from winnow.workers.attention.kernels.tile_attention.launch import why_not
from winnow.workers.attention.kernels.tile_attention.stored import tile_attention_pack, tile_attention_stored
from winnow.workers.attention.kv import FP8, KVStorage
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.stored import attend_pack, attend_stored

SCALE = 0.25
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # wrong in the interpreter
GPU_BATCHES: list[tuple[Geometry, int, int]] = [  # and head size, page size
    ((2, 8, 2, 333, 700, 128, 128), 128, 64),
    ((1, 4, 4, 257, 257, 64, 32), 64, 16),
    ((1, 6, 3, 1, 500, 128, 64), 96, 256),
]
Case = tuple[int, int, tuple[int, int], str | None, int]
SMALL: list[Case] = [  # N, M, tiles, plan, its mask heads
    (17, 50, (16, 32), "mixed", 4),
    (1, 33, (16, 32), "mean", 2),
    (20, 20, (16, 32), "streaming", 1),
    (33, 40, (16, 32), "intervals", 1),
    (9, 9, (16, 32), "tiles", 2),
]
LARGE: list[Case] = [
    (300, 700, (128, 128), "mixed", 4),
    (1, 999, (128, 128), "mean", 2),
    (257, 257, (128, 128), "streaming", 1),
    (200, 450, (64, 64), "intervals", 4),
    (100, 130, (128, 128), None, 1),
    (64, 1000, (64, 64), "columns", 2),
    (90, 91, (24, 40), "tiles", 2),  # sizes the kernel is not made for
]


@triton.jit
def convert_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float8_value_is_converted_right(device: str, dtype: torch.dtype) -> None:
    """So that the interpreter's answers below mean something. It has no NaN in this format: those two codes are left out."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FP8)
    found = torch.zeros(256, dtype=dtype, device=device)
    convert_kernel[(1,)](codes.to(device), found, N=256)
    finite = codes.float().isfinite()
    assert int(finite.sum()) == 254
    assert torch.equal(found.cpu()[finite], codes.to(dtype)[finite])


def run_batch(plan: TilePlan, q: Tensor, kv: KVStorage) -> tuple[Tensor, Tensor]:
    """Outputs start as NaN: an element nobody writes is found."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], torch.nan, device=q.device)
    return tile_attention_stored(plan, q, kv, scale=SCALE, out=out, lse=lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "heads", "how", "page"),
    [
        ("mixed", 4, "paged", 16),
        ("mixed", 4, "paged", 32),
        ("mixed", 2, "paged", 128),
        ("mixed", 4, "fp8", 16),
        ("mixed", 4, "paged-fp8", 64),
        ("mean", 2, "paged-fp8", 16),
        ("tiles", 1, "fp8", 16),
    ],
)
def test_a_batch(device: str, dtype: torch.dtype, kind: str, heads: int, how: str, page: int) -> None:
    """Pages smaller than a step of the kernel, as large, and larger."""
    b, hq, hkv, n, m = 2, 4, 2, 33, 110
    q = normal(b, n, hq, 16, seed=n, dtype=dtype).transpose(1, 2)
    kv, k, v = store(how, *(normal(b, hkv, m, 16, seed=seed, dtype=dtype) for seed in (1, 2)), page=page)
    plan = PLANS[kind]((b, hq, hkv, n, m, 32, 32), heads)
    assert_near(
        run_batch(moved(plan, device), q.to(device), to_device(kv, device)), truth(plan, q, k, v, SCALE), TOLERANCE[dtype]
    )


def test_a_plan_for_all_sequences_and_a_scale_for_all(device: str) -> None:
    q = normal(3, 4, 20, 16, seed=0)
    kv, k, v = store("paged-fp8", normal(3, 2, 40, 16, seed=1), normal(3, 2, 40, 16, seed=2))
    assert kv.k_scale is not None
    k = k / kv.k_scale.double()[..., None, None] * kv.k_scale[:1].double()[..., None, None]
    kv = dataclasses.replace(kv, k_scale=kv.k_scale[:1])
    plan = PLANS["columns"]((1, 4, 2, 20, 40, 16, 16), 4)
    assert_near(run_batch(moved(plan, device), q.to(device), to_device(kv, device)), truth(plan, q, k, v, SCALE), 1e-5)


def make_pack(
    cases: list[Case], how: str, dtype: torch.dtype, d: int, page: int = 32, scale: float = SCALE
) -> tuple[list[TilePlan | None], Tensor, KVStorage, list[int], list[int], tuple[Tensor, Tensor]]:
    """Arguments of `attend_pack` on the CPU, 4 and 2 heads, and what must come out."""
    rows, keys = ([0, *itertools.accumulate(case[axis] for case in cases)] for axis in (0, 1))  # type: ignore[misc]
    plans: list[TilePlan | None] = []
    q, stored, outs, lses = [], [], [], []
    for i, (n, m, (bq, bk), kind, heads) in enumerate(cases):
        plans.append(None if kind is None else PLANS[kind]((1, 4, 2, n, m, bq, bk), heads))
        q.append(normal(n, 4, d, seed=i, dtype=dtype))
        kv, k, v = store(how, *(normal(1, 2, m, d, seed=100 * x + i, dtype=dtype) for x in (1, 2)), page=page)
        stored.append(kv)
        out, lse = truth(plans[i], q[i].transpose(0, 1)[None], k, v, scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return plans, torch.cat(q), pack_of(stored), rows, keys, (torch.cat(outs), torch.cat(lses, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", STORAGES)
def test_a_pack_in_one_launch(device: str, dtype: torch.dtype, how: str) -> None:
    plans, q, kv, rows, keys, expected = make_pack(SMALL, how, dtype, 16)
    known = {i: moved(plan, device) for i, plan in enumerate(plans) if plan is not None}
    q = q.to(device)
    out, lse = torch.full_like(q, torch.nan), torch.full((4, len(q)), torch.nan, device=device)
    tile_attention_pack(known, q, to_device(kv, device), rows, keys, scale=SCALE, out=out, lse=lse)
    assert_near((out, lse), expected, TOLERANCE[dtype])


def test_a_launch_writes_rows_of_its_own_sequences_only(device: str) -> None:
    """And reads no list, page, scale or pseudo-key of another; built on a device, lists are longer than their content."""
    plans, q, kv, rows, keys, expected = make_pack(SMALL, "paged-fp8", torch.float32, 16)
    known = {i: moved(plan, device) for i, plan in enumerate(plans) if plan is not None}
    for i in (1, 3):
        plan = known[i]
        longer = {}
        for name in ("full", "partial"):
            x = getattr(plan, name)
            longer[name] = dataclasses.replace(
                x, ids=torch.cat((x.ids[: int(x.offsets[-1])], torch.full_like(x.ids[:1], 2**30).repeat(5)))
            )
        known[i] = dataclasses.replace(plan, **longer)
    q = q.to(device)
    for members in ([1, 3, 4], [0, 2]):
        out, lse = torch.full_like(q, torch.nan), torch.full((4, len(q)), torch.nan, device=device)
        own = {i: known[i] for i in members}
        tile_attention_pack(own, q, to_device(kv, device), rows, keys, scale=SCALE, out=out, lse=lse)
        for i in range(len(plans)):
            here = slice(rows[i], rows[i + 1])
            if i in members:
                assert_near((out[here], lse[:, here]), (expected[0][here], expected[1][:, here]), 1e-5)
            else:
                assert bool(out[here].isnan().all()) and bool(lse[:, here].isnan().all())


@pytest.mark.parametrize("how", ["paged", "fp8"])
def test_the_executor_hands_over_what_the_kernel_takes(device: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, where it would not by itself: tiles of two sizes, dense and odd ones beside them, residuals on top."""
    monkeypatch.setattr(executor, "fits_kernel", lambda plan, q: not why_not(q.shape[3], plan.block_q, plan.block_k))
    cases: list[Case] = [*SMALL[:2], (20, 30, (16, 32), None, 1), (30, 50, (32, 16), "columns", 2), (9, 20, (5, 7), "tiles", 4)]
    plans, q, kv, rows, keys, _ = make_pack(cases, how, torch.float32, 16)

    def estimate(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        return v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(q.shape), (q.sum(-1) + k.mean()) * scale

    fixed = normal(1, 4, 30, 16, seed=7), normal(1, 4, 30, seed=8)
    residuals = {0: estimate, 3: fixed}
    assert plans[0] is not None and plans[3] is not None
    known = [None if x is None else dataclasses.replace(x, residual=residuals.get(i)) for i, x in enumerate(plans)]  # type: ignore[arg-type]
    there = [None if x is None else moved(x, device) for x in known]
    if device == "cuda":
        there[3] = dataclasses.replace(there[3], residual=tuple(x.cuda() for x in fixed))  # type: ignore[type-var,arg-type]
    out, lse = attend_pack(there, q.to(device), to_device(kv, device), rows, keys, scale=SCALE)
    for i, plan in enumerate(known):
        here = slice(rows[i], rows[i + 1])
        own = kv.sequence(i, keys[i], keys[i + 1] - keys[i])
        k, v = (x.double() for x in own.to_contiguous(torch.float32))
        one = q[here].transpose(0, 1)[None]
        expected = truth(plan, one, k, v, SCALE)
        assert_near((out[here].transpose(0, 1)[None], lse[None, :, here]), expected, 1e-5)
        got = attend_stored(there[i], one.to(device), to_device(own, device), scale=SCALE)
        assert_near(got, expected, 1e-5)


def test_pages_beyond_31_bits(device: str) -> None:
    """The second page lies 2**31 elements after the first. Only the touched part of the buffer exists."""
    far = 2**31 + 64
    k, v = (normal(2, 1, 16, 16, seed=seed, dtype=torch.float16) for seed in (1, 2))
    stored = torch.empty(far + 256, dtype=torch.float16, device=device).as_strided((2, 1, 16, 16), (far, 256, 16, 1))
    kv = KVStorage(stored.copy_(k), v.to(device), torch.tensor([[1, 0]], dtype=torch.int32, device=device))
    q = normal(1, 2, 20, 16, seed=0, dtype=torch.float16)
    plan = PLANS["tiles"]((1, 2, 1, 20, 30, 16, 16), 2)
    flat = (x.flip(0).transpose(0, 1).reshape(1, 1, 32, 16)[:, :, :30].double() for x in (k, v))
    assert_near(run_batch(moved(plan, device), q.to(device), kv), truth(plan, q, *flat, SCALE), 2e-3)


def test_what_the_kernel_is_not_made_for_is_refused(device: str) -> None:
    q = normal(1, 4, 20, 16, seed=0).to(device)
    kv, _, _ = store("fp8", normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 16, seed=2))
    plan = moved(PLANS["tiles"]((1, 4, 2, 20, 40, 24, 16), 4), device)
    with pytest.raises(Unsupported, match="block_q"):
        tile_attention_stored(plan, q, to_device(kv, device), scale=SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [(torch.bfloat16, list(PLANS)), (torch.float16, ["mixed", "tiles"]), (torch.float32, ["mixed", "tiles"])],
    ids=["bf16", "fp16", "fp32"],
)
@pytest.mark.parametrize(("geometry", "d", "page"), GPU_BATCHES, ids=str)
@pytest.mark.parametrize("how", STORAGES)
def test_storage_on_a_gpu(dtype: torch.dtype, kinds: list[str], geometry: Geometry, d: int, page: int, how: str) -> None:
    b, hq, hkv, n, m = geometry[:5]
    q = normal(b, n, hq, d, seed=n, dtype=dtype).transpose(1, 2)
    kv, k, v = store(how, *(normal(b, hkv, m, d, seed=seed, dtype=dtype) for seed in (1, 2)), page=page)
    there = dataclasses.replace(to_device(kv, "cuda"), n_keys=m)
    for kind, softcap in [*((kind, 0.0) for kind in kinds), ("mixed", 5.0)]:
        for heads in (hq, hkv):
            plan = PLANS[kind](geometry, heads)
            got = attend_stored(moved(plan, "cuda"), q.cuda(), there, scale=d**-0.5, softcap=softcap)
            assert_near(got, truth(plan, q, k, v, d**-0.5, softcap=softcap), max(1e-4, TOLERANCE[dtype]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "how", "d"),
    [*((torch.bfloat16, how, 128) for how in STORAGES), (torch.float16, "paged-fp8", 64), (torch.float32, "paged", 64)],
    ids=str,
)
def test_a_pack_on_a_gpu(dtype: torch.dtype, how: str, d: int) -> None:
    scale = d**-0.5  # a model's: the log-sum-exp is as far off as keys' means are rounded, times the size of a logit
    plans, q, kv, rows, keys, expected = make_pack(LARGE, how, dtype, d, scale=scale)
    there = [None if plan is None else moved(plan, "cuda") for plan in plans]
    got = attend_pack(there, q.cuda(), to_device(kv, "cuda"), rows, keys, scale=scale)
    assert_near(got, expected, max(1e-4, TOLERANCE[dtype]))


@pytest.mark.gpu
def test_float8_is_refused_where_triton_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_capability", lambda device_idx: (8, 0))
    kv, _, _ = store("fp8", normal(1, 2, 40, 16, seed=1), normal(1, 2, 40, 16, seed=2))
    plan = moved(PLANS["tiles"]((1, 4, 2, 20, 40, 16, 16), 4), "cuda")
    with pytest.raises(Unsupported, match="to_contiguous"):
        attend_stored(plan, normal(1, 4, 20, 16, seed=0).cuda(), to_device(kv, "cuda"), scale=SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize("how", STORAGES)
def test_nothing_waits_for_the_device(how: str) -> None:
    plans, q, kv, rows, keys, expected = make_pack(LARGE[:-1], how, torch.bfloat16, 128)
    there = [None if plan is None else moved(plan, "cuda") for plan in plans]
    rest = q.cuda(), to_device(kv, "cuda"), rows, keys
    attend_pack(there, *rest, scale=SCALE)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = attend_pack(there, *rest, scale=SCALE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(again, expected, TOLERANCE[torch.bfloat16])
