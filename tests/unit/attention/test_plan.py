"""TilePlan: any mask gives a valid plan, and its numbers are those of the pairs it keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import random_intervals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.lowering import lower
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import TileLists, tile_kinds


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a plan was made from: tiles [B, Hm, nQ, nK] and single keys [B, Hm, nQ, M], bool; intervals [B, Hm, N, 2]."""

    mask: Tensor
    singles: Tensor
    intervals: Tensor


@st.composite
def plans(draw: st.DrawFn, columns: bool = True) -> tuple[TilePlan, Asked]:
    """A plan of random geometry, mask, token columns, intervals and head classes, and what it was made from."""
    n = draw(st.integers(1, 20))
    m = n + draw(st.integers(0, 20))
    bq, bk = draw(st.sampled_from([1, 3, 4, 8, 32])), draw(st.sampled_from([1, 4, 7, 8, 32]))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    mask = torch.rand(batch, heads, -(-n // bq), -(-m // bk), generator=gen) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    classes = torch.randint(0, 4, (batch, heads), generator=gen) if draw(st.booleans()) else None
    sink = torch.randint(0, m + 2, (batch, heads), generator=gen)
    recent = torch.randint(1, m + 2, (batch, heads), generator=gen)
    share = draw(st.sampled_from([0.0, 0.3, 1.0])) if columns else 0.0
    singles = torch.rand(*mask.shape[:3], m, generator=gen) < share
    intervals = random_intervals(batch, heads, n, m, gen)
    plan = TilePlan.from_mask(
        mask, n_rows=n, n_keys=m, block_q=bq, block_k=bk, head_class=classes, sink=sink, recent=recent,
        token_columns=TileLists.from_mask(singles) if share else None,
        row_intervals=intervals if classes is not None else None,
    )  # fmt: skip
    return plan, Asked(mask, singles, intervals)


def kept_by_definition(plan: TilePlan, asked: Asked) -> Tensor:
    """[B, Hm, N, M] bool, pair by pair."""
    kept = torch.zeros(plan.batch, plan.mask_heads, plan.n_rows, plan.n_keys, dtype=torch.bool)
    mask, singles = asked.mask, asked.singles
    for b in range(plan.batch):
        for h in range(plan.mask_heads):
            kind, sink, recent = (int(x[b, h]) for x in (plan.head_class, plan.sink, plan.recent))
            for i in range(plan.n_rows):
                position = i + plan.n_keys - plan.n_rows
                first = i // plan.block_q * plan.block_q + plan.n_keys - plan.n_rows
                last = min(first + plan.block_q, plan.n_keys) - 1
                lo, hi = asked.intervals[b, h, i].tolist()
                none = max(lo, 0) >= min(hi, position + 1)
                for j in range(position + 1):
                    diagonal = first // plan.block_k <= j // plan.block_k <= last // plan.block_k
                    kept[b, h, i, j] = (
                        kind == HeadClass.DENSE
                        or (kind == HeadClass.STREAMING and (j < sink or j > position - recent))
                        or (kind == HeadClass.INTERVAL and (j == position if none else lo <= j < hi))
                        or (kind == HeadClass.CSR and (diagonal or bool(mask[b, h, i // plan.block_q, j // plan.block_k])))
                        or (kind == HeadClass.CSR and bool(singles[b, h, i // plan.block_q, j]))
                    )
    return kept


@given(plans())
@settings(max_examples=60, deadline=None)
def test_any_mask_gives_a_valid_plan_that_keeps_what_it_says(drawn: tuple[TilePlan, Asked]) -> None:
    plan, asked = drawn
    plan.check()
    expected = kept_by_definition(plan, asked)
    assert torch.equal(plan.to_dense_mask(), expected)
    middle = plan.n_rows // 2
    assert torch.equal(plan.to_dense_mask(middle, plan.n_rows), expected[:, :, middle:])
    pairs = plan.n_rows * (2 * plan.n_keys - plan.n_rows + 1) // 2 * plan.batch * plan.mask_heads
    assert plan.density() == int(expected.sum()) / pairs


@given(plans(columns=False))
@settings(max_examples=60, deadline=None)
def test_lowering_keeps_the_same_pairs(drawn: tuple[TilePlan, Asked]) -> None:
    plan, _ = drawn
    lists = lower(plan)
    shape = (plan.batch, plan.mask_heads, plan.n_q_tiles, plan.n_k_tiles)
    row, key = torch.arange(plan.n_rows), torch.arange(plan.n_keys)
    position = row[:, None] + plan.n_keys - plan.n_rows

    def pairs(tiles: TileLists) -> Tensor:
        return tiles.to_mask(plan.n_k_tiles).view(shape)[:, :, row // plan.block_q][..., key // plan.block_k]

    partial = pairs(lists.partial) & (key <= position)
    if lists.sink is not None and lists.recent is not None:
        sink, recent = lists.sink[..., None, None], lists.recent[..., None, None]
        partial &= (key < sink) | (key > position - recent)
    if lists.intervals is not None:
        lo, hi = lists.intervals.unsqueeze(-2).unbind(-1)
        partial &= (key >= lo) & (key < hi)
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
    assert torch.equal(cut.row_of_ids(), mask.nonzero()[:, 0])
    assert torch.equal(uncut.row_of_ids()[:n], mask.nonzero()[:, 0]) and bool((uncut.row_of_ids()[n:] == rows).all())


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_choosing_among_the_ids_of_a_list(seed: int, rows: int, columns: int, compact: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    mask, wanted = (torch.rand(rows, columns, generator=gen) < 0.5 for _ in range(2))
    lists = TileLists.from_mask(mask, compact=compact)
    keep = wanted[lists.row_of_ids().clamp(max=rows - 1), lists.ids.long()]
    assert torch.equal(lists.only(keep, compact=compact).to_mask(columns), mask & wanted)


def test_candidates_of_every_query_tile_become_lists() -> None:
    keys = torch.tensor([[3, 5, 9], [0, 2, 9]])
    valid = torch.tensor([[True, False, True], [False, False, False]])
    assert TileLists.from_ids(keys).ids.tolist() == [3, 5, 9, 0, 2, 9]
    for compact in (True, False):
        lists = TileLists.from_ids(keys[:, None].expand(2, 4, 3), valid[:, None].expand(2, 4, 3), compact=compact)
        assert lists.offsets.tolist() == [0, 2, 4, 6, 8, 8, 8, 8, 8] and lists.ids[:8].tolist() == [3, 9] * 4


def test_token_columns_are_read_once_and_only_where_they_may() -> None:
    """Six query tiles of four rows over 24 keys; what is read anyway, repeated, later or no key at all is dropped."""
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 0] = True
    keys = torch.tensor([-1, 0, 3, 4, 4, 9, 22, 24, 99]).expand(6, 9)
    for compact in (True, False):
        plan = TilePlan.from_mask(
            mask, n_rows=24, n_keys=24, block_q=4, block_k=4, token_columns=TileLists.from_ids(keys, compact=compact)
        )
        plan.check()
        assert plan.token_columns is not None
        assert plan.token_columns.counts().tolist() == [0, 0, 1, 2, 2, 2]
        assert plan.token_columns.ids.tolist() == [4, 4, 9, 4, 9, 4, 9]
        assert int(plan.to_dense_mask()[0, 0, 23].sum()) == 4 + 2 + 4


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
        lambda p: dataclasses.replace(p, token_columns=TileLists.from_ids(torch.tensor([0, 40]).expand(4, 2))),
        lambda p: dataclasses.replace(p, token_columns=TileLists(p.token_columns.offsets, p.token_columns.ids.flip(0))),
        lambda p: dataclasses.replace(p, token_columns=TileLists(p.token_columns.offsets, p.token_columns.ids + 16)),
        lambda p: dataclasses.replace(p, token_columns=TileLists.empty(3)),
        lambda p: dataclasses.replace(p, residual=(torch.zeros(1, 2, 64, 8), torch.zeros(1, 2, 63))),
        lambda p: dataclasses.replace(p, residual=(torch.zeros(1, 2, 64, 8), torch.full((1, 2, 64), torch.inf))),
    ],
)
def test_check_finds_what_is_broken(broken: object) -> None:
    plan = TilePlan.from_mask(
        torch.eye(4, dtype=torch.bool).roll(-1, 1)[None, None], n_rows=64, n_keys=64, block_q=16, block_k=16,
        token_columns=TileLists.from_ids(torch.tensor([0, 7]).expand(4, 2)),
    )  # fmt: skip
    plan.check()
    with pytest.raises(InvalidRequest):
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


def test_intervals_are_cut_to_what_a_row_may_read() -> None:
    wanted = torch.tensor([[-5, 99], [3, 4], [6, 4], [9, 12], [2, 5]])
    plan = TilePlan.intervals(wanted[None, None], n_keys=8, block_q=2, block_k=4)
    plan.check()
    assert plan.row_intervals is not None
    assert plan.row_intervals[0, 0].tolist() == [[0, 4], [3, 4], [5, 6], [6, 7], [2, 5]]
    assert plan.density() == (4 + 1 + 1 + 1 + 3) / (4 + 5 + 6 + 7 + 8)
    with pytest.raises(InvalidRequest, match="row_intervals must be"):
        TilePlan.intervals(wanted[None, None, :, :1], n_keys=8)
    with pytest.raises(InvalidRequest, match="row_intervals must be"):
        TilePlan.intervals(wanted, n_keys=8)
    with pytest.raises(InvalidRequest, match="row_intervals: missing"):
        dataclasses.replace(plan, row_intervals=None).check()
    with pytest.raises(InvalidRequest, match="causality"):
        dataclasses.replace(plan, row_intervals=plan.row_intervals + 1).check()


def test_token_columns_need_a_row_for_every_query_tile() -> None:
    with pytest.raises(InvalidRequest, match="token_columns must have a row per mask head and query tile, 2, got 1"):
        TilePlan.from_mask(
            torch.ones(1, 1, 2, 2, dtype=torch.bool), n_rows=8, n_keys=8, block_q=4, block_k=4, token_columns=TileLists.empty(1)
        )


def test_a_streaming_head_needs_a_window() -> None:
    with pytest.raises(InvalidRequest, match="recent"):
        TilePlan.streaming(batch=1, mask_heads=1, n_rows=4, n_keys=4, sink=1, recent=0)


@pytest.mark.parametrize("far", [2**31, 2**32 + 5, 2**40])
def test_a_window_beyond_the_keys_is_all_of_them(far: int) -> None:
    plan = TilePlan.streaming(batch=1, mask_heads=1, n_rows=4, n_keys=9, sink=0, recent=far)
    mask, one = torch.zeros(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1, dtype=torch.int64)
    for sink, recent in ((0, far), (far, 1)):
        given = TilePlan.from_mask(
            mask, n_rows=4, n_keys=9, block_q=4, block_k=4, head_class=one * int(HeadClass.STREAMING), sink=one * sink,
            recent=one * recent,
        )  # fmt: skip
        assert plan.density() == given.density() == 1.0


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"head_class": torch.full((1, 2), 2)}, r"head_class must be \[B, Hm\] = \[2, 2\], got \[1, 2\]"),
        ({"head_class": torch.full((2,), 2)}, "head_class must be"),
        ({"head_class": torch.full((2, 2), 7)}, r"0 to 3, got \[7\]"),
        ({"head_class": torch.full((2, 2), int(HeadClass.STREAMING)), "sink": torch.ones(2, 2)}, "sink and recent"),
        ({"head_class": torch.full((2, 2), int(HeadClass.INTERVAL))}, "needs row_intervals"),
        ({"sink": torch.ones(2, 1)}, "sink must be"),
        ({"row_intervals": torch.ones(1, 2, 8, 2)}, "row_intervals must begin"),
    ],
)
def test_head_classes_that_do_not_fit_or_lack_what_they_need_are_refused(given: dict[str, Tensor], word: str) -> None:
    mask = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    with pytest.raises(InvalidRequest, match=word):
        TilePlan.from_mask(mask, n_rows=8, n_keys=8, block_q=4, block_k=4, **given)


def test_a_streaming_row_keeps_its_own_key_whatever_is_given() -> None:
    none = torch.zeros(1, 1)
    plan = TilePlan.from_mask(
        torch.ones(1, 1, 2, 2, dtype=torch.bool), n_rows=8, n_keys=8, block_q=4, block_k=4,
        head_class=torch.full((1, 1), int(HeadClass.STREAMING)), sink=none - 5, recent=none,
    )  # fmt: skip
    plan.check()
    assert torch.equal(plan.to_dense_mask()[0, 0], torch.eye(8, dtype=torch.bool))
