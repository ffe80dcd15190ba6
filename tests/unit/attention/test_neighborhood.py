"""The neighborhood rule against its steps written out token by token, and attention over a grid against the rule's mask."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.neighborhood import Axis, neighborhood_attention_2d, neighborhood_mask, tile_order

pytestmark = pytest.mark.slow


def allowed_bits(i: int, length: int, w: int, d: int, s: int, causal: bool) -> int:
    """Keys of token i as a bit mask: the published steps, one token at a time."""
    own_class, x = i % d, i // d
    in_class = len(range(own_class, length, d))
    if causal:
        leader = min((x // s) * s + s - 1, in_class - 1)
        keys = range(max(leader - w + 1, 0), x + 1)
    else:
        left = w // 2
        right = left - 1 + w % 2
        leader = min((x // s) * s + s // 2, in_class - 1)
        start = max(leader - left, 0)
        if leader + right > in_class - 1:
            start -= leader + right - (in_class - 1)
        keys = range(start, start + w)
    return sum(1 << (own_class + d * t) for t in keys)


def settings(length: int) -> Iterator[tuple[int, int, int, bool]]:
    """(w, d, s, causal): all that fit this length."""
    for d in range(1, length + 1):
        for w in range(1, length // d + 1):
            yield from itertools.product((w,), (d,), range(1, w + 1), (False, True))


def rows_as_bits(mask: Tensor) -> list[int]:
    return (mask.long() << torch.arange(mask.shape[1])).sum(-1).tolist()


@pytest.mark.parametrize(
    "lengths",
    [range(1, 19), (23, 31), pytest.param(range(19, 41), marks=pytest.mark.slow)],
    ids=["to-18", "some", "to-40"],
)
def test_every_row_of_every_small_axis_follows_the_steps(lengths: Sequence[int]) -> None:
    for length in lengths:
        for w, d, s, causal in settings(length):
            mask = Axis(length, w, d, s, causal).mask()
            expected = [allowed_bits(i, length, w, d, s, causal) for i in range(length)]
            assert rows_as_bits(mask) == expected, (length, w, d, s, causal)
            if not causal:
                assert set(mask.sum(-1).tolist()) == {w}


@pytest.mark.parametrize("grid", [(4, 5), (6, 3), (1, 5)])
def test_every_pair_of_every_small_grid_is_allowed_on_both_axes(grid: tuple[int, int]) -> None:
    height, width = grid
    for first in settings(height):
        row_bits = [allowed_bits(y, height, *first) for y in range(height)]
        for second in settings(width):
            column_bits = [allowed_bits(x, width, *second) for x in range(width)]
            mask = neighborhood_mask([Axis(height, *first), Axis(width, *second)])
            expected = [
                sum(columns << (width * y) for y in range(height) if rows >> y & 1)
                for rows, columns in itertools.product(row_bits, column_bits)
            ]
            assert rows_as_bits(mask) == expected, (first, second)


def test_limits_of_the_rule() -> None:
    everything = torch.ones(17, 17, dtype=torch.bool)
    assert torch.equal(Axis(17, 17).mask(), everything)
    for w in (17, 18, 100):
        assert torch.equal(Axis(17, w, causal=True).mask(), everything.tril())
    blocks = torch.arange(20) // 5
    assert torch.equal(Axis(20, 5, stride=5).mask(), blocks[:, None] == blocks)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "d"), [(20, 3), (21, 3), (22, 3), (17, 5)])
def test_dilation_is_as_many_problems_as_classes(length: int, d: int, causal: bool) -> None:
    mask = Axis(length, 3, d, 2, causal).mask()
    rest = mask.clone()
    for start in range(d):
        own = torch.arange(start, length, d)
        assert torch.equal(mask[own][:, own], Axis(own.numel(), 3, 1, 2, causal).mask())
        rest[own[:, None], own] = False
    assert not bool(rest.any())


def tensors(tokens: int, batch: int = 2, hq: int = 4, hkv: int = 2, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(batch, heads, tokens, d, generator=gen) for heads in (hq, hkv, hkv))  # type: ignore[return-value]


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v.double().repeat_interleave(group, 1)).float(), logits.logsumexp(-1).float()


GRIDS: list[dict[str, Any]] = [
    {"grid": (12, 16), "window": (5, 7)},
    {"grid": (13, 9), "window": (4, 3), "dilation": (2, 3), "stride": (2, 1)},
    {"grid": (10, 11), "window": (10, 11)},
    {"grid": (9, 14), "window": (4, 6), "stride": (4, 3), "causal": (True, False)},
    {"grid": (14, 9), "window": (3, 2), "dilation": (4, 2), "causal": (False, True)},
    {"grid": (7, 8), "window": (7, 3), "dilation": (1, 2), "causal": (True, True)},
    {"grid": (1, 30), "window": (1, 6)},
]


@pytest.mark.parametrize("case", GRIDS, ids=str)
@pytest.mark.parametrize("tile", [(16, 8), (4, 4), (3, 5), (1, 1)])
def test_attention_over_a_grid_is_attention_over_the_mask_whatever_the_tile(case: dict[str, Any], tile: tuple[int, int]) -> None:
    grid = case["grid"]
    q, k, v = tensors(grid[0] * grid[1])
    names = ("window", "dilation", "stride", "causal")
    axes = [Axis(grid[a], **{name: case[name][a] for name in names if name in case}) for a in (0, 1)]
    out, lse = neighborhood_attention_2d(q, k, v, **case, tile=tile)
    expected, expected_lse = truth(q, k, v, neighborhood_mask(axes))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_two_dimensional_dilation_is_independent_problems_on_residue_classes() -> None:
    grid, dilation = (9, 10), (2, 3)
    q, k, v = tensors(90)
    out, _ = neighborhood_attention_2d(q, k, v, grid, (3, 2), dilation)
    place = torch.arange(90).view(grid)
    for y, x in itertools.product(range(2), range(3)):
        part = place[y::2, x::3]
        at = part.reshape(-1)
        alone, _ = neighborhood_attention_2d(q[:, :, at], k[:, :, at], v[:, :, at], tuple(part.shape), (3, 2))
        torch.testing.assert_close(out[:, :, at], alone, atol=1e-6, rtol=1e-6)


def test_full_window_is_bidirectional_attention_also_in_bfloat16() -> None:
    q, k, v = (x.bfloat16() for x in tensors(77))
    out, _ = neighborhood_attention_2d(q, k, v, (7, 11), (7, 11))
    expected, _ = truth(q, k, v, torch.ones(77, 77, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert float((out - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize(("grid", "tile"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 3), (16, 8))])
def test_tile_order_holds_every_token_once_and_tiles_are_spatial(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    order = tile_order(grid, tile)
    real = order[order >= 0]
    assert real.sort().values.tolist() == list(range(grid[0] * grid[1]))
    for tokens in order:
        rows, columns = (tokens[tokens >= 0] // grid[1]), (tokens[tokens >= 0] % grid[1])
        assert int(rows.max() - rows.min()) < tile[0] and int(columns.max() - columns.min()) < tile[1]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"window": 0}, "window"),
        ({"length": 0}, "length"),
        ({"dilation": 0}, "dilation"),
        ({"stride": 0}, "stride"),
        ({"stride": 4}, "stride"),
        ({"dilation": 4}, "window \\* dilation"),
    ],
)
def test_bad_axes_are_refused_by_name(params: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Axis(**{"length": 10, "window": 3, **params})


def test_a_grid_of_another_size_is_refused() -> None:
    q, k, v = tensors(20)
    with pytest.raises(InvalidRequest, match="grid of 4 x 6"):
        neighborhood_attention_2d(q, k, v, (4, 6), (2, 2))
    with pytest.raises(InvalidRequest, match="tile"):
        neighborhood_attention_2d(q, k, v, (4, 5), (2, 2), tile=(0, 4))
