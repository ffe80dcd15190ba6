"""FlexPrefill against what its authors say it does, on planted structure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from workloads import WORKLOADS, Shape, Workload, s1_noise, s2_verticals, s3_slashes, s4_segments, s7_mixture

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


def tile_means(x: Tensor) -> Tensor:
    """[M, D] -> [tiles, D]; the last one is of its real tokens."""
    return torch.stack([tile.mean(0) for tile in x.split(32)])


def tile_sums(mass: list[float]) -> list[float]:
    return [sum(mass[first : first + 32]) for first in range(0, len(mass), 32)]


def last_rows(x: Workload, head: int) -> tuple[list[float], list[float], float]:
    """Of a head's last 32 rows: mean attention by key and by distance, and how far pooled scores are from it."""
    key_head = x.k[0, head * x.k.shape[1] // x.q.shape[1]].double()
    rows, m = x.q[0, head, -32:].double(), len(key_head)
    vertical, slash = [0.0] * m, [0.0] * m
    for i, logits in enumerate(rows @ key_head.T * LAYER.scale):
        position = m - 32 + i
        for j, share in enumerate(logits[: position + 1].softmax(-1).tolist()):
            vertical[j] += share / 32
            slash[position - j] += share / 32
    guess = (tile_means(key_head) @ rows.mean(0) * LAYER.scale).softmax(-1).tolist()
    divergence = 0.0
    for p, q in zip(guess, tile_sums(vertical), strict=True):
        divergence += sum(share * math.log(2 * share / (p + q)) for share in (p, q) if share > 0) / 2
    return vertical, slash, math.sqrt(divergence)


def budget_of(mass: list[float], gamma: float) -> int:
    """Tiles: the largest tokens that hold at most gamma and one more, in whole tiles, and one."""
    total, count = 0.0, 0
    for share in sorted(mass, reverse=True):
        total += share
        count += total <= gamma
    return (count + 1) // 32 + 1


def best_tiles(mass: list[float], budget: int) -> list[int]:
    """Tile 0 and the best others, `budget` in all."""
    sums = tile_sums(mass)
    return [0, *sorted(range(1, len(sums)), key=lambda tile: -sums[tile])][:budget]


def whole_map(x: Workload, head: int, gamma: float) -> set[tuple[int, int]]:
    """The largest shares of the pooled map, all its rows in one ranking, until they sum to gamma times the number of rows."""
    n, m = x.q.shape[2], x.k.shape[2]
    queries = tile_means(x.q[0, head].double())
    keys = tile_means(x.k[0, head * x.k.shape[1] // x.q.shape[1]].double())
    shares = {}
    for row, query in enumerate(queries):
        seen = (min(row * 32 + 31, n - 1) + m - n) // 32 + 1
        row_shares = (keys[:seen] @ query * LAYER.scale).softmax(-1).tolist()
        shares |= {(row, tile): share for tile, share in enumerate(row_shares)}
    taken, total = set(), 0.0
    for place in sorted(shares, key=lambda place: -shares[place]):
        if total >= gamma * len(queries):
            break
        taken.add(place)
        total += shares[place]
    return taken


def tiles_in_loops(x: Workload, head: int, gamma: float, tau: float, least: int) -> set[tuple[int, int]]:
    """A head's (query tile, key tile) by the published algorithm, in float64; no budget is below `least` tiles."""
    n, m = x.q.shape[2], x.k.shape[2]
    vertical, slash, distance = last_rows(x, head)
    aware = distance < tau
    columns, diagonals = (best_tiles(y, least if aware else max(least, budget_of(y, gamma))) for y in (vertical, slash))
    kept = whole_map(x, head, gamma) if aware else set()
    for row in range(n):
        position = row + m - n
        kept |= {(row // 32, tile) for tile in columns if tile * 32 <= position}
        kept |= {(row // 32, (position - tile * 32) // 32) for tile in diagonals if tile * 32 <= position}
    return kept


@pytest.mark.parametrize("shape", [Shape(512, 512), Shape(600, 600), Shape(300, 555)], ids=str)
@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.6, 0.9, 0.95])
def test_tiles_are_those_of_the_algorithm_written_out_in_loops(gamma: float, shape: Shape) -> None:
    for workload, tau in itertools.product(("S1", "S2", "S3", "S4", "S6", "S7"), (0.0, 0.3, 0.84)):
        x = WORKLOADS[workload](shape, 3)
        mask = plan_of(FlexPrefill(gamma=gamma, tau=tau, min_budget=64, block=32), x.q, x.k).tile_mask()
        for head in (0, 3):
            got = {(row, tile) for row, tile in mask[0, head].nonzero().tolist()}
            assert got == tiles_in_loops(x, head, gamma, tau, 2), f"{workload}, head {head}, tau {tau}"


@pytest.mark.parametrize("gamma", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("make", [s1_noise, s2_verticals, s3_slashes, s4_segments, s7_mixture])
def test_probe_rows_keep_the_mass_that_gamma_asks_for(gamma: float, make: Callable[..., Workload]) -> None:
    x = make(LONG, 3)
    plan = plan_of(FlexPrefill(gamma=gamma, tau=0.0, min_budget=EIGHT_TILES, block=32), x.q, x.k)
    recall = (probabilities(x.q, x.k) * plan.to_dense_mask()).sum(-1)[:, :, -32:]
    assert float(recall.mean()) >= gamma - 0.02


def test_planted_columns_are_kept_by_every_row() -> None:
    x = s2_verticals(LONG, 1, columns=4)
    plan = plan_of(FlexPrefill(gamma=0.7, tau=0.0, min_budget=EIGHT_TILES, block=32), x.q, x.k)
    mask = plan.to_dense_mask()
    for column in x.planted["columns"]:
        assert bool(mask[:, :, column:, column].all())
    assert plan.density() < 0.75


@pytest.mark.parametrize(("gamma", "tiles"), [(1 / 64, 1), (30 / 64, 1), (31 / 64, 2), (62 / 64, 2), (63 / 64, 3)])
def test_the_budget_is_the_tokens_within_gamma_and_one_in_whole_tiles_and_one(gamma: float, tiles: int) -> None:
    """64 tokens of equal mass, whose sums are exact, among 36 of none."""
    mass = torch.cat((torch.zeros(1, 2, 36), torch.full((1, 2, 64), 1 / 64)), -1)
    assert FlexPrefill(gamma=gamma, block=32)._budget(mass).tolist() == [[tiles, tiles]]


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


@pytest.mark.parametrize("workload", ["S1", "S2", "S4", "S7"])
def test_a_head_turns_query_aware_where_tau_passes_its_distance(workload: str) -> None:
    x = WORKLOADS[workload](LONG, 2)

    def mask_at(tau: float) -> Tensor:
        return plan_of(FlexPrefill(gamma=0.6, tau=tau, min_budget=32, block=32), x.q, x.k).tile_mask()[0]

    slashed, aware = mask_at(0.0), mask_at(0.84)  # never, and above the largest distance
    for head in range(4):
        distance = last_rows(x, head)[2]
        assert not torch.equal(slashed[head], aware[head])
        assert torch.equal(mask_at(0.999 * distance)[head], slashed[head])
        assert torch.equal(mask_at(1.001 * distance)[head], aware[head])


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


def test_short_prompts_stay_dense() -> None:
    x = s1_noise(LONG)
    assert FlexPrefill().plan(x.q, x.k, LAYER) is None  # 1,000 tokens, min_budget 1,024
    assert FlexPrefill(min_budget=64, block=32).plan(x.q[:, :, :64], x.k[:, :, :64], LAYER) is None
    assert FlexPrefill(min_budget=64, block=32).plan(x.q, x.k, LAYER) is not None


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
