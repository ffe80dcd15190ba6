"""SEA: which keys its cells stand for, how many it keeps, that nothing looks ahead, and what its gates mix."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workloads import Shape, Workload, s1_noise, s7_mixture

from winnow.errors import ContextTooLong, CorruptBlock, InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.prefill import scoring, sea_network
from winnow.workers.prefill.methods.sea import SEA, Mix, Network, cell_edges, keys_of_cells, running_mean
from winnow.workers.prefill.sea_network import Sizes, draw_map, key_sums

pytestmark = pytest.mark.slow

D, HEADS, COLUMNS = 32, 4, 16
LAYER = LayerSpec(1, HEADS, 2, D, 1 / math.sqrt(D))
SIZES = Sizes(HEADS, D, positions=700, features=20, columns=COLUMNS)
SPEC = ModelSpec("llama", 2, 128, 128, HEADS, 2, D, 8, 4096, (), (RopeSpec((1.0,)),), (0, 0))


def network(sizes: Sizes = SIZES, gates: tuple[float, float] = (4.0, 2.0)) -> Network:
    layers = [sizes.initial(seed) for seed in (1, 2)]
    tensors = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    tensors["gate_b"] = torch.tensor([gates, gates])
    tensors["longest"] = torch.tensor(sizes.positions)
    return Network.of(tensors, SPEC, torch.device("cpu"))


def method(**params: Any) -> SEA:
    return SEA(**{"k": 8, **params}).with_network(network())


def plan_of(sea: SEA, x: Workload) -> TilePlan:
    plan = sea.plan(x.q, x.k, LAYER)
    assert plan is not None
    plan.check()
    return plan


def naive_cell(j: int, length: int, columns: int) -> int:
    return (2 * j + 1) * columns // (2 * length)  # floor((j + 1/2) columns / length)


@pytest.mark.parametrize("columns", [8, 16])
def test_every_key_of_every_row_lies_in_the_cell_of_the_rule(columns: int) -> None:
    edges = cell_edges(torch.arange(1, 301), columns)
    for length in range(1, 301):
        cells = [naive_cell(j, length, columns) for j in range(length)]
        own = edges[length - 1].tolist()
        assert own[0] == 0 and own[-1] == length
        for j, cell in enumerate(cells):
            assert own[cell] <= j < own[cell + 1]
        if length < columns:
            assert len(set(cells)) == length  # every key has a cell of its own


@pytest.mark.parametrize(("n", "m"), [(300, 300), (77, 150), (1, 40)])
@pytest.mark.parametrize("sink", [0, 5, 40])
def test_lists_hold_the_keys_of_the_kept_cells_before_ones_own(n: int, m: int, sink: int) -> None:
    gen = torch.Generator().manual_seed(m)
    sea = SEA(k=6)
    cells = sea.choose(torch.randn(2, HEADS, n, COLUMNS, generator=gen), torch.arange(m - n, m))
    found = keys_of_cells(cells, m, sea.count(torch.arange(m - n, m), HEADS, COLUMNS), sink).to_mask(m).view(2, HEADS, n, m)
    cell_of = torch.full((n, m), COLUMNS)
    for i in range(n):
        length = m - n + i + 1
        for j in range(length - 1):
            cell_of[i, j] = naive_cell(j, length, COLUMNS)
    kept = torch.nn.functional.pad(cells, (0, 1)).gather(-1, cell_of.expand(2, HEADS, -1, -1))
    kept |= (torch.arange(m) < sink) & (cell_of < COLUMNS)
    assert torch.equal(found, kept)


@pytest.mark.parametrize(("n", "m"), [(300, 300), (77, 150), (1, 1)])
def test_a_sink_beyond_the_sequence_lists_what_the_whole_sequence_as_sink_does(n: int, m: int) -> None:
    """Room for 1 << 50 keys a row fits no machine."""
    gen = torch.Generator().manual_seed(m)
    sea, positions = SEA(k=6), torch.arange(m - n, m)
    cells, count = sea.choose(torch.randn(2, HEADS, n, COLUMNS, generator=gen), positions), sea.count(positions, HEADS, COLUMNS)
    whole, more = (keys_of_cells(cells, m, count, sink) for sink in (m, 1 << 50))
    assert torch.equal(whole.offsets, more.offsets) and torch.equal(whole.ids, more.ids)
    before = torch.ones(n, m, dtype=torch.bool).tril(m - n - 1)  # one's own key is not listed
    assert torch.equal(more.to_mask(m).view(2, HEADS, n, m), before.expand(2, HEADS, -1, -1))


@pytest.mark.parametrize("k", [1, 8, 50])
@pytest.mark.parametrize("oversample", [1.0, 2.5])
def test_number_of_cells_and_keys_follows_the_formula(k: int, oversample: float) -> None:
    x = s7_mixture(Shape(600, 600), 1)
    sea = method(k=k, oversample=oversample, mix=False)
    cells, _ = sea._cells(network(), x.q, x.k, LAYER)
    per_row = cells.sum((1, 3))[0]
    kept = plan_of(sea, x).to_dense_mask().sum((1, 3))[0]
    for i in range(600):
        exact = HEADS * k * oversample * COLUMNS / (i + 1)
        wanted = min(max(1, math.floor(exact + 0.5)), HEADS * COLUMNS)
        assert int(per_row[i]) == wanted
        # a cell holds (i + 1) / columns keys, give or take one; the keys of a row's own are read besides
        room = (i + 1) / COLUMNS
        assert wanted * (room - 1) <= int(kept[i]) <= wanted * (room + 1) + HEADS
        if exact < HEADS * COLUMNS:
            assert abs(int(kept[i]) - HEADS * k * oversample) <= HEADS * room + wanted + HEADS


def test_ties_go_to_the_lower_head_and_column() -> None:
    cells = SEA(k=8).choose(torch.zeros(1, HEADS, 1, COLUMNS), torch.tensor([99]))
    assert cells.flatten().nonzero().flatten().tolist() == list(range(5))  # 4 * 8 * 16 / 100 = 5.12


@pytest.mark.parametrize("shape", [Shape(200, 200), Shape(60, 200)])
def test_everything_kept_and_gates_at_one_is_dense(shape: Shape) -> None:
    x = s7_mixture(shape, 2)
    plan = plan_of(method(k=10_000, mix=False), x)
    assert plan.density() == 1.0 and not plan.is_estimating
    out, lse = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    expected, expected_lse = attend_plan(None, x.q, x.k, x.v, scale=LAYER.scale)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    open_gates = SEA(k=10_000).with_network(network(gates=(30.0, 30.0)))
    mixed, _ = attend_plan(plan_of(open_gates, x), x.q, x.k, x.v, scale=LAYER.scale)
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gates", [(4.0, 2.0), (0.0, 0.0), (-3.0, 1.0), (2.0, -40.0), (40.0, 40.0)])
def test_output_is_the_gates_mix_of_sparse_attention_and_the_running_mean(gates: tuple[float, float]) -> None:
    x = s7_mixture(Shape(90, 150), 3)
    plan = plan_of(SEA(k=8).with_network(network(gates=gates)), x)
    assert isinstance(plan.residual, Mix)
    sparse, _ = attend_plan(plan.residual.plan, x.q, x.k, x.v, scale=LAYER.scale)
    out, lse = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    scaled, mixed = torch.sigmoid(plan.residual.gates).unbind(-1)
    mean = torch.stack([x.v[:, :, : 61 + i].mean(2) for i in range(90)], 2).repeat_interleave(2, 1)
    expected = (mixed * scaled).unsqueeze(-1) * sparse + (1 - mixed).unsqueeze(-1) * mean
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert bool(lse.isfinite().all())
    torch.testing.assert_close(running_mean(x.v, 90).repeat_interleave(2, 1), mean)


@pytest.mark.parametrize("at", [1, 130, 200, 299])
def test_with_frozen_weights_the_future_changes_nothing(at: int) -> None:
    """New queries, keys and values from `at` on: maps, gates, plan and output before stay the same."""
    x, other = s7_mixture(Shape(300, 300), 4), s7_mixture(Shape(300, 300), 5)
    y = Workload(*(torch.cat((a[:, :, :at], b[:, :, at:]), 2) for a, b in ((x.q, other.q), (x.k, other.k), (x.v, other.v))))
    p = network().layer(1)
    for a, b in zip(draw_map(p, x.q, x.k, 0, 0.2, 700)[:2], draw_map(p, y.q, y.k, 0, 0.2, 700)[:2], strict=True):
        torch.testing.assert_close(a[:, :, :at], b[:, :, :at], atol=1e-5, rtol=1e-5)
        assert not torch.equal(a[:, :, at:], b[:, :, at:])
    sea = method()
    plans = [plan_of(sea, z) for z in (x, y)]
    assert torch.equal(plans[0].to_dense_mask()[:, :, :at], plans[1].to_dense_mask()[:, :, :at])
    outs = [attend_plan(plan, z.q, z.k, z.v, scale=LAYER.scale)[0] for plan, z in zip(plans, (x, y), strict=True)]
    torch.testing.assert_close(outs[0][:, :, :at], outs[1][:, :, :at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("borders", [[0, 300], [0, 128, 300], [0, 1, 2, 5, 131, 300]])
def test_a_map_drawn_piece_by_piece_with_its_carry_is_the_whole_map(borders: list[int]) -> None:
    x = s7_mixture(Shape(300, 300), 6)
    p = network().layer(0)
    whole, whole_gates, last = draw_map(p, x.q, x.k, 0, LAYER.scale, 700)
    carry, maps, gates = None, [], []
    for start, stop in itertools.pairwise(borders):
        log_map, gate, carry = draw_map(p, x.q[:, :, start:stop], x.k[:, :, start:stop], start, LAYER.scale, 700, carry)
        maps.append(log_map)
        gates.append(gate)
    torch.testing.assert_close(torch.cat(maps, 2), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(gates, 2), whole_gates, atol=1e-4, rtol=1e-4)
    assert carry is not None
    torch.testing.assert_close(carry.sums, last.sums, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(key_sums(p, x.k, LAYER.scale, 700), last.sums, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(1, HEADS, 300))


def test_linear_attention_is_its_definition() -> None:
    x = s1_noise(Shape(150, 150), 7)
    p = network().layer(0)

    def phi(z: Tensor) -> Tensor:
        return torch.relu(z.double() * math.sqrt(LAYER.scale) @ p["features"].double().T) + 1e-3

    weights = (phi(x.q) @ phi(x.k).repeat_interleave(2, 1).transpose(-1, -2)).tril()
    table = p["positions"].double()  # 128 rows for 700 positions, straight lines between the rows' middles
    place = ((torch.arange(150) + 0.5) * 128 / 700 - 0.5).clamp(min=0).double()
    low, share = place.floor().long(), (place - place.floor())[:, None]
    marks = (1 - share) * table[low] + share * table[(low + 1).clamp(max=127)]
    values = torch.cat((marks.expand(1, 2, -1, -1), x.k.double()), -1).repeat_interleave(2, 1)
    attended = (weights / weights.sum(-1, keepdim=True)) @ values
    encoded = torch.cat((attended.float(), x.k.repeat_interleave(2, 1)), -1) @ p["encode_w"].T + p["encode_b"]
    encoded = torch.nn.functional.gelu(torch.nn.functional.layer_norm(encoded, (2 * D,)))
    _, gates, _ = draw_map(p, x.q, x.k, 0, LAYER.scale, 700)
    torch.testing.assert_close(gates, encoded @ p["gate_w"].T + p["gate_b"], atol=1e-4, rtol=1e-4)


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(2, 8, positions=2600, features=10, columns=8)
    gen = torch.Generator().manual_seed(8)
    q, k = torch.randn(1, 2, 2500, 8, generator=gen), torch.randn(1, 1, 2600, 8, generator=gen)
    tensors = {name: tensor[None] for name, tensor in sizes.initial(3).items()}
    tensors["longest"] = torch.tensor(2600)
    spec = ModelSpec("llama", 1, 16, 16, 2, 1, 8, 8, 4096, (), (RopeSpec((1.0,)),), (0,))
    sea = SEA(k=4).with_network(Network.of(tensors, spec, torch.device("cpu")))
    layer = LayerSpec(0, 2, 1, 8, 1 / math.sqrt(8))
    whole = sea.plan(q, k, layer)
    monkeypatch.setattr(scoring, "SLAB_BYTES", 1)
    slabs = sea.plan(q, k, layer)
    assert whole is not None and slabs is not None
    assert float((whole.to_dense_mask() != slabs.to_dense_mask()).float().mean()) < 1e-4  # sums in another order: ties may turn


def test_it_is_linear_in_the_length() -> None:
    """Entries of the plan, while one cell of k Hq columns tokens is not the least a row keeps; the map holds N x columns."""
    gen = torch.Generator().manual_seed(9)
    entries = []
    for m in (4096, 8192):
        sea = SEA(k=64)
        cells = sea.choose(torch.randn(1, 2, m, 128, generator=gen), torch.arange(m))
        entries.append(keys_of_cells(cells, m, sea.count(torch.arange(m), 2, 128)).ids.numel())
    assert entries[1] <= 2.2 * entries[0] and entries[1] < 0.02 * 2 * 8192 * 8192 / 2


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation under it returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def largest_while_planning(n: int) -> int:
    """Elements, for a k and columns with which every row keeps more than the one cell that each keeps at least."""
    sizes = Sizes(HEADS, D, positions=4096, features=20, columns=64)
    x, sea = s1_noise(Shape(n, n), 12), SEA(k=32).with_network(network(sizes))
    with LargestTensor() as largest:
        assert sea.plan(x.q, x.k, LAYER) is not None
    return largest.elements


@pytest.mark.parametrize("n", [1024, 2048])
def test_the_largest_tensor_of_planning_doubles_with_the_length(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert n >= 4 * sea_network._SCAN, "the scan is of one or few chunks: the comparison says nothing"
    assert largest_while_planning(2 * n) <= 2.2 * largest_while_planning(n)
    unblocked = []
    for length in (n, 2 * n):
        monkeypatch.setattr(sea_network, "_SCAN", length)
        unblocked.append(largest_while_planning(length))
    assert unblocked[1] > 2.2 * unblocked[0], "a scan in one chunk goes unnoticed: the count misses its products"


def test_sink_and_own_key_are_always_read() -> None:
    x = s1_noise(Shape(200, 300), 10)
    mask = plan_of(method(k=1, sink=7), x).to_dense_mask()
    assert bool(mask[..., :7].all())
    assert bool(mask[0, :, torch.arange(200), torch.arange(100, 300)].all())


def test_what_it_was_not_trained_for_is_refused() -> None:
    x = s1_noise(Shape(701, 701), 11)
    with pytest.raises(ContextTooLong, match="at most 700 tokens, got 701"):
        method().plan(x.q, x.k, LAYER)
    with pytest.raises(Unsupported, match="winnow calibrate sea"):
        SEA().plan(x.q, x.k, LAYER)
    with pytest.raises(InvalidRequest, match="4 query heads of size 32, got 2"):
        method().plan(x.q[:, :2, :100], x.k[:, :1, :100], LAYER)
    assert method().plan(x.q[:, :, :100], x.k[:, :, :100], LayerSpec(0, HEADS, 2, D, 1.0, window=50)) is None


@pytest.mark.parametrize("change", ["missing", "length", "shape", "layers"])
def test_a_calibration_that_does_not_fit_is_refused(change: str) -> None:
    tensors = {**network().tensors, "longest": torch.tensor(700)}
    assert Network.of(tensors, SPEC, torch.device("cpu")).sizes == SIZES
    if change == "missing":
        del tensors["conv1_w"]
    elif change == "length":
        del tensors["longest"]
    elif change == "shape":
        tensors["encode_w"] = tensors["encode_w"][:, :, :-1]
    else:
        tensors["positions"] = tensors["positions"][:1]
    with pytest.raises(CorruptBlock, match="winnow calibrate sea"):
        Network.of(tensors, SPEC, torch.device("cpu"))


@pytest.mark.parametrize(
    "changed",
    [
        {"longest": torch.tensor([700, 700])},
        {"longest": torch.tensor(math.nan)},
        {"longest": torch.tensor(0)},
        {"longest": torch.tensor(10**9)},
        {"row_b": torch.full((2, 8), math.nan)},
        {"encode_w": torch.ones(2, 2 * D, 3 * D, dtype=torch.int8)},
        {"encode_w": torch.ones(2, 2 * D, 3 * D, dtype=torch.int8), "encode_w.scale": torch.ones(2, 5)},
        {"encode_w": torch.ones(2, 2 * D, 3 * D, dtype=torch.int8), "encode_w.scale": torch.tensor(1.0)},
        {"encode_w": torch.ones(2, 2 * D, 3 * D, dtype=torch.int8), "encode_w.scale": torch.full((2, 2 * D), math.inf)},
    ],
    ids=lambda changed: "-".join(f"{name}{tuple(tensor.shape)}" for name, tensor in changed.items()),
)
def test_a_calibration_that_makes_no_sense_is_refused(changed: dict[str, Tensor]) -> None:
    whole = {**network().tensors, "longest": torch.tensor(700)}
    assert changed.get("row_b", whole["row_b"]).shape == whole["row_b"].shape
    assert changed.get("encode_w", whole["encode_w"]).shape == whole["encode_w"].shape
    with pytest.raises(CorruptBlock, match="winnow calibrate sea"):
        Network.of({**whole, **changed}, SPEC, torch.device("cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "network"])
def test_numbers_that_are_not_finite_leave_as_many_cells_as_ever(value: float, where: str) -> None:
    """The room for lists is taken before anybody looks at scores."""
    x, sea = s1_noise(Shape(200, 200), 13), method()
    expected = plan_of(sea, x).to_dense_mask()
    if where == "network":
        assert sea.network is not None
        tensors = {name: tensor.clone() for name, tensor in sea.network.tensors.items()}
        tensors["mix_b"][:] = value
        sea = SEA(k=8).with_network(Network(SIZES, tensors))
    else:
        getattr(x, where)[0, 1, 150:153] = value
    plan = plan_of(sea, x)
    attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    if where == "network":
        return
    assert torch.equal(plan.to_dense_mask()[:, :, :128], expected[:, :, :128])  # the scan's chunks before it
    cells = sea.choose(torch.full((1, HEADS, 1, COLUMNS), value), torch.tensor([99]))
    assert int(cells.sum()) == int(sea.count(torch.tensor([99]), HEADS, COLUMNS))


@pytest.mark.parametrize(
    ("params", "field"),
    [({"k": 0}, "k must"), ({"oversample": 0.0}, "oversample"), ({"oversample": math.inf}, "oversample"), ({"sink": -1}, "sink")],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        SEA(**params)
