"""Recall, oracle, error, density and maps against brute force in float64 over every pair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from winnow.orchestration.evaluation.maps import AttentionMap, MapSums
from winnow.orchestration.evaluation.metrics import (
    RowMetrics,
    head_densities,
    head_summary,
    kl_divergence,
    row_metrics,
    rows_kept,
    sampled_rows,
)
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import HeadClass, TilePlan

HQ, HKV, D = 4, 2, 16
LAYERS = {
    "plain": LayerSpec(0, HQ, HKV, D, 1 / math.sqrt(D)),
    "window": LayerSpec(0, HQ, HKV, D, 1 / math.sqrt(D), window=40),
    "softcap": LayerSpec(0, HQ, HKV, D, 0.5, softcap=2.0),
}
SIZES = {"square": (100, 100), "prefix": (61, 130)}


def tensors(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, size, D, generator=generator) for heads, size in ((HQ, n), (HKV, m), (HKV, m)))
    return 2 * q, 2 * k, v


def plans(n: int, m: int) -> dict[str, TilePlan]:
    generator = torch.Generator().manual_seed(7)
    n_q, n_k = -(-n // 16), -(-m // 16)
    shape = {"n_rows": n, "n_keys": m, "block_q": 16, "block_k": 16}
    mask = torch.rand(1, HQ, n_q, n_k, generator=generator) < 0.4
    class_ = torch.tensor([[HeadClass.CSR, HeadClass.STREAMING, HeadClass.DENSE, HeadClass.CSR]], dtype=torch.int8)
    recent = torch.full((1, HQ), 9, dtype=torch.int32)
    first = torch.arange(n) + m - n
    intervals = torch.stack((first // 2, first + 1), -1).expand(1, HQ, n, 2)
    return {
        "tiles": TilePlan.from_mask(mask, **shape),
        "shared": TilePlan.from_mask(mask[:, :HKV], **shape),
        "one": TilePlan.from_mask(mask[:, :1], **shape),
        "mixed": TilePlan.from_mask(mask, head_class=class_, sink=recent // 2, recent=recent, **shape),
        "streaming": TilePlan.streaming(batch=1, mask_heads=1, n_rows=n, n_keys=m, sink=4, recent=20),
        "intervals": TilePlan.intervals(intervals, n_keys=m),
    }


def brute(layer: LayerSpec, plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: list[int]) -> RowMetrics:
    """One pair at a time, float64."""
    n, m = q.shape[2], k.shape[2]
    size = plan.block_k if plan else 1
    found: dict[str, list[list[float]]] = {"recall": [], "oracle": [], "error": [], "norm": []}
    mask = None if plan is None else plan.to_dense_mask()
    for head in range(HQ):
        lines: dict[str, list[float]] = {name: [] for name in found}
        for row in rows:
            p = row + m - n
            keys = [j for j in range(p + 1) if not layer.window or j > p - layer.window]
            logits = torch.stack([(q[0, head, row].double() @ k[0, head // 2, j].double()) * layer.scale for j in keys])
            if layer.softcap:
                logits = layer.softcap * torch.tanh(logits / layer.softcap)
            weights = dict(zip(keys, torch.softmax(logits, 0).tolist(), strict=True))
            exact = sum(weight * v[0, head // 2, j].double() for j, weight in weights.items())
            kept = [j for j in keys if mask is None or plan is None or bool(mask[0, head * plan.mask_heads // HQ, row, j])]
            tiles: dict[int, float] = {}
            for j, weight in weights.items():
                tiles[j // size] = tiles.get(j // size, 0.0) + weight
            count = len({j // size for j in kept})
            lines["recall"].append(sum(weights[j] for j in kept))
            lines["oracle"].append(sum(sorted(tiles.values(), reverse=True)[:count]))
            lines["error"].append(float((out[0, head, row].double() - exact).square().sum()))
            lines["norm"].append(float(torch.as_tensor(exact).square().sum()))
        for name, values in lines.items():
            found[name].append(values)
    return RowMetrics(**{name: torch.tensor(values) for name, values in found.items()})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["tiles", "shared", "one", "mixed", "streaming", "intervals"])
@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_row_metrics_equal_brute_force(size: str, name: str, kind: str) -> None:
    n, m = SIZES[size]
    layer, plan = LAYERS[kind], plans(n, m)[name]
    q, k, v = tensors(n, m)
    out, _ = attend_plan(plan, q, k, v, scale=layer.scale, softcap=layer.softcap)
    rows = [0, 1, 17, 40, n - 2, n - 1]
    ours, truth = row_metrics(layer, plan, q[0], k[0], v[0], out[0], rows), brute(layer, plan, q, k, v, out, rows)
    for field in ("recall", "oracle", "error", "norm"):
        torch.testing.assert_close(getattr(ours, field), getattr(truth, field).float(), atol=1e-5, rtol=1e-4)
    assert bool((ours.recall <= ours.oracle + 1e-6).all())
    assert bool((ours.recall < 0.9).any()), "the plan leaves nothing out: this test says nothing"


def test_a_window_is_part_of_what_is_exact() -> None:
    n, m = SIZES["prefix"]
    layer, plan = LAYERS["window"], plans(n, m)["tiles"]
    q, k, v = tensors(n, m)
    out, _ = attend_plan(plan, q, k, v, scale=layer.scale, window=layer.window)
    rows = [0, 30, n - 1]
    ours, truth = row_metrics(layer, plan, q[0], k[0], v[0], out[0], rows), brute(layer, plan, q, k, v, out, rows)
    torch.testing.assert_close(ours.recall, truth.recall, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.error, truth.error, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_dense_recalls_everything(kind: str) -> None:
    layer = LAYERS[kind]
    q, k, v = tensors(61, 130)
    out, _ = attend_plan(None, q, k, v, scale=layer.scale, softcap=layer.softcap, window=layer.window)
    found = row_metrics(layer, None, q[0], k[0], v[0], out[0], list(range(61)))
    assert torch.equal(found.recall, torch.ones(HQ, 61)) and torch.equal(found.oracle, torch.ones(HQ, 61))
    assert bool((found.error <= 1e-10 * found.norm).all())
    whole = TilePlan.dense(batch=1, mask_heads=HQ, n_rows=61, n_keys=130, block_q=16, block_k=16)
    through_plan = row_metrics(replace(layer, window=0), whole, q[0], k[0], v[0], out[0], [0, 60])
    torch.testing.assert_close(through_plan.recall, torch.ones(HQ, 2))


def test_an_estimate_shows_in_the_error_and_not_in_recall() -> None:
    q, k, v = tensors(100, 100)
    layer, plan = LAYERS["plain"], plans(100, 100)["tiles"]
    rows = list(range(0, 100, 9))
    exact, lse = attend_plan(None, q, k, v, scale=layer.scale)
    kept, kept_lse = attend_plan(plan, q, k, v, scale=layer.scale)
    missing = torch.log((lse.double().exp() - kept_lse.double().exp()).clamp(min=1e-30)).float()
    share = (missing - lse).exp()[..., None]
    rest = (exact - (1 - share) * kept) / share.clamp(min=1e-12)
    perfect = replace(plan, residual=(rest, missing))
    out, _ = attend_plan(perfect, q, k, v, scale=layer.scale)
    plain = row_metrics(layer, plan, q[0], k[0], v[0], kept[0], rows)
    estimated = row_metrics(layer, perfect, q[0], k[0], v[0], out[0], rows)
    assert torch.equal(plain.recall, estimated.recall)
    assert float(estimated.error.sum()) < 1e-6 * float(plain.error.sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["tiles", "shared", "one", "mixed", "streaming", "intervals"])
def test_head_densities_are_the_plans_density_head_by_head(size: str, name: str) -> None:
    n, m = SIZES[size]
    plan = plans(n, m)[name]
    densities = head_densities(plan)
    counted = plan.to_dense_mask()[0].sum((1, 2)).double() / (n * (m - n) + n * (n + 1) // 2)
    assert densities == pytest.approx(counted.tolist())
    assert sum(densities) / len(densities) == pytest.approx(plan.density())


def test_rows_kept_are_those_rows_of_the_mask() -> None:
    plan = plans(61, 130)["mixed"]
    rows = [0, 1, 2, 15, 16, 40, 59, 60]
    assert torch.equal(rows_kept(plan, rows), plan.to_dense_mask()[0][:, rows])


@pytest.mark.parametrize(("n", "count"), [(1, 64), (10, 64), (64, 64), (1000, 64), (1000, 5), (8192, 64)])
def test_sampled_rows_are_one_of_each_of_as_many_equal_parts(n: int, count: int) -> None:
    """No part of a prompt stands out: its last rows, which many methods treat apart, count as much as any others."""
    rows = sampled_rows(n, count)
    assert len(rows) == min(n, count)
    parts = len(rows)
    assert all(part * n // parts <= row < (part + 1) * n / parts for part, row in enumerate(rows))


def test_kl_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = (3 * torch.randn(50, generator=generator) for _ in range(2))
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x.double()) for x in (dense, other)))
    assert kl_divergence(dense, other) == pytest.approx(float(expected))
    assert kl_divergence(dense, dense + 5) == pytest.approx(0.0, abs=1e-9)


def test_head_summary_is_mean_fifth_percentile_and_least() -> None:
    values = torch.stack((torch.arange(101) / 100, torch.ones(101)))
    found = head_summary(values)
    assert found["mean"] == pytest.approx([0.5, 1.0])
    assert found["p5"] == pytest.approx([0.05, 1.0])
    assert found["min"] == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_map_is_the_mean_mass_of_its_cells(kind: str) -> None:
    n, layer, head = 300, LAYERS[kind], 3
    q, k, _ = tensors(n, n)
    plan = plans(n, n)["tiles"]
    sums, chunked = MapSums(layer.idx, head, n), MapSums(layer.idx, head, n)
    sums.add(layer, plan, q[0], k[0])
    found = sums.finished()
    assert (found.cell, found.mass.shape) == (4, (75, 75))
    logits = q[0, head].double() @ k[0, head // 2].double().T * layer.scale
    if layer.softcap:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    if layer.window:
        allowed &= torch.ones(n, n, dtype=torch.bool).triu(1 - layer.window)
    mass = logits.masked_fill(~allowed, -torch.inf).softmax(-1).view(75, 4, 75, 4).sum(3).mean(1)
    torch.testing.assert_close(torch.from_numpy(found.mass), mass.float(), atol=1e-6, rtol=1e-5)
    pairs = (plan.to_dense_mask()[0, head] & allowed).view(75, 4, 75, 4).sum((1, 3))
    causal = allowed.view(75, 4, 75, 4).sum((1, 3)).clamp(min=1)
    torch.testing.assert_close(torch.from_numpy(found.kept), (pairs / causal).float())
    for start, end in ((0, 130), (130, n)):  # a border in the middle of a cell
        chunked.add(layer, None, q[0, :, start:end], k[0, :, :end])
    torch.testing.assert_close(torch.from_numpy(chunked.finished().mass), torch.from_numpy(found.mass), atol=1e-6, rtol=1e-5)
    assert bool((chunked.finished().kept == (causal > 0).numpy() * (allowed.view(75, 4, 75, 4).sum((1, 3)) > 0).numpy()).all())


def test_a_map_survives_its_json_up_to_half_precision() -> None:
    q, k, _ = tensors(130, 130)
    sums = MapSums(0, 1, 130)
    sums.add(LAYERS["plain"], None, q[0], k[0])
    found = sums.finished()
    again = AttentionMap.from_json(found.to_json())
    assert (again.layer, again.head, again.n_tokens, again.cell) == (0, 1, 130, found.cell)
    torch.testing.assert_close(torch.from_numpy(again.mass), torch.from_numpy(found.mass), atol=1e-6, rtol=1e-3)
    assert bool((again.kept == found.kept.round(3)).all())
