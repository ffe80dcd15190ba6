"""FlashPrefill against its definition, what mean keys see, and what they cannot."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from selection import LAYER, kept_mass, needles, plan_of
from torch import Tensor
from workloads import Shape, Workload, s4_segments, s7_mixture

from winnow.errors import InvalidRequest
from winnow.workers.attention.executor import attend_plan
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.methods.flashprefill import FlashPrefill

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32
SHAPES = [Shape(256, 256), Shape(203, 203), Shape(70, 198), Shape(100, 231), Shape(1, 130)]
SAME = torch.ones(32)
BARE = FlashPrefill(block=32, sink_tiles=0, window_tiles=1, dense_tail=0)


def energy_by_definition(q: Tensor, k: Tensor, block_q: int, block_k: int, group: int = 1) -> Tensor:
    """[B, Hq / group, nQ, nK] float64, 0 where no row sees the whole tile."""
    n, m, whole = q.shape[2], k.shape[2], k.shape[2] // block_k
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    means = torch.stack([k[:, :, tile * block_k : (tile + 1) * block_k].mean(2) for tile in range(whole)], 2)
    sees_all = torch.arange(m - n, m)[:, None] >= torch.arange(1, whole + 1) * block_k - 1
    weights = (q.double() @ means.transpose(-1, -2) * LAYER.scale).exp() * sees_all
    energy = torch.stack([weights[:, :, first : first + block_q].sum(2) for first in range(0, n, block_q)], 2)
    return torch.nn.functional.pad(energy, (0, -(-m // block_k) - whole)).unflatten(1, (-1, group)).sum(2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_energies_equal_their_definition(shape: Shape, per_kv_head: bool) -> None:
    x = s7_mixture(shape, 1)
    block_q = 16 if per_kv_head else 32
    found = dataclasses.replace(BARE, per_kv_head=per_kv_head)._log_energy(x.q, x.k, LAYER, block_q)
    expected = energy_by_definition(x.q, x.k, block_q, 32, 2 if per_kv_head else 1)
    torch.testing.assert_close(found.double().exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_a_tile_is_kept_for_its_energy_or_its_place_and_for_nothing_else(shape: Shape, alpha: float) -> None:
    x = s7_mixture(shape, 2)
    method = FlashPrefill(block=32, alpha=alpha, sink_tiles=1, window_tiles=2, dense_tail=1 if shape.n > 32 else 0)
    mask = plan_of(method, x.q, x.k).tile_mask()
    energy = energy_by_definition(x.q, x.k, 32, 32)
    for row in range(mask.shape[2]):
        first, last = (p + shape.m - shape.n for p in (row * 32, min(row * 32 + 32, shape.n) - 1))
        for tile in range(last // 32 + 1):
            placed = tile < 1 or tile > first // 32 - 2 or (method.dense_tail > 0 and row == mask.shape[2] - 1)
            e, best = energy[:, :, row, tile], energy[:, :, row].amax(-1)
            assert torch.equal(mask[:, :, row, tile], ((e > 0) & (e >= alpha * best)) | placed)


def test_topics_are_followed_at_less_than_half_the_pairs() -> None:
    x = s4_segments(LONG, 3)
    plan = plan_of(dataclasses.replace(BARE, sink_tiles=1), x.q, x.k)
    assert plan.density() < 0.45
    assert float(kept_mass(plan, x).mean()) > 0.93


def test_a_needle_of_the_last_rows_is_kept_among_few_tiles() -> None:
    x = needles(LONG, {480: (8.0, SAME)})
    plan = plan_of(BARE, x.q, x.k)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 15].all()) and int(last.sum(-1).max()) <= 4
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) > 0.95


@pytest.mark.parametrize("signs", [torch.tensor([1.0, -1.0]).repeat(16), torch.tensor([1.0, -1.0]).repeat_interleave(16)])
def test_known_failure_keys_that_pull_in_opposite_directions_cancel_in_a_tile(signs: Tensor) -> None:
    """The run of both signs holds nearly all of the mass; its mean key is that of the noise."""
    x = needles(LONG, {480: (9.0, signs), 704: (5.0, SAME)})
    plan = plan_of(BARE, x.q, x.k)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 22].all()) and not bool(last[..., 15].any())
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) < 0.2


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_without_a_dense_tail_chunks_give_the_one_shot_plan(per_kv_head: bool) -> None:
    x = s7_mixture(Shape(320, 320), 8)
    method = FlashPrefill(block=32, alpha=0.5, sink_tiles=1, window_tiles=1, dense_tail=0, per_kv_head=per_kv_head)
    assert method.caps.prefix_safe and method.caps.chunked
    whole = plan_of(method, x.q, x.k).to_dense_mask()
    for start, end in ((0, 96), (96, 224), (224, 320)):
        part = plan_of(method, x.q[:, :, start:end], x.k[:, :, :end]).to_dense_mask()
        assert torch.equal(part, whole[:, :, start:end, :end])


def test_with_a_dense_tail_it_claims_neither_chunks_nor_a_safe_prefix() -> None:
    for caps in (FlashPrefill().caps, FlashPrefill.caps, prefill_methods.get("flashprefill").caps):
        assert not caps.prefix_safe and not caps.chunked
    x = s4_segments(LONG, 4)
    mask = plan_of(dataclasses.replace(BARE, dense_tail=3), x.q, x.k).tile_mask()
    assert bool(mask[:, :, -3:][..., torch.ones(3, 32, dtype=torch.bool).tril(29)].all())
    assert not bool(mask[:, :, -4, :28].all())


def test_a_larger_alpha_keeps_less_of_the_same() -> None:
    x = s4_segments(LONG, 6)
    masks = [plan_of(dataclasses.replace(BARE, alpha=a), x.q, x.k).tile_mask() for a in (0.9, 0.5, 0.1, 0.01)]
    for small, large in itertools.pairwise(masks):
        assert bool((large | ~small).all()) and int(large.sum()) > int(small.sum())


def test_one_list_per_kv_head_serves_its_group() -> None:
    x = s7_mixture(LONG, 7)
    plan = plan_of(dataclasses.replace(BARE, per_kv_head=True), x.q, x.k)
    assert (plan.mask_heads, plan.block_q, plan.block_k) == (2, 32, 32)
    wide = plan_of(dataclasses.replace(BARE, per_kv_head=True, block=128), x.q, x.k)
    assert (wide.mask_heads, wide.block_q, wide.block_k) == (2, 64, 128), "64 rows of two heads are the executor's 128"
    twins = x.q[:, [0, 0, 2, 2]]  # where the heads of a group agree, their list is that of one of them
    mask = plan_of(dataclasses.replace(BARE, per_kv_head=True), twins, x.k).tile_mask()
    energy = energy_by_definition(twins, x.k, 32, 32)[:, ::2]
    elsewhere = (torch.arange(32)[:, None] > torch.arange(32)) & (energy > 0)
    chosen = energy >= BARE.alpha * energy.amax(-1, keepdim=True)
    assert torch.equal(mask & elsewhere, chosen & elsewhere)


def test_correction_lowers_the_error_where_much_is_left_out() -> None:
    x = s4_segments(LONG, 5)
    x = Workload(0.5 * x.q, x.k, x.v)
    method = dataclasses.replace(BARE, alpha=1.0)
    truth, _ = attend_plan(None, x.q, x.k, x.v, scale=LAYER.scale)
    errors = []
    for correction in (False, True):
        plan = plan_of(dataclasses.replace(method, correction=correction), x.q, x.k)
        assert plan.mean_correction == correction
        out, _ = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
        errors.append(float((out - truth).norm() / truth.norm()))
    assert plan.density() < 0.5
    assert errors[1] < 0.8 * errors[0]


def test_the_first_layers_stay_dense_on_request() -> None:
    x = s7_mixture(LONG, 8)
    method = dataclasses.replace(BARE, dense_layers=2)
    layers = [dataclasses.replace(LAYER, idx=idx) for idx in range(4)]
    assert [method.plan(x.q, x.k, layer) is None for layer in layers] == [True, True, False, False]


def test_prompts_within_sink_and_window_stay_dense_and_no_others() -> None:
    x = s7_mixture(Shape(193, 193), 9)
    method = FlashPrefill(block=32, dense_tail=0)  # 2 + 4 tiles
    assert method.plan(x.q[:, :, :192], x.k[:, :, :192], LAYER) is None
    assert method.plan(x.q, x.k, LAYER) is not None
    assert FlashPrefill(block=32, dense_tail=7).plan(x.q, x.k, LAYER) is None
    assert math.isclose(plan_of(dataclasses.replace(method, alpha=0.0), x.q, x.k).density(), 1.0)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"sink_tiles": -1}, "sink_tiles"),
        ({"window_tiles": 0}, "window_tiles"),
        ({"dense_tail": -1}, "dense_tail"),
        ({"dense_layers": -1}, "dense_layers"),
        ({"block": 256}, "block"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        FlashPrefill(**params)
