"""The executor against attention written out pair by pair in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attention_cases import GEOMETRIES, SCALE, random_intervals, random_plan, tensors, truth

from winnow.errors import InvalidRequest, Unsupported
from winnow.workers.attention import csr, executor, plain
from winnow.workers.attention.executor import attend_keys, attend_plan
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 7), (5.0, 7), (0.0, 1), (0.0, 500)])
def test_dense_path(geometry: tuple[int, ...], softcap: float, window: int) -> None:
    q, k, v = tensors(*geometry[:5])
    out, lse = attend_plan(None, q, k, v, scale=SCALE, softcap=softcap, window=window)
    expected, expected_lse = truth(q, k, v, None, softcap, window)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("classes", [False, True], ids=["csr", "mixed"])
@pytest.mark.parametrize("columns", [0.0, 0.2], ids=["tiles", "columns"])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 7), (5.0, 7)])
def test_plan_path(geometry: tuple[int, ...], density: float, classes: bool, columns: float, softcap: float, window: int) -> None:
    q, k, v = tensors(*geometry[:5])
    for heads in sorted({1, geometry[1], geometry[2]}):
        plan = random_plan(geometry, heads, density, classes=classes, columns=columns)
        plan.check()
        out, lse = attend_plan(plan, q, k, v, scale=SCALE, softcap=softcap, window=window)
        expected, expected_lse = truth(q, k, v, plan.to_dense_mask(), softcap, window)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 7)])
def test_intervals(geometry: tuple[int, ...], softcap: float, window: int) -> None:
    b, hq, hkv, n, m, bq, bk = geometry
    q, k, v = tensors(*geometry[:5])
    for batch, heads in ((b, hq), (1, hkv), (1, 1)):
        intervals = random_intervals(batch, heads, n, m, torch.Generator().manual_seed(heads))
        plan = TilePlan.intervals(intervals, n_keys=m, block_q=bq, block_k=bk)
        out, lse = attend_plan(plan, q, k, v, scale=SCALE, softcap=softcap, window=window)
        own = torch.arange(m - n, m)[:, None]
        keep = plan.to_dense_mask()
        if window:  # such a row reads nothing
            keep = keep & (torch.arange(m) > own - window)
        expected, expected_lse = truth(q, k, v, keep, softcap)
        expected = expected.masked_fill((expected_lse == -torch.inf).unsqueeze(-1), 0.0)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_keys_outside_the_intervals_of_a_tile_are_not_read() -> None:
    q, k, v = tensors(1, 4, 2, 64, 200)
    position = torch.arange(136, 200)
    plan = TilePlan.intervals(torch.stack((position - 30, position + 1), -1)[None, None], n_keys=200, block_q=16)
    k, v = k.clone(), v.clone()
    k[:, :, :106], v[:, :, :106] = torch.nan, torch.nan
    assert bool(attend_plan(plan, q, k, v, scale=SCALE)[0].isfinite().all())
    streaming = TilePlan.streaming(batch=1, mask_heads=1, n_rows=64, n_keys=200, sink=0, recent=31)
    torch.testing.assert_close(attend_plan(plan, q, k, v, scale=SCALE), attend_plan(streaming, q, k, v, scale=SCALE))


def test_one_plan_serves_every_sequence_of_a_batch() -> None:
    geometry = (3, 4, 2, 40, 60, 16, 16)
    q, k, v = tensors(*geometry[:5])
    for classes in (False, True):
        plan = random_plan(geometry, 2, 0.3, batch=1, classes=classes)
        out, _ = attend_plan(plan, q, k, v, scale=SCALE)
        torch.testing.assert_close(out, truth(q, k, v, plan.to_dense_mask())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_rounding(dtype: torch.dtype) -> None:
    geometry = (1, 4, 2, 100, 150, 16, 16)
    q, k, v = tensors(*geometry[:5], dtype=dtype)
    for plan in (None, random_plan(geometry, 4, 0.3)):
        out, lse = attend_plan(plan, q, k, v, scale=SCALE)
        expected, expected_lse = truth(q, k, v, None if plan is None else plan.to_dense_mask())
        assert out.dtype == dtype
        assert float((out.double() - expected).norm() / expected.norm()) < 1e-2
        torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits_stay_finite(size: float) -> None:
    geometry = (1, 4, 2, 64, 100, 16, 16)
    q, k, v = tensors(*geometry[:5])
    for plan in (None, random_plan(geometry, 4, 0.3), random_plan(geometry, 4, 0.3, classes=True)):
        out, lse = attend_plan(plan, q * size, k, v, scale=SCALE)
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


def test_tiles_that_are_not_listed_are_not_read() -> None:
    """Keys and values of tiles that no list holds are NaN, which any read of them would carry into the output."""
    geometry = (1, 4, 2, 128, 256, 16, 16)
    q, k, v = tensors(*geometry[:5])
    for mask_heads in (1, 2, 4):
        mask = random_plan(geometry, mask_heads, 0.4).tile_mask()
        mask[..., [1, 2, 5, 7]] = False  # tiles that lie before all queries
        plan = TilePlan.from_mask(mask, n_rows=128, n_keys=256, block_q=16, block_k=16)
        expected = attend_plan(plan, q, k, v, scale=SCALE)
        listed = mask.any(1).any(1)[0].repeat_interleave(16)
        assert int(listed.sum()) == 12 * 16
        holes_k, holes_v = (x.masked_fill(~listed[:, None], torch.nan) for x in (k, v))
        torch.testing.assert_close(attend_plan(plan, q, holes_k, holes_v, scale=SCALE), expected)


def test_gathering_in_small_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = (1, 4, 2, 100, 150, 16, 16)
    q, k, v = tensors(*geometry[:5])
    plan = random_plan(geometry, 4, 0.5)
    whole, _ = attend_plan(plan, q, k, v, scale=SCALE)
    monkeypatch.setattr(csr, "_GATHER_BYTES", 1)
    torch.testing.assert_close(attend_plan(plan, q, k, v, scale=SCALE)[0], whole, atol=1e-6, rtol=1e-6)


def test_row_blocks_of_the_plain_path_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(1, 4, 2, 50, 80)
    for softcap, window in itertools.product((5.0,), (0, 7)):
        whole, _ = attend_plan(None, q, k, v, scale=SCALE, softcap=softcap, window=window)
        monkeypatch.setattr(plain, "_LOGIT_BYTES", 4096)
        pieces, _ = attend_plan(None, q, k, v, scale=SCALE, softcap=softcap, window=window)
        monkeypatch.undo()
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("which", range(3))
def test_tensors_of_any_layout_give_the_same(which: int) -> None:
    geometry = (1, 4, 2, 100, 150, 16, 16)
    inputs = list(tensors(*geometry[:5]))
    for plan in (None, random_plan(geometry, 4, 0.3)):
        expected = attend_plan(plan, *inputs, scale=SCALE)
        moved = list(inputs)
        moved[which] = torch.stack((inputs[which], torch.full_like(inputs[which], torch.nan)), -1)[..., 0]
        assert moved[which].stride(-1) == 2
        torch.testing.assert_close(attend_plan(plan, *moved, scale=SCALE), expected)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = tensors(1, 4, 2, 32, 40)
    plan = TilePlan.dense(batch=1, mask_heads=1, n_rows=32, n_keys=32)
    with pytest.raises(InvalidRequest, match="32 keys"):
        attend_plan(plan, q, k, v, scale=SCALE)
    with pytest.raises(InvalidRequest, match="3 mask heads"):
        attend_plan(TilePlan.dense(batch=1, mask_heads=3, n_rows=32, n_keys=40), q, k, v, scale=SCALE)
    for heads, kv_heads, sequences in ((3, 2, 1), (4, 0, 1), (4, 2, 0)):
        with pytest.raises(InvalidRequest, match="multiple"):
            attend_plan(None, q[:sequences, :heads], k[:sequences, :kv_heads], v[:sequences, :kv_heads], scale=SCALE)
    with pytest.raises(InvalidRequest, match="one device"):
        attend_plan(None, q, k.to("meta"), v, scale=SCALE)
    with pytest.raises(InvalidRequest, match="rows"):
        attend_plan(None, q, k[:, :, :20], v[:, :, :20], scale=SCALE)
    with pytest.raises(Unsupported, match="float64"):
        attend_plan(None, q.double(), k.double(), v.double(), scale=SCALE)
    csr = random_plan((1, 4, 2, 32, 40, 16, 16), 1, 0.5)
    with pytest.raises(InvalidRequest, match="diagonal tiles; build it with"):
        attend_plan(dataclasses.replace(csr, partial=TileLists.empty(2)), q, k, v, scale=SCALE)
    for options in ({"window": -1}, {"softcap": -1.0}, {"softcap": float("nan")}):
        with pytest.raises(InvalidRequest, match="window and softcap"):
            attend_plan(None, q, k, v, scale=SCALE, **options)  # type: ignore[arg-type]


def test_plans_that_no_constructor_made_are_looked_at_before_they_run() -> None:
    """An empty interval ends the process in torch's kernel, a future tile would be read, and so on."""
    q, k, v = tensors(1, 4, 2, 32, 40)
    rows = TilePlan.intervals(torch.tensor([0, 40]).expand(1, 1, 32, 2), n_keys=40, block_q=16, block_k=16)
    assert rows.row_intervals is not None
    csr = random_plan((1, 4, 2, 32, 40, 16, 16), 1, 0.5)
    future = TileLists(csr.full.offsets.clone(), csr.full.ids + 2)
    for broken, word in (
        (dataclasses.replace(rows, row_intervals=rows.row_intervals * 0), "row_intervals"),
        (dataclasses.replace(rows, row_intervals=rows.row_intervals + 1), "causality"),
        (dataclasses.replace(rows, kinds=frozenset({HeadClass.CSR})), "kinds"),
        (dataclasses.replace(csr, full=future), "full"),
        (dataclasses.replace(csr, residual=[]), "residual"),
    ):
        with pytest.raises(InvalidRequest, match=word):
            attend_plan(broken, q, k, v, scale=SCALE)

    def too_few(q: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return q[:, :1].float(), q[:, :1, :, 0].float()

    with pytest.raises(InvalidRequest, match="its residual must return"):
        attend_plan(dataclasses.replace(csr, residual=too_few), q, k, v, scale=SCALE)
    same = dataclasses.replace(csr)
    assert csr.is_made and not same.is_made
    assert torch.equal(attend_plan(same, q, k, v, scale=SCALE)[0], attend_plan(csr, q, k, v, scale=SCALE)[0])


def test_kinds_of_heads_meet_in_one_plan() -> None:
    geometry = (1, 4, 4, 64, 64, 16, 16)
    classes = torch.tensor([list(HeadClass)])
    plan = TilePlan.from_mask(
        torch.zeros(1, 4, 4, 4, dtype=torch.bool), n_rows=64, n_keys=64, block_q=16, block_k=16,
        head_class=classes, sink=torch.full((1, 4), 2), recent=torch.full((1, 4), 5),
        row_intervals=torch.tensor([3, 50]).expand(1, 4, 64, 2),
    )  # fmt: skip
    assert plan.kinds == set(HeadClass)
    q, k, v = tensors(*geometry[:5])
    out, _ = attend_plan(plan, q, k, v, scale=SCALE)
    torch.testing.assert_close(out, truth(q, k, v, plan.to_dense_mask())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 5, 64, 700, 1537])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 5])
def test_one_token_over_a_view_of_a_cache(
    m: int, softcap: float, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_SPLIT_KEYS", 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    gen = torch.Generator().manual_seed(m)
    cache = torch.full((2, 2, 2048, 16), torch.nan, dtype=dtype)
    cache[:, :, :m] = torch.randn(2, 2, m, 16, generator=gen).to(dtype)
    q = torch.randn(6, 16, generator=gen).to(dtype)
    k, v = cache[0][:, :m], cache[1][:, :m]
    out, lse = attend_keys(q, k, v, scale=SCALE, softcap=softcap)
    expected, expected_lse = truth(q[None, :, None], k[None], v[None], None, softcap)
    assert out.dtype == lse.dtype == torch.float32 and out.shape == (6, 16) and lse.shape == (6,)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected[0, :, 0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse[0, :, 0], atol=tolerance, rtol=tolerance)


def test_one_token_over_no_keys_is_an_empty_partial() -> None:
    out, lse = attend_keys(torch.randn(4, 8), torch.empty(2, 0, 8), torch.empty(2, 0, 8), scale=1.0)
    assert torch.equal(out, torch.zeros(4, 8)) and torch.equal(lse, torch.full((4,), -torch.inf))
