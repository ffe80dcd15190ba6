"""DHSA's four masks against their definitions, written out in loops, and against each other on planted structure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from selection import LAYER, kept_mass, plan_of, probabilities
from torch import Tensor
from workloads import Shape, Workload, s1_noise, s2_verticals, s3_slashes, s4_segments, s7_mixture

from winnow.errors import InvalidRequest
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.methods.dhsa import DHSA, MASKS
from winnow.workers.prefill.scoring import diagonal_tiles, forbidden_tiles

pytestmark = pytest.mark.slow

SHAPES = [Shape(512, 512), Shape(700, 700), Shape(333, 801)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_mask = pytest.mark.parametrize("mask", MASKS)


def of_mask(wanted: Tensor, shape: Shape, method: DHSA) -> Tensor:
    sizes = {"block_q": method.block_q, "block_k": method.block_k}
    return TilePlan.from_mask(wanted, n_rows=shape.n, n_keys=shape.m, **sizes).tile_mask()


def tile_means(x: Tensor, size: int) -> Tensor:
    return torch.stack([part.double().mean(2) for part in x.split(size, 2)], 2)


def pooled_scores(method: DHSA, x: Workload) -> Tensor:
    rows, keys = tile_means(x.q, method.block_q), tile_means(x.k, method.block_k)
    return rows @ keys.repeat_interleave(2, 1).transpose(-1, -2)


@each_shape
def test_topk_keeps_the_best_share_of_the_tiles_that_a_row_may_read(shape: Shape) -> None:
    method = DHSA("topk", density=0.3, block_q=64)
    x = s7_mixture(shape, 1)
    scores = pooled_scores(method, x)
    forbidden = forbidden_tiles(shape.n, shape.m, 64, 32, "cpu")
    wanted = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[2]):
        readable = int((~forbidden[row]).sum())
        best = scores[:, :, row, :readable].topk(max(1, int(0.3 * readable)), -1).indices
        wanted[:, :, row].scatter_(-1, best, True)
    wanted[..., 0] = True
    assert torch.equal(plan_of(method, x.q, x.k).tile_mask(), of_mask(wanted, shape, method))


@each_shape
def test_a_spends_its_budget_on_first_and_own_tiles_before_the_best_others(shape: Shape) -> None:
    method = DHSA("a", density=0.35, block_q=64)
    x = s7_mixture(shape, 2)
    scores = pooled_scores(method, x)
    forbidden, own = (f(shape.n, shape.m, 64, 32, "cpu") for f in (forbidden_tiles, diagonal_tiles))
    mask = plan_of(method, x.q, x.k).tile_mask()
    for row in range(scores.shape[2]):
        forced = own[row].clone()
        forced[0] = True
        budget = max(int(forced.sum()), int(0.35 * int((~forbidden[row]).sum())))
        middle = scores[:, :, row].masked_fill(forced | forbidden[row], -torch.inf)
        expected = forced.expand(1, 4, -1).clone()
        expected.scatter_(-1, middle.topk(budget - int(forced.sum()), -1).indices, True)
        assert torch.equal(mask[:, :, row], expected)
        assert bool((mask[:, :, row].sum(-1) == budget).all())


@each_shape
def test_vs_keeps_the_tiles_that_its_columns_and_distances_run_through(shape: Shape) -> None:
    method = DHSA("vs", density=0.03, split=0.25, block_q=64)
    x = s7_mixture(shape, 3)
    last = probabilities(x.q[:, :, -64:], x.k)
    vertical, slash = last.sum(2), torch.zeros(1, 4, shape.m, dtype=torch.float64)
    for row in range(64):
        position = shape.m - 64 + row
        slash[..., : position + 1] += last[:, :, row, : position + 1].flip(-1)
    tokens = int(0.03 * shape.m)
    columns = vertical.topk(int(tokens * 0.25), -1).indices
    distances = slash.topk(tokens - int(tokens * 0.25), -1).indices
    wanted = torch.zeros(1, 4, -(-shape.n // 64), -(-shape.m // 32), dtype=torch.bool)
    for head in range(4):
        wanted[0, head][:, columns[0, head] // 32] = True
        for row in range(shape.n):
            key = row + shape.m - shape.n - distances[0, head]
            wanted[0, head, row // 64, key[key >= 0] // 32] = True
    first = torch.arange(0, shape.n, 64) + shape.m - shape.n
    wanted[:, :, (first + 64).clamp(max=shape.m) <= tokens] = True
    wanted[:, :, -1] = True
    wanted[..., 0] = True
    plan = plan_of(method, x.q, x.k)
    assert torch.equal(plan.tile_mask(), of_mask(wanted, shape, method))
    assert plan.density() < 0.95


@each_shape
def test_vsb_counts_raw_products_in_whole_key_tiles(shape: Shape) -> None:
    method = DHSA("vsb", density=0.3, block_q=64)
    x = s7_mixture(shape, 4)
    n_k = -(-shape.m // 32)
    raw = x.q.double()[:, :, -64:] @ x.k.double().repeat_interleave(2, 1).transpose(-1, -2)
    vertical, slash = (torch.zeros(1, 4, n_k, dtype=torch.float64) for _ in range(2))
    for row in range(64):
        own = (shape.m - 64 + row) // 32
        for tile in range(own + 1):
            amount = raw[:, :, row, tile * 32 : (tile + 1) * 32].sum(-1)
            vertical[:, :, tile] += amount
            slash[:, :, own - tile] += amount
    vertical[..., 0] = slash[..., 0] = torch.inf
    budget = int(0.3 * n_k)
    columns = vertical.topk(int(budget * 0.5), -1).indices
    distances = slash.topk(budget - int(budget * 0.5), -1).indices
    wanted = torch.zeros(1, 4, -(-shape.n // 64), n_k, dtype=torch.bool)
    for head in range(4):
        wanted[0, head][:, columns[0, head]] = True
        for row in range(shape.n):
            tile = (row + shape.m - shape.n) // 32 - distances[0, head]
            wanted[0, head, row // 64, tile[tile >= 0]] = True
    last_own = ((torch.arange(0, shape.n, 64) + 64).clamp(max=shape.n) + shape.m - shape.n - 1) // 32
    wanted[:, :, last_own < budget] = True
    wanted[:, :, -1] = True
    plan = plan_of(method, x.q, x.k)
    assert torch.equal(plan.tile_mask(), of_mask(wanted, shape, method))
    assert plan.density() < 0.95


@each_mask
@each_shape
@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_every_mask_and_tile_size_is_a_valid_plan_that_stays_causal(mask: str, shape: Shape, block_k: int) -> None:
    x = s7_mixture(shape, 5)
    plan = plan_of(DHSA(mask, density=0.1, block_k=block_k), x.q, x.k)
    kept = plan.to_dense_mask()
    assert bool(kept[..., 0].all())
    own = torch.arange(shape.n) + shape.m - shape.n
    assert bool(kept[:, :, torch.arange(shape.n), own].all())
    out, lse = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    truth = probabilities(x.q, x.k) * kept
    expected = truth / truth.sum(-1, keepdim=True) @ x.v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("mask", ["topk", "a"])
def test_the_pooled_masks_by_themselves_give_the_same_plan_in_chunks(mask: str) -> None:
    x = s7_mixture(Shape(700, 700), 6)
    method = DHSA(mask, density=0.2, block_q=64)
    whole = plan_of(method, x.q, x.k).to_dense_mask()
    for start, stop in ((128, 320), (320, 512), (512, 700)):
        part = plan_of(method, x.q[:, :, start:stop], x.k[:, :, :stop]).to_dense_mask()
        assert torch.equal(part, whole[:, :, start:stop, :stop])


@pytest.mark.parametrize(("mask", "density"), [("vs", 0.02), ("vsb", 0.3)])
def test_the_last_rows_steer_the_others_in_the_masks_of_columns_and_distances(mask: str, density: float) -> None:
    x = s7_mixture(Shape(700, 700), 6)
    method = DHSA(mask, density=density, block_q=64)
    q = x.q.clone()
    q[:, :, -64:] = q[:, :, -64:].flip(-1)
    plans = [plan_of(method, rows, x.k).tile_mask()[:, :, :-2] for rows in (x.q, q)]
    assert not torch.equal(*plans)


def recall_at(mask: str, density: float, x: Workload) -> float:
    """Mean recall at a realised density, interpolated between settings on both sides of it."""
    points = []
    for setting in (0.002, 0.004, 0.006, 0.01, 0.04, 0.1, 0.2, 0.3, 0.45, 0.6):
        plan = plan_of(DHSA(mask, density=setting, block_q=64), x.q, x.k)
        points.append((plan.density(), float(kept_mass(plan, x).mean())))
    points.sort()
    assert points[0][0] < density < points[-1][0]
    (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(points) if a[0] <= density <= b[0])
    return y0 if x1 == x0 else y0 + (y1 - y0) * (density - x0) / (x1 - x0)


@pytest.mark.parametrize("seed", [1, 3])
def test_columns_and_distances_win_where_there_are_some_and_pooling_wins_on_topics(seed: int) -> None:
    shape = Shape(1024, 1024)
    lined, slashed, topics = s2_verticals(shape, seed, columns=3), s3_slashes(shape, seed), s4_segments(shape, seed)
    halves = [
        torch.cat((getattr(lined, name)[:, :size], getattr(slashed, name)[:, :size]), 1)
        for name, size in (("q", 2), ("k", 1), ("v", 1))
    ]
    both = Workload(*halves)
    assert recall_at("vs", 0.45, both) > recall_at("topk", 0.45, both) + 0.05
    assert recall_at("topk", 0.45, topics) > recall_at("vs", 0.45, topics) + 0.05


def test_the_layers_softcap_enters_vs() -> None:
    x = s7_mixture(Shape(700, 700), 4)
    method = DHSA("vs", density=0.05, block_q=64)
    plain = plan_of(method, x.q, x.k).tile_mask()
    assert torch.equal(plain, plan_of(method, x.q * 2, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 2)).tile_mask())
    assert not torch.equal(plain, plan_of(method, x.q, x.k, dataclasses.replace(LAYER, softcap=1.0)).tile_mask())


@each_mask
def test_density_one_short_prompts_and_layers_with_a_window_are_dense(mask: str) -> None:
    x = s1_noise(Shape(700, 700))
    plan = DHSA(mask, density=1.0).plan(x.q, x.k, LAYER)
    assert plan is not None and plan.density() == pytest.approx(1.0)
    assert DHSA(mask).plan(x.q[:, :, :128], x.k[:, :, :128], LAYER) is None
    assert DHSA(mask).plan(x.q, x.k, dataclasses.replace(LAYER, window=500)) is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"mask": "best"}, "mask"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": math.nan}, "density"),
        ({"split": -0.1}, "split"),
        ({"block_q": 96}, "block_q"),
        ({"block_k": 16}, "block_k"),
        ({"block_q": 32, "block_k": 64}, "block_k"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        DHSA(**params)


@pytest.mark.parametrize("pooling", ["mean", "bands"])
@pytest.mark.parametrize("mask", ["topk", "a"])
def test_what_follows_steers_pooled_masks_through_the_temperatures_of_bands_alone(mask: str, pooling: str) -> None:
    x = s7_mixture(Shape(768, 768), 9)
    q, k = x.q.clone(), x.k.clone()
    q[:, :, 384:, :8] *= 6
    k[:, :, 384:, :8] *= 6
    method = DHSA(mask, density=0.4, block_q=64, pooling=pooling)
    whole, before = plan_of(method, q, k).to_dense_mask(), plan_of(method, q[:, :, :384], k[:, :, :384]).to_dense_mask()
    assert torch.equal(whole[:, :, :384, :384], before) == (pooling == "mean")
