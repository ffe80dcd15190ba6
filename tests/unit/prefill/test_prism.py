"""Prism against its definition and our rotary layout: what each band sees, and what neither can."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from selection import LAYER, kept_mass, needles, plan_of
from torch import Tensor
from workloads import Shape, Workload, s1_noise, s4_segments

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.model.rope import RopeTable, rotate
from winnow.workers.model.spec import RopeSpec
from winnow.workers.prefill.methods.prism import Prism
from winnow.workers.prefill.rope_bands import band_logits, bands
from winnow.workers.prefill.scoring import pool_mean

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32
SAME = torch.ones(32)
D = 64


def rotated(x: Tensor) -> Tensor:
    """x [B, H, T, 64] through the decoder's own rotary code, at positions 0..T-1 and SmolLM2's frequencies."""
    frequencies = tuple((100_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float) / D)).tolist())
    table = RopeTable(RopeSpec(frequencies), 8192, torch.float32, torch.device("cpu"))
    return torch.stack([rotate(part.transpose(0, 1), *table.rows(torch.arange(x.shape[2]))).transpose(0, 1) for part in x])


def test_rotation_stays_inside_a_band() -> None:
    for band in bands(D, 0.5, 0.75, "cpu"):
        x = torch.zeros(1, 1, 128, D)
        x[..., band] = torch.randn(1, 1, 128, band.numel(), generator=torch.Generator().manual_seed(1))
        outside = torch.ones(D, dtype=torch.bool)
        outside[band] = False
        turned = rotated(x)
        assert not torch.equal(turned, x) and not bool(turned[..., outside].any())


def test_the_high_band_has_the_pairs_that_pooling_cancels_and_the_low_band_those_that_last() -> None:
    """Mean over a tile of each unit vector after rotation: sinc(B theta / 2 pi) of 1, to a percent."""
    basis = torch.eye(D).view(1, D, 1, D).expand(1, D, 128, D)
    left = rotated(basis).mean(2).norm(dim=-1)[0]
    theta = 100_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float) / D)
    torch.testing.assert_close(left[: D // 2], torch.sinc(128 * theta / (2 * math.pi)).abs(), atol=0.01, rtol=0.01)
    high, low = (set(band.tolist()) for band in bands(D, 0.5, 0.75, "cpu"))
    assert (len(high), len(low)) == (32, 48) and high | low == set(range(D))
    assert float(left[sorted(high - low)].max()) < 0.3 < 0.9 < float(left[sorted(low - high)].min())


def test_the_published_sizes_at_head_size_128() -> None:
    high, low = bands(128, 0.5, 0.75, "cpu")
    assert high.tolist() == [*range(32), *range(64, 96)]
    assert low.tolist() == [*range(16, 64), *range(80, 128)]


@pytest.mark.parametrize("group", [1, 3])
def test_logits_equal_the_published_formula(group: int) -> None:
    gen = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 2 * group, 5, D, generator=gen), torch.randn(2, 2, 7, D, generator=gen) * torch.arange(1, D + 1) / D
    layer = LayerSpec(0, 2 * group, 2, D, 1 / math.sqrt(D))
    for band in bands(D, 0.5, 0.75, "cpu"):
        found = band_logits(q, k, band, layer)
        for b in range(2):
            for h in range(2 * group):
                rows, keys = q[b, h], k[b, h // group]
                ratio = 1.0
                for x in (rows, keys):
                    ratio *= float(x[:, band].square().mean().sqrt() / x.square().mean().sqrt())
                temperature = math.sqrt(band.numel() / D) * ratio
                expected = rows[:, band] @ keys[:, band].T / (math.sqrt(band.numel()) * temperature)
                torch.testing.assert_close(found[b, h], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["fast", "slow"])
def test_a_needle_that_only_one_band_sees_is_kept(where: str) -> None:
    """The needle's match lies in dimensions of one band alone; the other band's scores cannot find it."""
    x = s1_noise(Shape(1000, 1000, head_size=D), 4)
    layer = LayerSpec(0, 4, 2, D, 1 / math.sqrt(D))
    high, low = (set(band.tolist()) for band in bands(D, 0.5, 0.75, "cpu"))
    own = torch.tensor(sorted(high - low if where == "fast" else low - high))
    unit = torch.zeros(D)
    unit[own] = 1 / math.sqrt(own.numel())
    q, k = (y - (y @ unit)[..., None] * unit for y in (x.q, x.k))
    q[:, :, -40:] += unit * math.sqrt(D)
    k[:, :, 480:512] += 8.0 * unit
    method = Prism(block=32, threshold=0.6)
    mask = plan_of(method, q, k, layer).tile_mask()
    assert bool(mask[:, :, -1, 15].all())
    shares = [
        torch.softmax(band_logits(pool_mean(q, 32), pool_mean(k, 32), band, layer)[:, :, -1], -1)[..., 15]
        for band in bands(D, 0.5, 0.75, "cpu")
    ]
    sees, blind = shares if where == "fast" else shares[::-1]
    assert float(sees.min()) > 0.5 and float(blind.max()) < 0.2


def content(*places: tuple[int, int, float]) -> Workload:
    """Noise in which the last 32 rows and runs of 32 keys share a raw vector, before rotation: (first key, pair, length) each."""
    gen = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 1024, D, generator=gen) for _ in range(3))
    for first, pair, length in places:
        q[:, :, -32:, pair] += length
        k[:, :, first : first + 32, pair] += length
    return Workload(rotated(q), rotated(k), v)


ROTATED = LayerSpec(0, 2, 2, D, 1 / math.sqrt(D))


def test_content_in_a_slow_pair_is_found_at_any_distance() -> None:
    x = content((96, 31, 9.0))
    plan = plan_of(Prism(block=32, threshold=0.6), x.q, x.k, ROTATED)
    assert bool(plan.tile_mask()[:, :, -1, 3].all())
    assert float(kept_mass(plan, x, ROTATED)[:, :, -32:].mean()) > 0.9


def test_known_failure_content_in_a_fast_pair_cancels_in_the_means() -> None:
    """Each row finds nearly all of its mass in the few keys of the run that stand at its own angle; their mean is noise."""
    x = content((480, 0, 14.0), (928, 15, 7.0))  # pair 15 is in both bands, and slow at that distance
    plan = plan_of(Prism(block=32, threshold=0.6), x.q, x.k, ROTATED)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 29].all()) and not bool(last[..., 15].any())
    assert float(kept_mass(plan, x, ROTATED)[:, :, -32:].mean()) < 0.2


def test_topics_are_followed_at_less_than_half_the_pairs() -> None:
    x = s4_segments(LONG, 3)
    plan = plan_of(Prism(block=32), x.q, x.k)
    assert plan.density() < 0.45
    assert float(kept_mass(plan, x).mean()) > 0.88


def test_a_needle_of_the_last_rows_is_kept_among_few_tiles() -> None:
    x = needles(LONG, {480: (8.0, SAME)})
    plan = plan_of(Prism(block=32), x.q, x.k)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 15].all()) and int(last.sum(-1).max()) <= 4
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) > 0.95


def test_known_failure_keys_that_pull_in_opposite_directions_cancel_in_a_tile() -> None:
    alternating = torch.tensor([1.0, -1.0]).repeat(16)
    x = needles(LONG, {480: (9.0, alternating), 704: (5.0, SAME)})
    plan = plan_of(Prism(block=32, threshold=0.7), x.q, x.k)
    last = plan.tile_mask()[:, :, -1]
    assert bool(last[..., 22].all()) and not bool(last[..., 15].any())
    assert float(kept_mass(plan, x)[:, :, -8:].mean()) < 0.2


def test_every_row_keeps_the_union_of_both_bands_and_its_forced_tiles() -> None:
    x = s4_segments(LONG, 6)
    mask = plan_of(Prism(block=32), x.q, x.k).tile_mask()
    rows = torch.arange(32)
    assert bool(mask[..., 0].all()) and bool(mask[:, :, rows, rows].all())
    forbidden = torch.ones(32, 32, dtype=torch.bool).triu(1)
    for band in bands(32, 0.5, 0.75, "cpu"):
        logits = band_logits(pool_mean(x.q, 32), pool_mean(x.k, 32), band, LAYER).masked_fill(forbidden, -torch.inf)
        assert bool(((torch.softmax(logits, -1) * mask).sum(-1) >= 0.95 - 1e-5).all())


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"high_share": 0.0}, "high_share"),
        ({"low_share": 1.5}, "low_share"),
        ({"low_share": float("nan")}, "low_share"),
        ({"block": 100}, "block"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Prism(**params)
