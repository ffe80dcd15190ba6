"""Rounding of learnt parameters: how far off, how small, and that what is not rounded comes back as it was."""

from __future__ import annotations

import math

import pytest
import torch

from winnow.workers.prefill.calibration import are_numbers, rounded, unrounded, whole_number


def test_rounding_is_off_by_little_more_than_half_a_step_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 5, 7, 2, generator=generator) * torch.logspace(-3, 1, 5)[:, None, None]
    weights[1, 2] = 0.0
    small = torch.randn(3, 11, generator=generator)
    stored = rounded({"weights": weights, "small": small})
    assert stored["weights"].dtype == torch.int8 and stored["weights.scale"].shape == (3, 5)
    assert all(tensor.device.type == "cpu" for tensor in stored.values())
    again = unrounded(stored)
    assert set(again) == {"weights", "small"} and again["weights"].dtype == again["small"].dtype == torch.float32
    # 127 steps of a step that float16 rounded down fall short by up to 127 x 2**-11 of it
    largest = weights.abs().amax((2, 3), keepdim=True)
    assert bool(((again["weights"] - weights).abs() <= largest / 127 * 0.57 + 2.0**-15).all())
    assert bool((again["weights"][1, 2] == 0).all())
    torch.testing.assert_close(again["small"], small, atol=1e-3, rtol=1e-3)


def test_what_was_not_rounded_comes_back_as_it_is() -> None:
    given = {"count": torch.tensor(8192), "weights": torch.randn(2, 3, 4)}
    again = unrounded(given)
    assert torch.equal(again["weights"], given["weights"])
    assert int(again["count"]) == 8192 and again["count"].dtype == torch.int64


def test_a_scale_that_fits_no_codes_is_refused() -> None:
    stored = rounded({"weights": torch.randn(2, 3, 4)})
    for changed in (
        {"weights.scale": torch.ones(2, 4)},
        {"weights.scale": torch.tensor(1.0)},
        {"weights.scale": stored["weights.scale"].to(torch.int8)},
        {"weights": torch.randn(2, 3, 4)},
    ):
        with pytest.raises(ValueError, match=r"weights\.scale"):
            unrounded({**stored, **changed})


def test_learnt_numbers_are_finite_and_no_codes() -> None:
    assert are_numbers([torch.ones(2), torch.ones(2, dtype=torch.float16)])
    for bad in (torch.tensor(math.nan), torch.tensor(1e300, dtype=torch.float64), torch.ones(2, dtype=torch.int8)):
        assert not are_numbers([torch.ones(2), bad])


def test_a_whole_number_is_one_within_its_limits() -> None:
    assert whole_number(torch.tensor(7), 1, 9) == whole_number(torch.tensor([7.0]), 1, 9) == 7
    for bad in (None, torch.ones(2), torch.zeros(0), *map(torch.tensor, (0, 10, 2.5, math.nan, math.inf))):
        assert whole_number(bad, 1, 9) is None
