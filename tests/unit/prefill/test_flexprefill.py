"""FlexPrefill against what its authors say it does, on planted structure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from workloads import Shape, Workload, s1_noise, s2_verticals, s3_slashes, s4_segments, s7_mixture

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill import scoring
from winnow.workers.prefill.methods import flexprefill
from winnow.workers.prefill.methods.flexprefill import FlexPrefill

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32, 64 and 128
EIGHT_TILES = 256  # of 32, as the default of 1,024 tokens is eight of 128; the first column and diagonal count among them
LAYER = LayerSpec(0, 4, 2, 32, 1 / math.sqrt(32))


def plan_of(method: FlexPrefill, q: Tensor, k: Tensor, layer: LayerSpec = LAYER) -> TilePlan:
    plan = method.plan(q, k, layer)
    assert plan is not None
    plan.check()
    return plan


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * LAYER.scale
    n, m = logits.shape[-2:]
    return logits.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf).softmax(-1)


@pytest.mark.parametrize("gamma", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("make", [s1_noise, s2_verticals, s3_slashes, s4_segments, s7_mixture])
def test_probe_rows_keep_the_mass_that_gamma_asks_for(gamma: float, make: Callable[..., Workload]) -> None:
    x = make(LONG, 3)
    plan = plan_of(FlexPrefill(gamma=gamma, tau=0.0, min_budget=EIGHT_TILES, block=32), x.q, x.k)
    recall = (probabilities(x.q, x.k) * plan.to_dense_mask()).sum(-1)[:, :, -32:]
    assert float(recall.mean()) >= gamma - 0.02


def test_planted_columns_are_kept_and_the_budget_stays_near_their_number() -> None:
    x = s2_verticals(LONG, 1, columns=4)
    plan = plan_of(FlexPrefill(gamma=0.7, tau=0.0, min_budget=EIGHT_TILES, block=32), x.q, x.k)
    mask = plan.to_dense_mask()
    for column in x.planted["columns"]:
        assert bool(mask[:, :, column:, column].all())
    assert plan.density() < 0.75


@pytest.mark.parametrize("shape", [LONG, Shape(1024, 1024), Shape(500, 1000), Shape(333, 1001)])
@pytest.mark.parametrize("offset", [64, 200, 333, 511])
def test_the_diagonal_of_a_planted_offset_is_kept_by_every_row(shape: Shape, offset: int) -> None:
    x = s3_slashes(shape, 1, offset=offset)
    plan = plan_of(FlexPrefill(gamma=0.5, tau=0.0, min_budget=64, block=32, adjacent_diagonals=True), x.q, x.k)
    row = torch.arange(shape.n)
    position = row + shape.m - shape.n
    row, position = row[position >= offset], position[position >= offset]
    assert bool(plan.to_dense_mask()[:, :, row, position - offset].all())
    assert plan.density() < 0.9


def test_a_planted_offset_that_is_a_whole_number_of_tiles_needs_one_diagonal() -> None:
    x = s3_slashes(LONG, 1, offset=320)
    mask = plan_of(FlexPrefill(gamma=0.3, tau=0.0, min_budget=64, block=32), x.q, x.k).tile_mask()
    rows = torch.arange(10, 32)
    assert bool(mask[:, :, rows, rows - 10].all())


def test_noise_makes_it_dense() -> None:
    x = s1_noise(LONG, 2)
    assert plan_of(FlexPrefill(tau=0.0, min_budget=64, block=32), x.q, x.k).density() > 0.95


def test_tau_decides_which_heads_are_query_aware() -> None:
    """With tau 0 columns reach gamma, with tau above the largest distance every head has the least columns plus its map."""
    x = s1_noise(LONG, 2)
    budget = 64
    aware = plan_of(FlexPrefill(gamma=0.05, tau=0.84, min_budget=budget, block=32), x.q, x.k)
    slashed = plan_of(FlexPrefill(gamma=0.9, tau=0.0, min_budget=budget, block=32), x.q, x.k)
    assert aware.density() < 0.3 < 0.95 < slashed.density()


def test_query_aware_heads_follow_topics_that_no_column_or_diagonal_can() -> None:
    x = s4_segments(LONG, 5)
    plan = plan_of(FlexPrefill(gamma=0.9, tau=0.84, min_budget=32, block=32), x.q, x.k)
    recall = (probabilities(x.q, x.k) * plan.to_dense_mask()).sum(-1)
    assert float(recall.mean()) >= plan.density() + 0.25


def test_the_layers_scale_and_softcap_enter_the_selection() -> None:
    x = s7_mixture(LONG, 4)
    method = FlexPrefill(min_budget=32, block=32)
    plain = plan_of(method, x.q, x.k).tile_mask()
    rescaled = plan_of(method, x.q * 2, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 2)).tile_mask()
    assert torch.equal(plain, rescaled)
    assert not torch.equal(plain, plan_of(method, x.q, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 8)).tile_mask())
    assert not torch.equal(plain, plan_of(method, x.q, x.k, dataclasses.replace(LAYER, softcap=1.0)).tile_mask())


def test_short_prompts_and_layers_with_a_window_stay_dense() -> None:
    x = s1_noise(LONG)
    assert FlexPrefill().plan(x.q, x.k, LAYER) is None  # 1,000 tokens, min_budget 1,024
    assert FlexPrefill(min_budget=64, block=32).plan(x.q[:, :, :64], x.k[:, :, :64], LAYER) is None
    windowed = dataclasses.replace(LAYER, window=500)
    assert FlexPrefill(min_budget=64, block=32).plan(x.q, x.k, windowed) is None
    wide = dataclasses.replace(LAYER, window=1000)
    assert FlexPrefill(min_budget=64, block=32).plan(x.q, x.k, wide) is not None


def test_a_share_of_the_heads_gets_its_share_of_the_plan() -> None:
    """What tensor parallelism needs."""
    x = s7_mixture(LONG, 6)
    method = FlexPrefill(min_budget=32, block=32)
    whole = plan_of(method, x.q, x.k).tile_mask()
    half = plan_of(method, x.q[:, 2:], x.k[:, 1:]).tile_mask()
    assert torch.equal(whole[:, 2:], half)


def test_slabs_of_heads_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(LONG, 6)
    method = FlexPrefill(min_budget=32, block=32)
    whole = plan_of(method, x.q, x.k).tile_mask()
    monkeypatch.setattr(scoring, "SLAB_BYTES", 1)
    assert torch.equal(whole, plan_of(method, x.q, x.k).tile_mask())


def test_the_budget_limits_hold() -> None:
    x = s1_noise(LONG)
    mask = plan_of(FlexPrefill(tau=0.0, min_budget=64, max_budget=64, block=32), x.q, x.k).tile_mask()
    last = mask[0, :, -1]
    assert bool((last.sum(-1) <= 4).all()) and bool((last.sum(-1) >= 2).all())


@pytest.mark.parametrize("shape", [Shape(100, 100), Shape(7, 50), Shape(1, 20)])
def test_probe_mass_equals_its_definition(shape: Shape) -> None:
    x = s1_noise(shape)
    b = min(32, shape.n)
    vertical, slash = scoring.recent_mass(x.q[:, :, -b:], x.k, LAYER)
    expected = probabilities(x.q[:, :, -b:], x.k)
    by_distance = torch.zeros_like(slash)
    for i in range(b):
        position = shape.m - b + i
        for j in range(position + 1):
            by_distance[:, :, position - j] += expected[:, :, i, j] / b
    torch.testing.assert_close(vertical, expected.mean(2))
    torch.testing.assert_close(slash, by_distance)
    torch.testing.assert_close(slash.sum(-1), torch.ones(1, 4))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.lists(st.floats(0, 1), min_size=2, max_size=20))
@settings(max_examples=50, deadline=None)
def test_distance_of_any_two_distributions_is_finite_and_bounded(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    p, q = (torch.tensor(x[:n], dtype=torch.float64) for x in (a, b))
    if p.sum() < 1e-3 or q.sum() < 1e-3:
        return
    distance = float(flexprefill._js_distance(p / p.sum(), q / q.sum()))
    assert 0 <= distance <= math.sqrt(math.log(2)) + 1e-6
    assert float(flexprefill._js_distance(p / p.sum(), p / p.sum())) < 1e-6


def test_ties_go_to_the_lower_tile() -> None:
    mass = torch.tensor([[[0.0, 1.0, 2.0, 2.0, 1.0, 2.0]]])
    kept = flexprefill._top(mass, torch.tensor([[3]]))
    assert kept.tolist() == [[[True, False, True, True, False, False]]]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"tau": -0.1}, "tau"),
        ({"block": 48}, "block"),
        ({"min_budget": 0}, "min_budget"),
        ({"min_budget": 512, "max_budget": 256}, "max_budget"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        FlexPrefill(**params)
