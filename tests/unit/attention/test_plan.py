"""TilePlan: any mask gives a valid plan, and its numbers are those of the pairs it keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.lowering import lower
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan, tile_kinds


@st.composite
def plans(draw: st.DrawFn) -> tuple[TilePlan, Tensor]:
    """A plan of random geometry, mask and head classes, and the mask it was made from."""
    n = draw(st.integers(1, 20))
    m = n + draw(st.integers(0, 20))
    bq, bk = draw(st.sampled_from([1, 3, 4, 8, 32])), draw(st.sampled_from([1, 4, 7, 8, 32]))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    mask = torch.rand(batch, heads, -(-n // bq), -(-m // bk), generator=gen) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    classes = torch.randint(0, 3, (batch, heads), generator=gen) if draw(st.booleans()) else None
    sink = torch.randint(0, m + 2, (batch, heads), generator=gen)
    recent = torch.randint(1, m + 2, (batch, heads), generator=gen)
    plan = TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=bq, block_k=bk, head_class=classes, sink=sink, recent=recent)
    return plan, mask


def kept_by_definition(plan: TilePlan, mask: Tensor) -> Tensor:
    """[B, Hm, N, M] bool, pair by pair."""
    kept = torch.zeros(plan.batch, plan.mask_heads, plan.n_rows, plan.n_keys, dtype=torch.bool)
    for b in range(plan.batch):
        for h in range(plan.mask_heads):
            kind, sink, recent = (int(x[b, h]) for x in (plan.head_class, plan.sink, plan.recent))
            for i in range(plan.n_rows):
                position = i + plan.n_keys - plan.n_rows
                first = i // plan.block_q * plan.block_q + plan.n_keys - plan.n_rows
                last = min(first + plan.block_q, plan.n_keys) - 1
                for j in range(position + 1):
                    diagonal = first // plan.block_k <= j // plan.block_k <= last // plan.block_k
                    kept[b, h, i, j] = (
                        kind == HeadClass.DENSE
                        or (kind == HeadClass.STREAMING and (j < sink or j > position - recent))
                        or (kind == HeadClass.CSR and (diagonal or bool(mask[b, h, i // plan.block_q, j // plan.block_k])))
                    )
    return kept


@given(plans())
@settings(max_examples=60, deadline=None)
def test_any_mask_gives_a_valid_plan_that_keeps_what_it_says(drawn: tuple[TilePlan, Tensor]) -> None:
    plan, mask = drawn
    plan.check()
    expected = kept_by_definition(plan, mask)
    assert torch.equal(plan.to_dense_mask(), expected)
    middle = plan.n_rows // 2
    assert torch.equal(plan.to_dense_mask(middle, plan.n_rows), expected[:, :, middle:])
    pairs = plan.n_rows * (2 * plan.n_keys - plan.n_rows + 1) // 2 * plan.batch * plan.mask_heads
    assert plan.density() == int(expected.sum()) / pairs


@given(plans())
@settings(max_examples=60, deadline=None)
def test_lowering_keeps_the_same_pairs(drawn: tuple[TilePlan, Tensor]) -> None:
    plan, _ = drawn
    lists = lower(plan)
    shape = (plan.batch, plan.mask_heads, plan.n_q_tiles, plan.n_k_tiles)
    row, key = torch.arange(plan.n_rows), torch.arange(plan.n_keys)
    position = row[:, None] + plan.n_keys - plan.n_rows

    def pairs(tiles: TileLists) -> Tensor:
        return tiles.to_mask(plan.n_k_tiles).view(shape)[:, :, row // plan.block_q][..., key // plan.block_k]

    sink, recent = lists.sink[..., None, None], lists.recent[..., None, None]
    partial = pairs(lists.partial) & (key <= position) & ((key < sink) | (key > position - recent))
    assert not bool((pairs(lists.full) & pairs(lists.partial)).any())
    assert torch.equal(pairs(lists.full) | partial, plan.to_dense_mask())


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_lists_built_without_waiting_for_the_device_are_the_same(seed: int, rows: int, columns: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    cut, uncut = (TileLists.from_mask(mask, compact=compact) for compact in (True, False))
    n = int(mask.sum())
    assert torch.equal(cut.offsets, uncut.offsets)
    assert cut.ids.numel() == n and torch.equal(uncut.ids[:n], cut.ids)
    assert torch.equal(uncut.to_mask(columns), mask)


@pytest.mark.parametrize(("n", "m", "bq", "bk"), [(64, 64, 16, 16), (33, 100, 16, 8), (50, 50, 8, 32), (1, 9, 4, 4)])
def test_partial_tiles_are_diagonal_tiles(n: int, m: int, bq: int, bk: int) -> None:
    """What the CPU path relies on."""
    full, partial, diagonal = tile_kinds(n, m, bq, bk, "cpu")
    assert not bool((partial & ~diagonal).any())
    assert not bool((full & partial).any())


def test_dense_and_streaming_plans() -> None:
    dense = TilePlan.dense(batch=1, mask_heads=2, n_rows=100, n_keys=300, block_q=32, block_k=32)
    dense.check()
    assert dense.density() == 1.0
    streaming = TilePlan.streaming(batch=1, mask_heads=1, n_rows=100, n_keys=300, sink=4, recent=16)
    streaming.check()
    assert torch.equal(streaming.to_dense_mask().sum(-1), torch.full((1, 1, 100), 20))


@pytest.mark.parametrize(
    "broken",
    [
        lambda p: dataclasses.replace(p, full=TileLists(p.full.offsets, p.full.ids.flip(0))),
        lambda p: dataclasses.replace(p, full=TileLists(p.full.offsets, p.full.ids + 1)),
        lambda p: dataclasses.replace(p, full=TileLists(p.full.offsets.int(), p.full.ids)),
        lambda p: dataclasses.replace(p, partial=TileLists.empty(4)),
        lambda p: dataclasses.replace(p, kinds=frozenset({HeadClass.DENSE})),
        lambda p: dataclasses.replace(p, head_class=torch.zeros_like(p.head_class)),
    ],
)
def test_check_finds_what_is_broken(broken: object) -> None:
    plan = TilePlan.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), n_rows=64, n_keys=64, block_q=16, block_k=16)
    plan.check()
    with pytest.raises(AssertionError):
        broken(plan).check()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("n", "m", "bq", "shape", "word"),
    [
        (5, 4, 4, (1, 1, 2, 1), "right-aligned"),
        (0, 4, 4, (1, 1, 0, 1), "rows"),
        (8, 8, 0, (1, 1, 1, 1), "block_q"),
        (8, 8, 4, (1, 1, 2, 3), "mask"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(n: int, m: int, bq: int, shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        TilePlan.from_mask(torch.ones(shape, dtype=torch.bool), n_rows=n, n_keys=m, block_q=bq, block_k=4)


def test_a_streaming_head_needs_a_window() -> None:
    with pytest.raises(InvalidRequest, match="recent"):
        TilePlan.streaming(batch=1, mask_heads=1, n_rows=4, n_keys=4, sink=1, recent=0)
