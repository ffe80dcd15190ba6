"""The synthetic workload of the benchmarks holds the structure that its docstring promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from workloads import HEAD_KINDS, PEAK, Shape, Workload, model_like

SHAPE = Shape(4096, 4096, 1, 8, 4, 128).of_length()  # every kind once, two query heads each


def last_rows(x: Workload, rows: Tensor) -> Tensor:
    """[Hq, rows, M], their attention."""
    logits = x.q[0, :, rows] @ x.k[0].repeat_interleave(2, 0).mT / SHAPE.head_size**0.5
    return logits.masked_fill(torch.arange(SHAPE.m) > rows[:, None], -torch.inf).softmax(-1)


@pytest.fixture(scope="module")
def made() -> Workload:
    return model_like(SHAPE, 0)


def test_every_head_reads_its_own_kind_and_little_else(made: Workload) -> None:
    rows = torch.arange(3000, 4096, 8)
    mass = last_rows(made, rows)
    key = torch.arange(SHAPE.m)
    distance = rows[:, None] - key
    sink, near = key.expand(len(rows), -1) < 4, (distance >= 0) & (distance < 512)
    columns = torch.zeros(SHAPE.m, dtype=torch.bool)
    for first in made.planted["columns"]:
        columns[first : first + 8] = True
    slash = (distance - made.planted["offset"][0]).abs() < 128
    own = {"columns": columns.expand(len(rows), -1), "slash": slash, "topics": torch.zeros_like(near), "near": near}
    for head, kind in enumerate(HEAD_KINDS):
        mine = mass[2 * head : 2 * head + 2]
        assert float((mine * sink).sum(-1).mean()) > 0.1, kind
        if kind != "topics":
            assert float((mine * own[kind]).sum(-1).mean()) > 0.15, kind
            assert float((mine * (sink | near | own[kind])).sum(-1).mean()) > 0.85, kind


def test_a_tile_list_of_a_tenth_can_hold_most_of_it(made: Workload) -> None:
    mass = last_rows(made, torch.arange(3000, 4096, 8))
    best = mass.unflatten(-1, (-1, 32)).sum(-1).sort(-1, descending=True).values[..., : SHAPE.m // 320].sum(-1)
    assert float(best.mean()) > 0.7


def test_the_same_seed_gives_the_same_values(made: Workload) -> None:
    again, other = model_like(SHAPE, 0), model_like(SHAPE, 1)
    assert torch.equal(made.q, again.q) and torch.equal(made.k, again.k) and made.planted == again.planted
    assert not torch.equal(made.k, other.k)


def test_matches_grow_with_the_number_of_keys() -> None:
    assert Shape(512, 512).of_length().peak == PEAK
    long = Shape(131_072, 131_072).of_length()
    assert long.peak == pytest.approx(PEAK + torch.tensor(256.0).log().item()) and long.topics == 32
