"""Estimates of what a plan leaves out: mean correction against its definition, and residuals of methods."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attention_cases import GEOMETRIES, SCALE, random_plan, tensors, truth
from torch import Tensor
from workloads import WORKLOADS, Shape

from winnow.errors import InvalidRequest
from winnow.workers.attention import plain
from winnow.workers.attention.estimates import mean_correction
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plan import HeadClass, TilePlan


def corrected(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0, window: int = 0) -> tuple[Tensor, Tensor]:
    """Row by row: the kept keys, and a pseudo-key for every whole tile that all rows of the query tile see and none reads."""
    n, m, bq, bk = plan.n_rows, plan.n_keys, plan.block_q, plan.block_k
    kept = plan.to_dense_mask().expand(q.shape[0], -1, -1, -1)
    listed = plan.tile_mask().expand(q.shape[0], -1, -1, -1).tolist()
    class_ = plan.head_class.expand(q.shape[0], -1)
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:3], -torch.inf)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head, kv = h * plan.mask_heads // q.shape[1], h * k.shape[1] // q.shape[1]
            for i in range(n):
                p = i + m - n
                first = i // bq * bq + m - n
                last = min(first + bq, m) - 1
                allowed = kept[b, head, i].clone()
                if window:
                    allowed[: max(0, p - window + 1)] = False
                keys, values, weights = [k[b, kv, allowed]], [v[b, kv, allowed]], [torch.zeros(int(allowed.sum()))]
                for start in range(0, first + 1 - bk + 1, bk):
                    columns = int(kept[b, head, i, start : start + bk].sum())
                    read = listed[b][head][i // bq][start // bk]
                    seen = not window or start > last - window
                    if class_[b, head] == HeadClass.CSR and not read and seen and columns < bk:
                        keys.append(k[b, kv, start : start + bk].mean(0, keepdim=True))
                        values.append(v[b, kv, start : start + bk].mean(0, keepdim=True))
                        weights.append(torch.tensor([math.log(bk - columns)]))
                logits = torch.cat(keys) @ q[b, h, i] * SCALE
                if softcap:
                    logits = torch.tanh(logits / softcap) * softcap
                logits = logits + torch.cat(weights)
                lse[b, h, i] = logits.logsumexp(0)
                out[b, h, i] = logits.softmax(0) @ torch.cat(values)
    return out, lse


@pytest.mark.parametrize("geometry", [(2, 2, 1, 19, 58, 8, 8), (1, 4, 2, 25, 39, 8, 16), (1, 2, 1, 30, 33, 1, 4)], ids=str)
@pytest.mark.parametrize("classes", [False, True], ids=["csr", "mixed"])
@pytest.mark.parametrize(("softcap", "window", "columns"), [(0.0, 0, 0.0), (0.0, 0, 0.3), (5.0, 0, 0.0), (0.0, 21, 0.3)])
def test_mean_correction_is_what_it_says(
    geometry: tuple[int, ...], classes: bool, softcap: float, window: int, columns: float
) -> None:
    q, k, v = tensors(*geometry[:5])
    for heads in sorted({1, geometry[1], geometry[2]}):
        plan = random_plan(geometry, heads, 0.3, classes=classes, columns=columns, mean_correction=True)
        plan.check()
        out, lse = attend_plan(plan, q, k, v, scale=SCALE, softcap=softcap, window=window)
        expected, expected_lse = corrected(plan, q, k, v, softcap, window)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_mean_correction_is_exact_where_the_keys_of_a_tile_are_equal() -> None:
    geometry = (1, 4, 2, 64, 128, 16, 16)
    q, k, v = tensors(*geometry[:5])
    k = k[:, :, ::16].repeat_interleave(16, 2)
    plan = random_plan(geometry, 4, 0.1, mean_correction=True)
    assert plan.density() < 0.5
    out, lse = attend_plan(plan, q, k, v, scale=SCALE)
    expected, expected_lse = truth(q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_corrected_mass_lies_between_the_kept_and_the_whole(geometry: tuple[int, ...]) -> None:
    """Jensen: the exponential of a tile's mean logit is at most the mean of its exponentials."""
    q, k, v = tensors(*geometry[:5])
    plan = random_plan(geometry, geometry[1], 0.2, mean_correction=True)
    _, lse = attend_plan(plan, q, k, v, scale=SCALE)
    _, kept = attend_plan(dataclasses.replace(plan, mean_correction=False), q, k, v, scale=SCALE)
    _, whole = truth(q, k, v)
    assert bool((lse >= kept - 1e-5).all()) and bool((lse <= whole + 1e-5).all())


def test_mean_correction_brings_the_output_nearer_on_structured_inputs() -> None:
    """Each workload alone may lose a little; together they gain, and so does the noise that no selection can serve."""
    shape = Shape(320, 320)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for name in WORKLOADS:
        x = WORKLOADS[name](shape, 3)
        scale = 1 / math.sqrt(shape.head_size)
        dense, _ = attend_plan(None, x.q, x.k, x.v, scale=scale)
        gen = torch.Generator().manual_seed(3)
        mask = torch.rand(1, 4, 10, 10, generator=gen) < 0.3
        for corrected_too, found in errors.items():
            plan = TilePlan.from_mask(mask, n_rows=320, n_keys=320, block_q=32, block_k=32, mean_correction=corrected_too)
            out, _ = attend_plan(plan, x.q, x.k, x.v, scale=scale)
            found.append(float((out - dense).norm() / dense.norm()))
    assert sum(errors[True]) < 0.9 * sum(errors[False])
    assert errors[True][0] < 0.7 * errors[False][0]  # S1


def test_row_blocks_and_the_fused_path_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = (1, 4, 2, 100, 150, 16, 16)
    q, k, v = tensors(*geometry[:5])
    for heads in (1, 2, 4):
        plan = random_plan(geometry, heads, 0.2, columns=0.1, mean_correction=True)
        whole = mean_correction(plan, q, k, v, scale=SCALE)
        with monkeypatch.context() as patch:
            patch.setattr(plain, "_LOGIT_BYTES", 1)
            torch.testing.assert_close(mean_correction(plan, q, k, v, scale=SCALE), whole, atol=1e-6, rtol=1e-6)
        kept = attend_plan(dataclasses.replace(plan, mean_correction=False), q, k, v, scale=SCALE)
        expected = merge((kept[0], whole[0]), (kept[1], whole[1]))
        torch.testing.assert_close(attend_plan(plan, q, k, v, scale=SCALE), expected, atol=1e-5, rtol=1e-5)


def halves(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan) -> tuple[Tensor, Tensor]:
    """What the plan leaves out, exactly."""
    mask = ~plan.to_dense_mask().repeat_interleave(q.shape[1] // plan.mask_heads, 1)
    mask &= torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return plain.plain(q, k, v, scale=SCALE, mask=mask)


@pytest.mark.parametrize("kind", ["tensors", "estimator"])
@pytest.mark.parametrize("geometry", [(2, 4, 2, 40, 50, 16, 8), (1, 6, 3, 64, 64, 8, 16)], ids=str)
def test_a_residual_of_all_that_was_left_out_gives_dense_attention(geometry: tuple[int, ...], kind: str) -> None:
    q, k, v = tensors(*geometry[:5])
    plan = random_plan(geometry, geometry[1], 0.2)
    assert not plan.is_estimating
    whole = halves(q, k, v, plan)
    assert bool((whole[1] == -torch.inf).any()) and bool((whole[1] > -torch.inf).any())  # early rows lack nothing

    def estimator(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        assert (scale, softcap) == (SCALE, 0.0)
        return halves(q, k, v, plan)

    complete = dataclasses.replace(plan, residual=whole if kind == "tensors" else estimator)
    complete.check()
    assert complete.is_estimating and complete.density() == plan.density()
    out, lse = attend_plan(complete, q, k, v, scale=SCALE)
    expected, expected_lse = truth(q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [HeadClass.DENSE, HeadClass.STREAMING])
def test_a_residual_joins_heads_of_any_class(kind: HeadClass) -> None:
    q, k, v = tensors(1, 4, 2, 32, 40)
    make = TilePlan.dense if kind == HeadClass.DENSE else TilePlan.streaming
    extra = {} if kind == HeadClass.DENSE else {"sink": 2, "recent": 3}
    plan = make(batch=1, mask_heads=1, n_rows=32, n_keys=40, **extra)  # type: ignore[operator]
    gen = torch.Generator().manual_seed(0)
    other = torch.randn(q.shape, generator=gen), torch.randn(q.shape[:3], generator=gen)
    other[0][:, 1], other[1][:, 1] = torch.nan, -torch.inf
    kept, kept_lse = attend_plan(plan, q, k, v, scale=SCALE)
    out, lse = attend_plan(dataclasses.replace(plan, residual=other), q, k, v, scale=SCALE)
    expected, expected_lse = merge((kept, other[0]), (kept_lse, other[1]))
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    torch.testing.assert_close(out[:, 1], kept[:, 1])


def test_a_residual_that_does_not_fit_is_refused() -> None:
    q, k, v = tensors(1, 4, 2, 32, 32)
    plan = TilePlan.dense(batch=1, mask_heads=1, n_rows=32, n_keys=32)
    plan = dataclasses.replace(plan, residual=(torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32)))
    with pytest.raises(InvalidRequest, match=r"residual needs an output of \[1, 4, 32, 16\]"):
        attend_plan(plan, q, k, v, scale=SCALE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_rounding(dtype: torch.dtype) -> None:
    geometry = (1, 2, 1, 60, 75, 16, 8)
    q, k, v = tensors(*geometry[:5], dtype=dtype)
    plan = random_plan(geometry, 2, 0.3, columns=0.1, mean_correction=True)
    out, lse = attend_plan(plan, q, k, v, scale=SCALE)
    expected, expected_lse = corrected(plan, q.float(), k.float(), v.float())
    assert out.dtype == dtype
    assert float((out.float() - expected).norm() / expected.norm()) < 1e-2
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=1e-3)
