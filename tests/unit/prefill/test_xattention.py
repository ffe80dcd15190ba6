"""XAttention against its definition, what antidiagonals see, and what they cannot."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from selection import LAYER, kept_mass, needles, plan_of
from torch import Tensor
from workloads import Shape, Workload, s1_noise, s2_verticals, s4_segments, s7_mixture

from winnow.errors import InvalidRequest
from winnow.workers.prefill.methods.xattention import XAttention

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32; whole cells
SHAPES = [Shape(128, 128), Shape(107, 107), Shape(70, 134), Shape(60, 131), Shape(3, 126), Shape(1, 90)]
SAME = torch.ones(32)


def shares_by_definition(q: Tensor, k: Tensor, block: int, size: int) -> Tensor:
    """Cell by cell and pair by pair."""
    batch, hq, n, _ = q.shape
    m, group, past = k.shape[2], hq // k.shape[1], k.shape[2] - n
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * LAYER.scale
    shares = torch.zeros(batch, hq, -(-n // block), -(-m // block))
    for first in range(0, n, size):
        rows = min(size, n - first)
        found = []
        for start in range(0, m - size + 1, size):
            if start + size - 1 > first + rows - 1 + past:
                break
            pairs = [(first + size - 1 - i, start + i) for i in range(size) if size - 1 - i < rows]
            found.append(sum(logits[:, :, r, c] for r, c in pairs) / len(pairs))
        for cell, weight in enumerate(torch.stack(found, -1).softmax(-1).unbind(-1)):
            shares[:, :, first // block, cell * size // block] += weight
    return shares


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [8, 16])
def test_shares_equal_their_definition(shape: Shape, stride: int) -> None:
    x = s7_mixture(shape, 1)
    method = XAttention(block=32, stride=stride)
    expected = shares_by_definition(x.q, x.k, 32, stride)
    torch.testing.assert_close(method.tile_shares(x.q, x.k, LAYER), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_each_row_keeps_its_share_and_no_tile_more(threshold: float) -> None:
    x = s7_mixture(LONG, 2)
    method = XAttention(block=32, threshold=threshold)
    mask, shares = plan_of(method, x.q, x.k).tile_mask(), method.tile_shares(x.q, x.k, LAYER)
    kept = (shares * mask).sum(-1)
    wanted = threshold * shares.sum(-1)
    assert bool((kept >= wanted - 1e-4).all())
    optional = mask.clone()
    optional[..., 0] = False
    optional &= ~torch.eye(32, dtype=torch.bool)
    smallest = torch.where(optional, shares, torch.inf).amin(-1)
    assert bool(((kept - smallest < wanted + 1e-4) | ~optional.any(-1)).all())


def test_topics_are_followed_at_less_than_half_the_pairs() -> None:
    x = s4_segments(LONG, 3)
    plan = plan_of(XAttention(block=32), x.q, x.k)
    assert plan.density() < 0.45
    assert float(kept_mass(plan, x).mean()) > 0.93


def test_sharp_columns_are_found_though_a_cell_sees_an_eighth_of_each() -> None:
    x = s2_verticals(LONG, 3)
    x = Workload(3 * x.q, x.k, x.v, x.planted)
    plan = plan_of(XAttention(block=32), x.q, x.k)
    assert plan.density() < 0.7
    assert float(kept_mass(plan, x)[:, :, max(x.planted["columns"]) :].mean()) > 0.9


@pytest.mark.parametrize("stride", [8, 16])
def test_a_needle_of_the_last_rows_is_kept_among_few_tiles(stride: int) -> None:
    x = needles(LONG, {480: (8.0, SAME)})
    plan = plan_of(XAttention(block=32, stride=stride), x.q, x.k)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 15].all()) and int(last.sum(-1).max()) <= 4
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) > 0.95


def test_known_failure_keys_that_pull_in_opposite_directions_cancel_in_a_cell() -> None:
    """The run of alternating signs holds nearly all of the mass; its antidiagonal means are zero."""
    alternating = torch.tensor([1.0, -1.0]).repeat(16)
    x = needles(LONG, {480: (9.0, alternating), 704: (5.0, SAME)})
    plan = plan_of(XAttention(block=32, threshold=0.7), x.q, x.k)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 22].all()) and not bool(last[..., 15].any())
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) < 0.2


@pytest.mark.parametrize(("n", "m"), [(320, 320), (200, 333), (150, 330)])
def test_no_plan_depends_on_later_tokens_wherever_a_chunk_begins(n: int, m: int) -> None:
    """Also where M - N is a multiple neither of the tile nor of the stride."""
    x, y = s7_mixture(Shape(n, m), 4), s1_noise(Shape(n, m), 5)
    method = XAttention(block=32, threshold=0.7)
    mask = plan_of(method, x.q, x.k).tile_mask()
    for tile in range(1, n // 32):
        q, k, row = x.q.clone(), x.k.clone(), tile * 32
        q[:, :, row:], k[:, :, row + m - n :] = y.q[:, :, row:], 3 * y.k[:, :, row + m - n :]
        assert torch.equal(plan_of(method, q, k).tile_mask()[:, :, :tile], mask[:, :, :tile])


def test_a_larger_threshold_keeps_what_a_smaller_one_keeps() -> None:
    x = s7_mixture(LONG, 6)
    masks = [plan_of(XAttention(block=32, threshold=t), x.q, x.k).tile_mask() for t in (0.3, 0.6, 0.9, 0.99)]
    for small, large in itertools.pairwise(masks):
        assert bool((large | ~small).all()) and int(large.sum()) > int(small.sum())


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": 12}, "stride"),
        ({"stride": 64, "block": 32}, "stride"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"block": 48}, "block"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        XAttention(**params)
