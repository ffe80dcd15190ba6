"""Merging partial attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.lse import merge


def partial(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[-1] == 0:
        return torch.full((*logits.shape[:-1], v.shape[-1]), torch.nan), torch.full(logits.shape[:-1], -torch.inf)
    return (logits.double().softmax(-1) @ v.double()).float(), logits.double().logsumexp(-1).float()


@given(st.integers(0, 1000), st.integers(1, 6), st.sampled_from([1.0, 100.0, 1e4]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_split_of_the_keys_merges_to_the_whole(seed: int, parts: int, size: float, empties: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = (2 * torch.rand(3, 5, 24, generator=gen) - 1) * size
    v = torch.randn(3, 24, 8, generator=gen)
    cuts = sorted(torch.randint(0, 25, (parts - 1,), generator=gen).tolist())
    bounds = [0, *cuts, 24] if not empties else [0, 0, *cuts, 24, 24]
    pieces = [partial(logits[..., a:b], v[:, a:b]) for a, b in itertools.pairwise(bounds)]
    out, lse = merge([p[0] for p in pieces], [p[1] for p in pieces])
    whole, whole_lse = partial(logits, v)
    # an lse of 1e4 has a float32 spacing of 1e-3, and the weights inherit it
    tolerance = 1e-5 + 2e-7 * size
    torch.testing.assert_close(lse, whole_lse, atol=tolerance, rtol=1e-6)
    torch.testing.assert_close(out, whole, atol=10 * tolerance, rtol=1e-5)


def test_rows_without_a_key_stay_empty_and_finite() -> None:
    out, lse = merge([torch.full((2, 4), torch.nan)] * 3, [torch.full((2,), -torch.inf)] * 3)
    assert torch.equal(out, torch.zeros(2, 4)) and torch.equal(lse, torch.full((2,), -torch.inf))
    out, lse = merge([torch.full((2, 4), torch.nan)], [torch.full((2,), -torch.inf)])
    assert torch.equal(out, torch.zeros(2, 4)) and torch.equal(lse, torch.full((2,), -torch.inf))


def test_one_partial_far_above_the_others_is_returned_unchanged() -> None:
    outs = [torch.tensor([[1.0, 2.0]]), torch.tensor([[9.0, 9.0]])]
    out, lse = merge(outs, [torch.tensor([1e4]), torch.tensor([-1e4])])
    assert torch.equal(out, outs[0]) and float(lse) == 1e4


def test_inputs_are_left_as_they_were_and_the_result_is_float32() -> None:
    outs = [torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()]
    lses = [torch.randn(3), torch.randn(3)]
    before = [x.clone() for x in (*outs, *lses)]
    out, lse = merge(outs, lses)
    assert out.dtype == lse.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, (*outs, *lses), strict=True))


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        merge([], [])
    with pytest.raises(InvalidRequest, match="as many"):
        merge([torch.zeros(1, 1)], [])
