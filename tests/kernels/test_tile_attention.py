"""The Triton kernel against its reference: float32 tight, half precision within its rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.kernels.tile_attention.kernel import tile_attention
from winnow.workers.attention.kernels.tile_attention.reference import tile_attention_reference
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.attention.reference import attend_reference

SCALE = 0.25
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # wrong in the interpreter


def make(
    device: str, dtype: torch.dtype, n: int, m: int, *, batch: int = 1, hq: int = 2, hkv: int = 1, d: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """q is a transposed view, k and v are slices of a longer cache whose rest is NaN."""
    gen = torch.Generator().manual_seed(n + m)
    q = torch.randn(batch, n, hq, d, generator=gen).to(dtype).transpose(1, 2).to(device)
    cache = torch.full((2, batch, hkv, m + 37, d), torch.nan, dtype=dtype)
    cache[:, :, :, :m] = torch.randn(2, batch, hkv, m, d, generator=gen).to(dtype)
    cache = cache.to(device)
    return q, cache[0][:, :, :m], cache[1][:, :, :m]


def make_plan(
    device: str,
    n: int,
    m: int,
    bq: int,
    bk: int,
    *,
    batch: int = 1,
    heads: int = 2,
    density: float = 0.3,
    classes: Tensor | None = None,
    columns: float = 0.0,
    mean_correction: bool = False,
) -> TilePlan:
    gen = torch.Generator().manual_seed(m)
    mask = torch.rand(batch, heads, -(-n // bq), -(-m // bk), generator=gen) < density
    singles = (torch.rand(*mask.shape[:3], m, generator=gen) < columns).to(device)
    plan = TilePlan.from_mask(
        mask.to(device), n_rows=n, n_keys=m, block_q=bq, block_k=bk, head_class=classes,
        sink=torch.full((batch, heads), 5), recent=torch.full((batch, heads), 37),
        token_columns=TileLists.from_mask(singles) if columns else None, mean_correction=mean_correction,
        row_intervals=intervals(device, batch, heads, n, m) if classes is not None else None,
    )  # fmt: skip
    plan.check()
    return plan


def intervals(device: str, batch: int, heads: int, n: int, m: int) -> Tensor:
    """[B, Hm, N, 2]: windows of another length for every head, whose ends jump from row to row."""
    gen = torch.Generator().manual_seed(n)
    position = torch.arange(m - n, m).expand(batch, heads, n)
    lo = position - torch.randint(0, m, (batch, heads, 1), generator=gen) - torch.randint(0, 9, position.shape, generator=gen)
    hi = position + 1 - torch.randint(-1, 5, position.shape, generator=gen)
    return torch.stack((lo, hi), -1).to(device)


def compare(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Outputs start as NaN: an element nobody writes is found."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], torch.nan, device=q.device)
    got, got_lse = tile_attention(plan, q, k, v, scale=SCALE, out=out, lse=lse)
    assert got is out and got_lse is lse
    expected, expected_lse = tile_attention_reference(plan, q, k, v, scale=SCALE)
    assert bool(out.isfinite().all())
    assert float((out.float() - expected).norm() / expected.norm()) < TOLERANCE[q.dtype]
    torch.testing.assert_close(lse, expected_lse, atol=max(1e-5, TOLERANCE[q.dtype] / 10), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_lengths_around_a_tile(device: str, dtype: torch.dtype, n: int) -> None:
    q, k, v = make(device, dtype, n, n)
    compare(make_plan(device, n, n, 32, 32), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_keys(device: str, dtype: torch.dtype) -> None:
    q, k, v = make(device, dtype, 1000, 1000)
    compare(make_plan(device, 1000, 1000, 128, 128, density=0.1), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "bq", "bk"), [(1, 200, 16, 64), (64, 200, 32, 16), (65, 131, 64, 128), (100, 164, 16, 32)])
def test_more_keys_than_rows(device: str, dtype: torch.dtype, n: int, m: int, bq: int, bk: int) -> None:
    q, k, v = make(device, dtype, n, m)
    compare(make_plan(device, n, m, bq, bk), q, k, v)


@pytest.mark.parametrize(("hq", "hkv", "heads"), [(4, 2, 4), (4, 2, 2), (4, 2, 1), (6, 3, 3), (3, 3, 1)])
def test_grouped_heads_and_shared_lists(device: str, hq: int, hkv: int, heads: int) -> None:
    q, k, v = make(device, torch.float32, 65, 90, batch=2, hq=hq, hkv=hkv)
    compare(make_plan(device, 65, 90, 32, 32, batch=2, heads=heads), q, k, v)
    compare(make_plan(device, 65, 90, 32, 32, batch=1, heads=heads), q, k, v)  # one plan for both sequences


@pytest.mark.parametrize("head_size", [8, 20, 64, 96])
def test_head_sizes(device: str, head_size: int) -> None:
    q, k, v = make(device, torch.float32, 40, 70, d=head_size)
    compare(make_plan(device, 40, 70, 16, 32), q, k, v)


def test_empty_selection_leaves_the_diagonal(device: str) -> None:
    q, k, v = make(device, torch.float32, 65, 130)
    compare(make_plan(device, 65, 130, 32, 32, density=0.0), q, k, v)


@pytest.mark.parametrize(
    ("dtype", "d", "block"), [(torch.float32, 16, 16), pytest.param(torch.float16, 64, 64, marks=pytest.mark.gpu)], ids=str
)
def test_a_row_with_no_list_at_all_gives_zero_and_minus_infinity(device: str, dtype: torch.dtype, d: int, block: int) -> None:
    """No constructor makes such a plan; the kernel must still write every element."""
    q, k, v = make(device, dtype, 40, 40, d=d)
    plan = make_plan(device, 40, 40, block, block)
    rows = plan.full.offsets.numel() - 1
    empty = TilePlan(
        40,
        40,
        block,
        block,
        plan.head_class,
        TileLists.empty(rows, device),
        TileLists.empty(rows, device),
        plan.sink,
        plan.recent,
    )
    for out_dtype in {dtype, torch.float32}:  # an output wider than q goes to the general kernel, also on Hopper
        out = torch.full(q.shape, torch.nan, dtype=out_dtype, device=device)
        lse = torch.full(q.shape[:3], torch.nan, device=device)
        tile_attention(empty, q, k, v, scale=SCALE, out=out, lse=lse)
        assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize(("n", "m"), [(65, 65), (50, 130)])
def test_head_classes_in_one_launch(device: str, n: int, m: int) -> None:
    q, k, v = make(device, torch.float32, n, m, hq=4, hkv=4)
    classes = torch.tensor([list(HeadClass)])
    compare(make_plan(device, n, m, 16, 32, heads=4, classes=classes), q, k, v)
    compare(make_plan(device, n, m, 16, 32, heads=4, classes=classes, columns=0.3, mean_correction=True), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "bq", "bk"), [(1, 200, 16, 64), (64, 200, 32, 16), (65, 131, 64, 128), (130, 130, 32, 16)])
@pytest.mark.parametrize("columns", [0.05, 1.0])
def test_token_columns(device: str, dtype: torch.dtype, n: int, m: int, bq: int, bk: int, columns: float) -> None:
    q, k, v = make(device, dtype, n, m)
    plan = make_plan(device, n, m, bq, bk, columns=columns, density=0.2)
    assert plan.token_columns is not None
    compare(plan, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "bq", "bk"), [(1, 200, 16, 64), (64, 200, 32, 16), (65, 131, 64, 128), (150, 150, 32, 16)])
@pytest.mark.parametrize("columns", [0.0, 0.3])
def test_mean_correction(device: str, dtype: torch.dtype, n: int, m: int, bq: int, bk: int, columns: float) -> None:
    q, k, v = make(device, dtype, n, m)
    plan = make_plan(device, n, m, bq, bk, columns=columns, density=0.2, mean_correction=True)
    compare(plan, q, k, v)


@pytest.mark.parametrize(("hq", "hkv", "heads"), [(4, 2, 4), (4, 2, 2), (4, 2, 1)])
def test_columns_and_pseudo_keys_of_grouped_heads_and_shared_lists(device: str, hq: int, hkv: int, heads: int) -> None:
    q, k, v = make(device, torch.float32, 40, 80, batch=2, hq=hq, hkv=hkv)
    for batch in (2, 1):
        plan = make_plan(device, 40, 80, 32, 16, batch=batch, heads=heads, columns=0.1, mean_correction=True)
        compare(plan, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "bq", "bk"), [(1, 70, 16, 16), (65, 65, 32, 16), (50, 131, 16, 64)])
def test_intervals(device: str, dtype: torch.dtype, n: int, m: int, bq: int, bk: int) -> None:
    q, k, v = make(device, dtype, n, m)
    plan = TilePlan.intervals(intervals(device, 1, 2, n, m), n_keys=m, block_q=bq, block_k=bk)
    plan.check()
    compare(plan, q, k, v)


def test_streaming_heads(device: str) -> None:
    q, k, v = make(device, torch.float32, 100, 150)
    for sink, recent in ((0, 1), (4, 40), (0, 33), (70, 100)):
        plan = TilePlan.streaming(
            batch=1, mask_heads=1, n_rows=100, n_keys=150, sink=sink, recent=recent, block_q=32, block_k=16, device=device
        )
        compare(plan, q, k, v)


def test_lists_longer_than_their_content(device: str) -> None:
    """As they are built on a device without waiting for it."""
    q, k, v = make(device, torch.float32, 65, 65)
    plan = make_plan(device, 65, 65, 32, 32)
    n_tiles = plan.n_k_tiles
    padded = [TileLists.from_mask(x.to_mask(n_tiles), compact=False) for x in (plan.full, plan.partial)]
    keys = torch.tensor([0, 3, 33, 60], device=device).expand(plan.full.n_rows, 4)
    for kept in (True, False):
        columns = TileLists.from_ids(keys, keys < 33 if kept else keys < 0, compact=False)
        compare(
            TilePlan.from_mask(
                plan.tile_mask(), n_rows=65, n_keys=65, block_q=32, block_k=32, mean_correction=True, token_columns=columns
            ),
            q, k, v,
        )  # fmt: skip
    compare(TilePlan(65, 65, 32, 32, plan.head_class, padded[0], padded[1], plan.sink, plan.recent), q, k, v)


def test_lists_longer_than_their_content_beside_other_classes(device: str) -> None:
    q, k, v = make(device, torch.float32, 65, 90, hq=4, hkv=4)
    plan = make_plan(device, 65, 90, 16, 32, heads=4, classes=torch.tensor([list(HeadClass)]))
    lists = {name: getattr(plan, name) for name in ("full", "partial")}
    longer = {name: TileLists.from_mask(x.to_mask(plan.n_k_tiles), compact=False) for name, x in lists.items()}
    for x in longer.values():  # what lies beyond the last row means nothing
        x.ids[int(x.offsets[-1]) :] = 2**31 - 1
    compare(dataclasses.replace(plan, **longer), q, k, v)


def test_every_stride_is_honoured(device: str) -> None:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 3, 2, 32, generator=gen).to(device)[:, :, :, ::2].permute(2, 1, 0, 3) for _ in range(3))
    assert q.stride(-1) == 2
    compare(make_plan(device, 40, 40, 16, 16, batch=2, heads=3), q, k, v)


def test_output_lies_as_the_next_product_reads_it(device: str) -> None:
    q, k, v = make(device, torch.float16, 40, 40)
    out, _ = tile_attention(make_plan(device, 40, 40, 16, 16), q, k, v, scale=SCALE)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()


def test_offsets_beyond_31_bits(device: str) -> None:
    """The second head lies 2**31 elements after the first. Only the touched pages of the buffer exist."""
    far = 2**31 + 64
    q, k, v = make(device, torch.float16, 40, 40, hq=2, hkv=2)
    store = torch.empty(far + 40 * 16, dtype=torch.float16, device=device)
    wide = store.as_strided((1, 2, 40, 16), (0, far, 16, 1))
    wide.copy_(k)
    plan = make_plan(device, 40, 40, 16, 16)
    out, lse = tile_attention(plan, q, wide, v, scale=SCALE)
    expected, expected_lse = tile_attention(plan, q, k, v, scale=SCALE)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_what_the_kernel_is_not_made_for_is_refused(device: str) -> None:
    q, k, v = make(device, torch.float32, 40, 40)
    with pytest.raises(Unsupported, match="block_q"):
        tile_attention(make_plan(device, 40, 40, 24, 16), q, k, v, scale=SCALE)
    q, k, v = make(device, torch.float32, 40, 40, d=300)
    with pytest.raises(Unsupported, match="head size"):
        tile_attention(make_plan(device, 40, 40, 16, 16), q, k, v, scale=SCALE)


def test_bfloat16_is_refused_where_it_would_be_wrong() -> None:
    if torch.cuda.is_available():
        q, k, v = make("cuda", torch.bfloat16, 40, 40)
        compare(make_plan("cuda", 40, 40, 16, 16), q, k, v)
        return
    q, k, v = make("cpu", torch.bfloat16, 40, 40)
    with pytest.raises(Unsupported, match="bfloat16"):
        tile_attention(make_plan("cpu", 40, 40, 16, 16), q, k, v, scale=SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "d"), [(torch.float16, 128), (torch.bfloat16, 64)], ids=str)
@pytest.mark.parametrize(("hq", "hkv", "heads"), [(4, 2, 4), (4, 2, 2), (4, 4, 1)])
@pytest.mark.parametrize(("bq", "bk"), [(128, 128), (128, 32), (64, 64), (64, 128)])
def test_sizes_that_hopper_has_its_own_kernel_for(
    dtype: torch.dtype, d: int, hq: int, hkv: int, heads: int, bq: int, bk: int
) -> None:
    for n, m in ((1, 999), (300, 300), (257, 700)):
        q, k, v = make("cuda", dtype, n, m, batch=2, hq=hq, hkv=hkv, d=d)
        compare(make_plan("cuda", n, m, bq, bk, batch=2, heads=heads), q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize(("bq", "bk"), [(128, 128), (64, 32)])
def test_everything_a_plan_says_where_hopper_has_its_own_kernel(bq: int, bk: int) -> None:
    q, k, v = make("cuda", torch.bfloat16, 300, 700, hq=8, hkv=4, d=128)
    classes = torch.tensor([list(HeadClass)]).repeat_interleave(2, 1)
    plan = make_plan("cuda", 300, 700, bq, bk, heads=8, classes=classes, columns=0.1, mean_correction=True)
    compare(plan, q, k, v)
    far = 2**31 + 64  # the second head's keys
    store = torch.empty(3 * far + 700 * 128, dtype=k.dtype, device="cuda")
    compare(plan, q, store.as_strided((1, 4, 700, 128), (0, far, 128, 1)).copy_(k), v)


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_device() -> None:
    q, k, v = make("cuda", torch.bfloat16, 300, 700, hq=4, hkv=2, d=128)
    plan = make_plan(
        "cuda", 300, 700, 128, 128, heads=4, classes=torch.tensor([list(HeadClass)]), columns=0.1, mean_correction=True
    )
    first, _ = attend_plan(plan, q, k, v, scale=SCALE)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = attend_plan(plan, q, k, v, scale=SCALE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_executor_runs_every_kind_of_plan_on_a_gpu(dtype: torch.dtype) -> None:
    """With the kernel where it fits, and otherwise (odd tiles, a window, soft-capping) without."""
    n, m = 100, 170
    q, k, v = make("cuda", dtype, n, m, hq=4, hkv=2)
    gen = torch.Generator(device="cuda").manual_seed(0)
    residual = torch.randn(q.shape, generator=gen, device="cuda"), torch.randn(q.shape[:3], generator=gen, device="cuda")
    for bq, bk, softcap, window in ((32, 16, 0.0, 0), (5, 7, 0.0, 0), (32, 16, 3.0, 0), (32, 16, 0.0, 60), (8, 8, 3.0, 60)):
        plan = make_plan("cuda", n, m, bq, bk, heads=4, classes=torch.tensor([list(HeadClass)]), columns=0.2)
        for used in (
            plan,
            dataclasses.replace(plan, mean_correction=True),
            dataclasses.replace(plan, residual=residual),
            dataclasses.replace(plan, mean_correction=True, residual=residual),
        ):
            out, lse = attend_plan(used, q, k, v, scale=SCALE, softcap=softcap, window=window)
            expected, expected_lse = attend_reference(used, q, k, v, scale=SCALE, softcap=softcap, window=window)
            assert float((out.float() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
            torch.testing.assert_close(lse, expected_lse, atol=max(1e-4, TOLERANCE[dtype]), rtol=1e-4)
