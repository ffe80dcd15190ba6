"""Pooling that knows rotary pairs, as a scorer for methods that pool: its definition, and what it finds that plain means miss."""

from __future__ import annotations

import math

import pytest
import torch
from selection import plan_of
from torch import Tensor
from workloads import Shape, s1_noise

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.methods.dhsa import DHSA
from winnow.workers.prefill.methods.flexprefill import FlexPrefill
from winnow.workers.prefill.rope_bands import HIGH_SHARE, LOW_SHARE, band_logits, bands, pooled_logits

D = 64
LAYER = LayerSpec(0, 4, 2, D, 1 / math.sqrt(D))
NEEDLE = 15  # tile of 32 keys
POOLED = {
    "flexprefill": {"block": 32, "min_budget": 64, "gamma": 0.5, "tau": 1.0},
    "dhsa": {"mask": "topk", "density": 0.1, "block_q": 32, "block_k": 32},
}


def test_scores_of_bands_are_the_larger_of_two_shares() -> None:
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, D, generator=gen), torch.randn(2, 2, 7, D, generator=gen) * torch.arange(1, D + 1) / D
    forbidden = torch.ones(5, 7, dtype=torch.bool).triu(3)
    found = pooled_logits(q, k, LAYER, forbidden, pooling="bands")
    assert torch.equal(found == -torch.inf, forbidden.expand(found.shape))
    for row in range(5):
        shares = [
            torch.softmax(band_logits(q, k, band, LAYER)[:, :, row, : row + 3], -1)
            for band in bands(D, HIGH_SHARE, LOW_SHARE, "cpu")
        ]
        torch.testing.assert_close(found[:, :, row, : row + 3].exp(), torch.maximum(*shares), atol=1e-6, rtol=1e-5)
    plain = pooled_logits(q, k, LAYER, forbidden, pooling="mean")
    expected = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * LAYER.scale
    torch.testing.assert_close(plain, expected.masked_fill(forbidden, -torch.inf))


def drowned() -> tuple[Tensor, Tensor]:
    """q and k whose last rows match a run of keys in fast pairs, while slow pairs hold common vectors several times as large."""
    x = s1_noise(Shape(1000, 1000, head_size=D), 4)
    high, low = (set(band.tolist()) for band in bands(D, HIGH_SHARE, LOW_SHARE, "cpu"))
    fast, slow = (torch.tensor(sorted(dims)) for dims in (high - low, low - high))
    unit = torch.zeros(D)
    unit[fast] = 1 / math.sqrt(fast.numel())
    q, k = (y - (y @ unit)[..., None] * unit for y in (x.q, x.k))
    q[:, :, -40:] += unit * math.sqrt(D)
    k[:, :, NEEDLE * 32 : NEEDLE * 32 + 32] += 4.0 * unit
    gen = torch.Generator().manual_seed(1)
    for y in (q, k):  # a vector for each tile, and so one that means keep
        runs = torch.randn(*y.shape[:2], -(-y.shape[2] // 32), slow.numel(), generator=gen) * 4.0
        y[..., slow] += runs.repeat_interleave(32, 2)[:, :, : y.shape[2]]
    return q, k


@pytest.mark.parametrize("name", POOLED)
def test_a_match_in_fast_pairs_is_found_that_slow_pairs_drown_in_the_means(name: str) -> None:
    q, k = drowned()

    def share_found(**params: object) -> float:
        method: PrefillMethod = prefill_methods.create(name, {**POOLED[name], **params})
        return float(plan_of(method, q, k, LAYER).tile_mask()[:, :, -1, NEEDLE].float().mean())

    assert share_found(pooling="bands") == 1.0
    assert share_found(pooling="mean") < 0.5
    assert share_found() == share_found(pooling="mean")


def test_another_pooling_is_refused_by_name() -> None:
    for made in (FlexPrefill, DHSA):
        with pytest.raises(InvalidRequest, match=rf"{made.name}: pooling must be one of mean, bands, got 'max'"):
            made(pooling="max")
