"""Property tests P1 to P10 of every prefill method, on every workload that says something about the property."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from method_matrix import METHODS, Row, Ties
from torch import Tensor
from workloads import WORKLOADS, Shape, Workload

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.kv import KVStorage
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.reference import attend_reference
from winnow.workers.attention.stored import attend_pack
from winnow.workers.prefill.base import PrefillMethod, TileListMethod, prefill_methods

pytestmark = pytest.mark.slow

SHAPES = {"square": Shape(320, 320), "ragged": Shape(301, 301), "cached-prefix": Shape(150, 333), "one-row": Shape(1, 257)}

TIES = {f"{row.method}-{i}": (row, ties) for row in METHODS if not isinstance(row.ties, str) for i, ties in enumerate(row.ties)}
# what estimates by itself, and what does when asked to
ESTIMATES = {row.method: (row, row.params) for row in METHODS if row.estimates} | {
    f"{row.method}-correction": (row, {**row.params, "correction": True})
    for row in METHODS
    if issubclass(prefill_methods.get(row.method), TileListMethod)
}

each_method = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.method)
each_workload = pytest.mark.parametrize("workload", WORKLOADS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def layer_for(x: Workload) -> LayerSpec:
    heads, size = x.q.shape[1], x.q.shape[3]
    return LayerSpec(0, heads, x.k.shape[1], size, 1 / math.sqrt(size))


def create(
    row: Row,
    params: dict[str, object] | None = None,
    q_heads: Sequence[int] = (0, 1, 2, 3),
    kv_heads: Sequence[int] = (0, 1),
) -> PrefillMethod:
    chosen = dict(row.params if params is None else params)
    return row.make(chosen, q_heads, kv_heads) if row.make is not None else prefill_methods.create(row.method, chosen)


def run(method: PrefillMethod, x: Workload) -> tuple[TilePlan | None, Tensor, Tensor]:
    plan = method.plan(x.q, x.k, layer_for(x))
    out, lse = attend_plan(plan, x.q, x.k, x.v, scale=layer_for(x).scale)
    return plan, out, lse


def causal(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def kept(plan: TilePlan | None, x: Workload) -> Tensor:
    """[B, Hq, N, M] bool."""
    shape = (*x.q.shape[:3], x.k.shape[2])
    if plan is None:
        return causal(*shape[2:]).expand(shape)
    return plan.to_dense_mask().repeat_interleave(shape[1] // plan.mask_heads, 1)


def without_estimates(plan: TilePlan) -> TilePlan:
    """The same pairs read, and nothing added for those left out."""
    return dataclasses.replace(plan, mean_correction=False, residual=None)


def dense_truth(x: Workload) -> tuple[Tensor, Tensor]:
    """Output and probabilities of dense attention in float64."""
    group = x.q.shape[1] // x.k.shape[1]
    logits = x.q.double() @ x.k.double().repeat_interleave(group, 1).transpose(-1, -2) * layer_for(x).scale
    probabilities = logits.masked_fill(~causal(*logits.shape[-2:]), -torch.inf).softmax(-1)
    return probabilities @ x.v.double().repeat_interleave(group, 1), probabilities


def error(out: Tensor, x: Workload) -> float:
    truth, _ = dense_truth(x)
    return float((out - truth).norm() / truth.norm())


def test_every_registered_method_has_a_row() -> None:
    assert sorted(row.method for row in METHODS) == prefill_methods.names()


@each_method
def test_parameters_of_the_row_select_something(row: Row) -> None:
    """Otherwise the properties below would be checked on dense attention only."""
    if prefill_methods.get(row.method).caps.exact:
        assert create(row).plan(*_qk("S2"), layer_for(WORKLOADS["S2"](SHAPES["square"], 1))) is None
        return
    plan = create(row).plan(*_qk("S2"), layer_for(WORKLOADS["S2"](SHAPES["square"], 1)))
    assert plan is not None and plan.density() < 0.9
    assert plan.is_estimating == row.estimates


def _qk(name: str) -> tuple[Tensor, Tensor]:
    x = WORKLOADS[name](SHAPES["square"], 1)
    return x.q, x.k


@each_method
@each_shape
@pytest.mark.parametrize("workload", ["S1", "S4", "S7"])
def test_plans_are_valid_and_run_as_they_are_defined(row: Row, shape: Shape, workload: str) -> None:
    x = WORKLOADS[workload](shape, 11)
    plan, out, lse = run(create(row), x)
    if plan is not None:
        plan.check()
    expected, expected_lse = attend_reference(plan, x.q, x.k, x.v, scale=layer_for(x).scale)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-5)


@each_method
@each_shape
@pytest.mark.parametrize("workload", ["S1", "S3", "S7"])
def test_p1_dense_limit_reproduces_dense_attention(row: Row, shape: Shape, workload: str) -> None:
    x = WORKLOADS[workload](shape, 1)
    truth, _ = dense_truth(x)
    half = Workload(x.q.bfloat16(), x.k.bfloat16(), x.v.bfloat16())
    half_truth, _ = dense_truth(half)
    for params in row.dense_limits:
        _, out, _ = run(create(row, params), x)
        torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
        _, out, _ = run(create(row, params), half)
        assert float((out.double() - half_truth).norm() / half_truth.norm()) <= 1e-2


@each_method
@each_workload
@pytest.mark.parametrize("shape", list(SHAPES.values())[:3], ids=list(SHAPES)[:3])
def test_p2_with_the_plan_kept_later_keys_change_no_earlier_row(row: Row, workload: str, shape: Shape) -> None:
    x = WORKLOADS[workload](shape, 2)
    plan, out, lse = run(create(row), x)
    past = shape.m - shape.n
    for j in (past + 1, past + shape.n // 2, shape.m - 1):
        k, v = x.k.clone(), x.v.clone()
        k[:, :, j:] = -3 * k[:, :, j:]
        v[:, :, j:] = v[:, :, j:] + 100
        changed, changed_lse = attend_plan(plan, x.q, k, v, scale=layer_for(x).scale)
        assert torch.equal(changed[:, :, : j - past], out[:, :, : j - past])
        assert torch.equal(changed_lse[:, :, : j - past], lse[:, :, : j - past])
        assert not torch.equal(changed[:, :, j - past :], out[:, :, j - past :])


@each_method
@each_workload
@each_shape
def test_p3_error_is_within_the_recall_bound(row: Row, workload: str, shape: Shape) -> None:
    """Of what is read. Estimates of the rest are left aside here: they are no keys, and the bound says nothing about them."""
    x = WORKLOADS[workload](shape, 3)
    plan = create(row).plan(x.q, x.k, layer_for(x))
    read = without_estimates(plan) if plan is not None else None
    out, lse = attend_plan(read, x.q, x.k, x.v, scale=layer_for(x).scale)
    truth, probabilities = dense_truth(x)
    recall = (probabilities * kept(plan, x)).sum(-1)
    longest = x.v.double().norm(dim=-1).amax(-1).repeat_interleave(shape.q_heads // shape.kv_heads, 1)[..., None]
    error = (out.double() - truth).norm(dim=-1)
    assert bool((error <= 2 * (1 - recall).clamp(min=0) * longest + 1e-4).all())
    group = shape.q_heads // shape.kv_heads
    logits = x.q.double() @ x.k.double().repeat_interleave(group, 1).transpose(-1, -2) * layer_for(x).scale
    exact_lse = logits.masked_fill(~causal(shape.n, shape.m), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact_lse + recall.log(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("row", "params"), ESTIMATES.values(), ids=ESTIMATES)
def test_p3_what_a_method_estimates_brings_it_nearer_to_dense_on_average(row: Row, params: dict[str, object]) -> None:
    """Over all workloads, beside the same keys read and nothing estimated."""
    with_, without, compared = 0.0, 0.0, 0
    for workload in WORKLOADS.values():
        x = workload(SHAPES["square"], 3)
        plan, out, _ = run(create(row, params), x)
        if plan is None or not plan.is_estimating:
            continue
        with_ += error(out, x)
        without += error(attend_plan(without_estimates(plan), x.q, x.k, x.v, scale=layer_for(x).scale)[0], x)
        compared += 1
    assert compared
    assert with_ < without


@each_method
def test_p3_mean_correction_serves_every_method_that_lists_tiles(row: Row) -> None:
    """Nearer to dense on average, and by Jensen's inequality never more mass than there is."""
    with_, without = 0.0, 0.0
    for workload in WORKLOADS.values():
        x = workload(SHAPES["square"], 3)
        plan = create(row).plan(x.q, x.k, layer_for(x))
        if plan is None or HeadClass.CSR not in plan.kinds:
            continue
        plan = dataclasses.replace(without_estimates(plan), token_columns=None)
        out, lse = attend_plan(plan, x.q, x.k, x.v, scale=layer_for(x).scale)
        better, more = attend_plan(dataclasses.replace(plan, mean_correction=True), x.q, x.k, x.v, scale=layer_for(x).scale)
        _, most = attend_plan(None, x.q, x.k, x.v, scale=layer_for(x).scale)
        assert bool((more >= lse - 1e-4).all()) and bool((more <= most + 1e-4).all())
        with_ += error(better, x)
        without += error(out, x)
    assert with_ <= without


@each_method
def test_p3_a_method_that_lists_tiles_takes_correction_and_reads_the_same(row: Row) -> None:
    """All but those that estimate by themselves or list single keys."""
    planned = 0
    for workload in WORKLOADS.values():
        x = workload(SHAPES["square"], 3)
        method = create(row)
        plan = method.plan(x.q, x.k, layer_for(x))
        if plan is None or HeadClass.CSR not in plan.kinds:
            continue
        if not isinstance(method, TileListMethod):
            assert plan.residual is not None or plan.block_q == 1, "it could"
            continue
        assert not plan.mean_correction
        corrected = create(row, {**row.params, "correction": True}).plan(x.q, x.k, layer_for(x))
        assert corrected is not None and corrected.mean_correction
        assert torch.equal(corrected.to_dense_mask(), plan.to_dense_mask())
        planned += 1
    assert planned or not isinstance(create(row), TileListMethod)


@each_method
@each_shape
@pytest.mark.parametrize("kind", ["zeros", "equal", "huge", "one-hot"])
def test_p4_no_row_is_empty_and_output_is_finite(row: Row, shape: Shape, kind: str) -> None:
    x = WORKLOADS["S1"](shape, 4)
    if kind == "zeros":
        x = Workload(torch.zeros_like(x.q), torch.zeros_like(x.k), x.v)
    elif kind == "equal":
        x = Workload(torch.ones_like(x.q), torch.ones_like(x.k), x.v)
    elif kind == "huge":
        x = Workload(x.q * 1e2, x.k * 1e2, x.v)
    else:
        k = torch.zeros_like(x.k)
        k[:, :, 0] = 50.0
        x = Workload(x.q.abs() * 10, k, x.v)
    plan, out, lse = run(create(row), x)
    mask = kept(plan, x)
    own = torch.arange(shape.m - shape.n, shape.m).expand(*mask.shape[:3]).unsqueeze(-1)
    assert bool(mask.gather(-1, own).all())
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


@each_method
@each_shape
def test_p5_grouped_heads_equal_repeated_heads(row: Row, shape: Shape) -> None:
    x = WORKLOADS["S7"](shape, 5)
    group = shape.q_heads // shape.kv_heads
    repeated = Workload(x.q, x.k.repeat_interleave(group, 1), x.v.repeat_interleave(group, 1))
    plan, out, lse = run(create(row), x)
    other_plan, other, other_lse = run(create(row, kv_heads=(0, 0, 1, 1)), repeated)
    assert torch.equal(kept(plan, x), kept(other_plan, repeated))
    torch.testing.assert_close(out, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, other_lse, atol=1e-5, rtol=1e-5)


@each_method
@pytest.mark.parametrize("m", [129, 255, 257, 300, 319])
@pytest.mark.parametrize("rows", ["all", "some"])
def test_p6_what_lies_beyond_a_ragged_end_carries_no_weight(row: Row, m: int, rows: str) -> None:
    n = m if rows == "all" else m // 2
    x = WORKLOADS["S7"](Shape(n, m), 6)
    plan, out, _ = run(create(row), x)
    room = torch.full((*x.k.shape[:2], m + 70, x.k.shape[3]), torch.nan)  # what follows in memory must not be read
    k, v = room.clone(), room.clone()
    k[:, :, :m], v[:, :, :m] = x.k, x.v
    inside = Workload(x.q, k[:, :, :m], v[:, :, :m])
    inside_plan, inside_out, _ = run(create(row), inside)
    assert torch.equal(kept(plan, x), kept(inside_plan, x))
    torch.testing.assert_close(inside_out, out, atol=1e-6, rtol=1e-6)
    truth, _ = attend_reference(plan, x.q.double(), x.k.double(), x.v.double(), scale=layer_for(x).scale)
    torch.testing.assert_close(out.double(), truth, atol=1e-4, rtol=1e-4)


@each_method
def test_p7_a_packed_batch_equals_one_by_one(row: Row) -> None:
    """Lengths 1, 257 and 320 in one pack, attended in one call, and two equal lengths in one batch."""
    lengths = (1, 257, 320)
    parts = [WORKLOADS["S7"](Shape(n, n), 7 + n) for n in lengths]
    pack = Workload(*(torch.cat([getattr(p, name) for p in parts], 2) for name in ("q", "k", "v")))
    ends = [0, *itertools.accumulate(lengths)]
    plans, outs, lses = [], [], []
    for part, start, stop in zip(parts, ends, ends[1:], strict=False):
        view = Workload(*(getattr(pack, name)[:, :, start:stop] for name in ("q", "k", "v")))
        plan, out, lse = run(create(row), part)
        plans.append(create(row).plan(view.q, view.k, layer_for(view)))
        assert torch.equal(kept(plan, part), kept(plans[-1], part))
        outs.append(out)
        lses.append(lse)
    q, k, v = (x[0].transpose(0, 1) for x in (pack.q, pack.k, pack.v))  # [tokens, heads, D]
    packed, packed_lse = attend_pack(plans, q, KVStorage(k, v), ends, ends, scale=layer_for(pack).scale)
    torch.testing.assert_close(packed.transpose(0, 1)[None], torch.cat(outs, 2), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed_lse[None], torch.cat(lses, 2), atol=1e-6, rtol=1e-6)
    pair = [WORKLOADS[name](SHAPES["ragged"], 70) for name in ("S2", "S4")]
    both = Workload(*(torch.cat([getattr(p, name) for p in pair], 0) for name in ("q", "k", "v")))
    plan, out, _ = run(create(row), both)
    for i, part in enumerate(pair):
        one_plan, one, _ = run(create(row), part)
        assert torch.equal(kept(plan, both)[i : i + 1], kept(one_plan, part))
        torch.testing.assert_close(out[i : i + 1], one, atol=1e-5, rtol=1e-5)


@each_method
def test_p8_chunks_give_the_one_shot_plan_where_a_method_says_so(row: Row) -> None:
    x = WORKLOADS["S7"](SHAPES["square"], 8)
    method = create(row)
    plan, out, _ = run(method, x)
    step = 128
    pieces, masks = [], []
    for start in range(0, 320, step):
        stop = min(320, start + step)
        part = Workload(x.q[:, :, start:stop], x.k[:, :, :stop], x.v[:, :, :stop])
        part_plan, part_out, _ = run(method, part)
        pieces.append(part_out)
        masks.append(torch.nn.functional.pad(kept(part_plan, part), (0, 320 - stop)))
    same = torch.equal(torch.cat(masks, 2), kept(plan, x))
    assert same == (method.caps.prefix_safe and method.caps.chunked)
    if same:
        torch.testing.assert_close(torch.cat(pieces, 2), out, atol=1e-5, rtol=1e-5)


@each_method
def test_p8_layers_with_a_window_are_left_dense_also_while_it_holds_everything(row: Row) -> None:
    """Else a first chunk within the window would be planned, and the whole prompt not."""
    x, method = WORKLOADS["S7"](SHAPES["square"], 8), create(row)
    assert method.caps.exact or method.plan(x.q, x.k, layer_for(x)) is not None
    for window in (100, 320, 100_000):
        assert method.plan(x.q, x.k, dataclasses.replace(layer_for(x), window=window)) is None


@each_method
@each_workload
def test_p9_same_inputs_give_the_same_plan(row: Row, workload: str) -> None:
    x = WORKLOADS[workload](SHAPES["ragged"], 9)
    first, out, _ = run(create(row), x)
    second, again, _ = run(create(row), Workload(x.q.clone(), x.k.clone(), x.v.clone()))
    assert torch.equal(kept(first, x), kept(second, x))
    assert torch.equal(out, again)


@pytest.mark.parametrize(("row", "ties"), TIES.values(), ids=TIES)
def test_p9_ties_go_to_the_lower_key(row: Row, ties: Ties) -> None:
    """All keys equal: what a row leaves out is one gap. Before it lie the first keys, more of them than the one tile that some
    methods always read; after it what is read anyway or, where distances tie too, the shortest of them."""
    x = WORKLOADS["S1"](SHAPES["square"], 9)
    same = Workload(torch.zeros_like(x.q), torch.zeros_like(x.k), x.v)
    plan = create(row, ties.params).plan(same.q, same.k, layer_for(same))
    assert plan is not None and plan.block_q == plan.block_k
    left_out = causal(320, 320) & ~kept(plan, same)  # [1, Hq, N, M]
    has_gap = left_out.any(-1)
    first, end = left_out.int().argmax(-1), 320 - left_out.flip(-1).int().argmax(-1)
    assert bool((end - first == left_out.sum(-1))[has_gap].all())
    assert bool((first.masked_fill(~has_gap, 0).amax(-1) > plan.block_k).all())
    between = (torch.arange(320) // plan.block_q * plan.block_q - end)[has_gap]  # from the gap to a row's own tile
    if ties.near is not None:
        assert bool((between == ties.near * plan.block_k).all())
    else:  # columns and distances are the same for all rows
        assert between.unique().numel() == first[has_gap].unique().numel() == 1 and int(between[0]) > 0


@each_method
def test_p10_permuting_heads_permutes_the_output(row: Row) -> None:
    x = WORKLOADS["S7"](SHAPES["ragged"], 10)
    kv_order, q_order = [1, 0], [3, 2, 0, 1]  # groups swapped, and the heads of a group
    moved = Workload(x.q[:, q_order], x.k[:, kv_order], x.v[:, kv_order])
    plan, out, _ = run(create(row), x)
    moved_plan, moved_out, _ = run(create(row, q_heads=q_order, kv_heads=kv_order), moved)
    assert torch.equal(kept(moved_plan, moved), kept(plan, x)[:, q_order])
    torch.testing.assert_close(moved_out, out[:, q_order], atol=1e-5, rtol=1e-5)
