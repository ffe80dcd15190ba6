"""MInference against its definition: verticals and slashes of the last queries, for every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from selection import LAYER, kept_mass, needles, plan_of, probabilities
from workloads import Shape, Workload, s1_noise, s2_verticals, s3_slashes, s4_segments, s7_mixture

from winnow.errors import InvalidRequest
from winnow.workers.prefill import scoring
from winnow.workers.prefill.methods.minference import MInference, tiles_of_distances
from winnow.workers.prefill.scoring import diagonal_tiles, recent_mass

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32
SHAPES = [LONG, Shape(1024, 1024), Shape(500, 1000), Shape(333, 1001)]
SMALL = MInference(block=32, vertical_tokens=16, slash_tokens=12, sink_tokens=4, recent_tokens=8)


@pytest.mark.parametrize("shape", [Shape(256, 256), Shape(203, 203), Shape(70, 198), Shape(100, 231), Shape(3, 190)], ids=str)
def test_tiles_of_distances_are_those_that_a_kept_pair_lies_in(shape: Shape) -> None:
    gen = torch.Generator().manual_seed(shape.n)
    keep = torch.rand(2, 3, shape.m, generator=gen) < 0.02
    keep[..., 0] = True
    whole = -(-shape.n // 32) * 32  # the last query tile counts as a whole one
    distance = torch.arange(whole)[:, None] + shape.m - shape.n - torch.arange(shape.m)
    pairs = torch.nn.functional.pad(keep, (0, 32))[..., distance.clamp(min=0)] & (distance >= 0)
    padded = torch.nn.functional.pad(pairs, (0, -shape.m % 32))
    expected = padded.unflatten(-1, (-1, 32)).unflatten(-3, (-1, 32)).any(-1).any(-2)
    own = diagonal_tiles(shape.n, shape.m, 32, 32, "cpu")  # in every plan, whatever is found
    assert torch.equal(tiles_of_distances(keep, shape.n, 32) | own, expected | own)


def test_no_verticals_at_all_leave_the_slashes() -> None:
    x = s3_slashes(LONG, 1)
    plan = plan_of(MInference(block=32, vertical_tokens=0, sink_tokens=0, slash_tokens=12, recent_tokens=8), x.q, x.k)
    some = plan_of(MInference(block=32, vertical_tokens=16, sink_tokens=0, slash_tokens=12, recent_tokens=8), x.q, x.k)
    assert torch.equal(plan.tile_mask(), some.tile_mask()) and plan.kept_pairs.sum() < some.kept_pairs.sum()


@pytest.mark.parametrize("n_bytes", [1, 16 * 32 * 132 * 2, 16 * 32 * 132 * 3, 16 * 32 * 132 * 5])
def test_recent_mass_is_the_same_however_few_heads_fit(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    x = s7_mixture(Shape(100, 100, q_heads=12, kv_heads=3), 1)
    whole = recent_mass(x.q[:, :, -32:], x.k, LAYER)
    monkeypatch.setattr(scoring, "SLAB_BYTES", n_bytes)
    for part, expected in zip(recent_mass(x.q[:, :, -32:], x.k, LAYER), whole, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [Shape(100, 100), Shape(7, 50), Shape(1, 20)])
def test_recent_mass_equals_its_definition(shape: Shape) -> None:
    x = s1_noise(shape)
    b = min(32, shape.n)
    vertical, slash = recent_mass(x.q[:, :, -b:], x.k, LAYER)
    expected = probabilities(x.q[:, :, -b:], x.k).float()
    by_distance = torch.zeros_like(slash)
    for i in range(b):
        position = shape.m - b + i
        for j in range(position + 1):
            by_distance[:, :, position - j] += expected[:, :, i, j] / b
    torch.testing.assert_close(vertical, expected.mean(2))
    torch.testing.assert_close(slash, by_distance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planted_columns_are_read_by_every_later_row_as_single_keys(shape: Shape) -> None:
    x = s2_verticals(shape, 1)
    plan = plan_of(SMALL, x.q, x.k)
    mask = plan.to_dense_mask()
    position = torch.arange(shape.m - shape.n, shape.m)
    for column in x.planted["columns"]:
        assert bool(mask[:, :, position >= column, column].all())
    assert plan.density() < 0.45
    assert plan.token_columns is not None and int(plan.token_columns.counts().max()) <= SMALL.vertical_tokens


def test_sharp_columns_hold_nearly_all_mass_at_a_quarter_of_the_pairs() -> None:
    x = s2_verticals(LONG, 3)
    x = Workload(3 * x.q, x.k, x.v, x.planted)
    plan = plan_of(SMALL, x.q, x.k)
    assert plan.density() < 0.4
    assert float(kept_mass(plan, x)[:, :, max(x.planted["columns"]) :].mean()) > 0.98


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [64, 333])
def test_a_planted_offset_is_read_by_every_row(shape: Shape, offset: int) -> None:
    x = s3_slashes(shape, 1, offset=offset)
    plan = plan_of(SMALL, x.q, x.k)
    position = torch.arange(shape.m - shape.n, shape.m)
    row = (position >= offset).nonzero().view(-1)
    assert bool(plan.to_dense_mask()[:, :, row, position[row] - offset].all())
    assert plan.density() < 0.6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forced_keys_and_distances_are_read_by_every_row(shape: Shape) -> None:
    x = s7_mixture(shape, 2)
    mask = plan_of(SMALL, x.q, x.k).to_dense_mask()
    distance = torch.arange(shape.m - shape.n, shape.m)[:, None] - torch.arange(shape.m)
    forced = (distance >= 0) & ((distance < SMALL.recent_tokens) | (torch.arange(shape.m) < SMALL.sink_tokens))
    assert bool((mask | ~forced).all())


def test_a_needle_of_the_last_rows_is_kept_at_a_fifth_of_the_pairs() -> None:
    x = needles(LONG, {480: (8.0, torch.ones(8))})
    plan = plan_of(SMALL, x.q, x.k)
    assert bool(plan.to_dense_mask()[:, :, -8:, 480:488].all())
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) > 0.95
    assert plan.density() < 0.25


def test_known_failure_what_only_earlier_rows_look_for_is_not_seen() -> None:
    x = needles(LONG, {320: (8.0, torch.ones(8))}, rows=slice(600, 632))
    plan = plan_of(SMALL, x.q, x.k)
    assert float(kept_mass(plan, x)[:, :, 600:632].mean()) < 0.3


def test_known_failure_topics_are_neither_columns_nor_diagonals() -> None:
    x = s4_segments(LONG, 5)
    assert float(kept_mass(plan_of(SMALL, x.q, x.k), x).mean()) < 0.75


def test_the_published_budgets_leave_prompts_within_them_dense() -> None:
    x = s1_noise(Shape(80, 6100, q_heads=2, kv_heads=1, head_size=8))
    layer = LAYER
    assert MInference().plan(x.q, x.k[:, :, :6096], layer) is None
    assert MInference().plan(x.q, x.k, layer) is not None
    assert MInference(slash_tokens=100, vertical_tokens=6100).plan(x.q, x.k, layer) is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"vertical_tokens": -1}, "vertical_tokens"),
        ({"slash_tokens": 0}, "slash_tokens"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_tokens": 0}, "recent_tokens"),
        ({"probe_rows": 0}, "probe_rows"),
        ({"block": 16}, "block"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        MInference(**params)
