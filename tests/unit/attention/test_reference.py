"""The differentiable reference: equal to the executor forwards, to finite differences and dense attention backwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import GEOMETRIES, SCALE, random_plan, tensors, truth
from torch import Tensor

from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.reference import attend_reference


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 7)])
def test_it_computes_what_the_executor_computes(geometry: tuple[int, ...], softcap: float, window: int) -> None:
    q, k, v = tensors(*geometry[:5])
    gen = torch.Generator().manual_seed(0)
    residual = torch.randn(q.shape, generator=gen), torch.randn(q.shape[:3], generator=gen)
    residual[1][:, 0] = -torch.inf
    residual[0][:, 0] = torch.nan
    plans: list[TilePlan | None] = [None]
    for heads in sorted({1, geometry[1], geometry[2]}):
        plan = random_plan(geometry, heads, 0.3, classes=heads > 1, columns=0.2, mean_correction=True)
        plans += [plan, dataclasses.replace(plan, mean_correction=False, residual=residual)]
    for plan in plans:
        out, lse = attend_reference(plan, q, k, v, scale=SCALE, softcap=softcap, window=window)
        expected, expected_lse = attend_plan(plan, q, k, v, scale=SCALE, softcap=softcap, window=window)
        assert out.dtype == lse.dtype == torch.float32
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def leaves(geometry: tuple[int, ...], d: int = 4) -> tuple[Tensor, ...]:
    return tuple(x.double().contiguous().requires_grad_() for x in tensors(*geometry[:5], d=d))


@pytest.mark.parametrize("kind", ["dense", "tiles", "mean correction", "residual"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_its_gradients_are_those_of_finite_differences(kind: str, softcap: float) -> None:
    geometry = (1, 2, 1, 6, 9, 2, 2)
    plan = None if kind == "dense" else random_plan(geometry, 2, 0.2, columns=0.2, mean_correction=kind == "mean correction")
    q, k, v = leaves(geometry)
    gen = torch.Generator().manual_seed(0)
    extra = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in (q.shape, q.shape[:3])]

    def run(q: Tensor, k: Tensor, v: Tensor, *residual: Tensor) -> tuple[Tensor, Tensor]:
        used = dataclasses.replace(plan, residual=residual) if residual and plan is not None else plan
        return attend_reference(used, q, k, v, scale=SCALE, softcap=softcap)

    assert torch.autograd.gradcheck(run, (q, k, v, *(extra if kind == "residual" else [])))


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[2]], ids=str)
def test_its_gradients_are_those_of_torch_attention(geometry: tuple[int, ...]) -> None:
    b, hq, hkv, n, m, bq, bk = geometry
    everything = torch.ones(b, hq, -(-n // bq), -(-m // bk), dtype=torch.bool)
    plan = TilePlan.from_mask(everything, n_rows=n, n_keys=m, block_q=bq, block_k=bk)
    q, k, v = leaves(geometry)
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(q.shape, generator=gen, dtype=torch.float64)
    group = hq // hkv
    causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), causal, scale=SCALE
    )
    expected = torch.autograd.grad((dense * weight).sum(), (q, k, v))
    for used in (None, plan):
        out, _ = attend_reference(used, q, k, v, scale=SCALE)
        torch.testing.assert_close(out, dense)
        torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), (q, k, v)), expected)


def test_what_is_not_kept_has_no_gradient() -> None:
    geometry = (1, 2, 1, 32, 64, 8, 8)
    plan = random_plan(geometry, 1, 0.1)
    q, k, v = leaves(geometry)
    out, lse = attend_reference(plan, q, k, v, scale=SCALE)
    assert torch.allclose(out.float(), truth(q, k, v, plan.to_dense_mask())[0], atol=1e-6)
    (out.square().sum() + lse.sum()).backward()
    unread = ~plan.to_dense_mask()[0, 0].any(0)
    assert bool(unread.any())
    assert k.grad is not None and v.grad is not None
    assert torch.equal(k.grad[0, 0].abs().sum(-1) == 0, unread) and torch.equal(v.grad[0, 0].abs().sum(-1) == 0, unread)
