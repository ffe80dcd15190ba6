"""Sparse where it pays, dense where it does not: by measured cells, prompt by prompt, without a look at the clock."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from winnow.registry import parse_spec
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill import break_even
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.break_even import ALLOWANCE, LAG, BreakEven, dense_share
from winnow.workers.prefill.costs import DeviceCosts, MethodCosts, Size, costs_of, device_kind, variant_of

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"winnow_bench_{name}", ROOT / "tests" / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # its dataclasses look themselves up
    spec.loader.exec_module(found)
    return found


fitting = load("fit_costs")

# -- fitting --------------------------------------------------------------------------------------------------------


def rows_of(kind: str, noise: float, seed: int) -> list[dict[str, Any]]:
    """A table as the benchmarks write it, of a machine whose costs are these formulas, each value off by up to `noise`."""
    gen = random.Random(seed)
    rows: list[dict[str, Any]] = []

    def near(value: float) -> float:
        return value * (1 + gen.uniform(-noise, noise))

    for n in (1024, 2048, 8192, 32768, 131072):
        for method, scoring in (("cheap", 0.02), ("probing", 0.08), ("costly", 0.3)):
            for workload, density in (("model-like", min(1.0, 0.05 + 900 / n)), ("S7", 0.3), ("S1", 0.97)):
                size = Size(n, n, 32, 128)
                pairs, volume, _ = size.attended(1.0)
                dense = near(0.03 * pairs + 0.02 * volume + 0.02)
                attention = near(0.05 * pairs * density + 0.03 * volume + 0.06)
                if kind == "steep":  # nothing a fit of three coefficients can follow
                    attention = near(0.05 * pairs * density**0.5 + 0.3)
                selection = near(scoring * 0.03 * pairs + 0.01 * volume + 0.15)
                at = f"prefill/{n}/{workload}/{method}"
                for name, value, control in (
                    ("selection_ms", selection, dense), ("attention_ms", attention, dense), ("density", density, 1.0),
                ):  # fmt: skip
                    rows.append({"name": f"{at}/{name}", "value": value, "unit": "ms", "control_value": control})
        for density in (0.05, 0.1, 0.25):
            kept = density + 0.004  # what the plan really held; the name has the round figure
            value = near(0.05 * pairs * kept + 0.03 * volume + 0.06)
            work = 4 * 32 * 128 * n * (n + 1) / 2 / 1e9
            rows.append({"name": f"executor/{n}/{density:.2f}/128x128", "unit": "TFLOP/s", "value": work * kept / value,
                         "control_value": work / dense, "note": f"kept {kept:.4f} of the causal pairs"})  # fmt: skip
    return rows


def cells_of(tmp_path: Path, rows: list[dict[str, Any]]) -> list[Any]:
    (tmp_path / "prefill_h100.json").write_text(json.dumps({"rows": rows}))
    found: list[Any] = fitting.read_cells(tmp_path, ["prefill_h100.json", "executor_h100.json"], 32, 128)
    return found


def measured_over_dense(costs: DeviceCosts, cell: Any) -> float:
    """What serving pays for a cell when the predictor knows its density, by the shipped code and not by the fit's."""
    one = DeviceCosts.from_json(json.loads(json.dumps(fitting.to_json(costs))))
    method = one.methods[cell.variant]
    assert method.covers(cell.size)
    if method.selection_ms(cell.size) + method.attention_ms(cell.size, cell.density) > one.dense_ms(cell.size):
        return 1.0
    return float((cell.selection_ms + cell.attention_ms) / cell.dense_ms)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "noise"), [("plain", 0.0), ("plain", 0.05), ("plain", 0.2), ("steep", 0.05)])
def test_no_choice_on_a_measured_cell_costs_more_than_three_percent(kind: str, noise: float, seed: int, tmp_path: Path) -> None:
    cells = cells_of(tmp_path, rows_of(kind, noise, seed))
    assert sum(c.selection_ms is None for c in cells) == 15, "executor rows are read too"
    costs = fitting.fit_device(cells)
    own = [c for c in cells if c.selection_ms is not None]
    assert max(measured_over_dense(costs, c) for c in own) <= 1.03


def test_exact_formulas_are_found_again_and_nothing_is_left_lying(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, rows_of("plain", 0.0, 0))
    costs = fitting.fit_device(cells)
    assert costs.dense == pytest.approx((0.03, 0.02, 0.02), rel=1e-3)
    for c in (c for c in cells if c.selection_ms is not None):
        own = costs.methods[c.variant]
        assert own.margin == 1.0
        assert own.attention_ms(c.size, c.density) == pytest.approx(c.attention_ms, rel=1e-3)
        assert own.selection_ms(c.size) == pytest.approx(c.selection_ms, rel=1e-3)
        assert measured_over_dense(costs, c) == pytest.approx(min(1.0, (c.selection_ms + c.attention_ms) / c.dense_ms), rel=0.05)
    assert costs.methods["cheap"].usual_density(2047) == pytest.approx(0.05 + 900 / 1024)
    assert costs.methods["cheap"].usual_density(1000) == 1.0
    assert costs.methods["cheap"].usual_density(2047, "size=2") == pytest.approx(0.05 + 900 / 1024)
    assert not costs.methods["cheap"].covers(Size(512, 1024, 32, 128)) and costs.methods["cheap"].covers(Size(512, 2048, 32, 128))


def test_a_method_with_few_cells_borrows_those_of_the_executor(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, rows_of("plain", 0.0, 0))
    few = [
        c
        for c in cells
        if c.selection_ms is None or (c.variant == "cheap" and c.workload == "S7" and c.size.keys in (8192, 32768))
    ]
    assert len(few) == 15 + 2
    size = Size(131072, 131072, 32, 128)
    found = fitting.fit_device(few).methods["cheap"].attention_ms(size, 0.1)
    assert found == pytest.approx(fitting.fit_device(cells).methods["cheap"].attention_ms(size, 0.1), rel=0.02)


def test_coefficients_are_never_negative() -> None:
    gen = random.Random(3)
    for _ in range(50):
        features = [(gen.random(), gen.random(), 1.0) for _ in range(8)]
        found = fitting.fit(features, [gen.random() + 0.01 for _ in range(8)])
        assert min(found) >= 0 and max(found) > 0
        assert fitting.fit(features, [1.0] * 8, (3.0, 0.0, 0.0))[0] >= 3.0


def committed() -> list[str]:
    """Kinds of device whose measurements are here."""
    return [kind for kind, (names, _, _) in fitting.DEVICES.items() if (fitting.RESULTS / names[0]).is_file()]


@pytest.mark.parametrize("kind", committed())
def test_the_shipped_costs_keep_the_promise_on_the_committed_measurements(kind: str) -> None:
    names, heads, head_size = fitting.DEVICES[kind]
    cells = [c for c in fitting.read_cells(fitting.RESULTS, names, heads, head_size) if c.selection_ms is not None]
    shipped = DeviceCosts.from_json(json.loads((ROOT / "workers/prefill/costs.json").read_text())["devices"][kind])
    ratios = {(c.spec, c.workload, c.size): measured_over_dense(shipped, c) for c in cells}
    assert {case: ratio for case, ratio in ratios.items() if ratio > 1.03} == {}
    gain: dict[str, float] = {}  # the most that a variant could
    for c in cells:
        gain[c.variant] = min(gain.get(c.variant, 1.0), (c.selection_ms + c.attention_ms) / c.dense_ms)
    chosen = {c.variant for c in cells if ratios[c.spec, c.workload, c.size] < 1.0}
    assert {variant for variant, least in gain.items() if least < 0.8} <= chosen, "sparse is chosen where it gains"


def test_costs_of_a_gpu_are_those_of_16_bit_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper = torch.device("cuda", 0)
    assert device_kind(hopper, torch.bfloat16) == device_kind(hopper, torch.float16) == "sm_90_16"
    assert costs_of(hopper, torch.bfloat16) is not None
    assert costs_of(hopper, torch.float32) is None, "nobody measured the general kernel on them"


@pytest.mark.parametrize("amx", [False, True])
def test_this_machine_has_costs(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert device_kind(CPU, torch.bfloat16) == ("cpu_bfloat16_amx" if amx else "cpu_bfloat16")
    assert device_kind(CPU, torch.float32) == "cpu_float32"
    for dtype in (torch.float32, torch.bfloat16):
        assert costs_of(CPU, dtype) is not None
    assert costs_of(CPU, torch.float16) is None
    assert costs_of(torch.device("meta"), torch.float32) is None


# -- choosing -------------------------------------------------------------------------------------------------------

LAYER = LayerSpec(0, 4, 2, 32, 0.2)
# Dense costs 1 ms for a million pair-dimensions, a plan 5 % more for each it reads, and selection 10 % of dense on top.
USUAL = {"": ((1024, 0.4),), "size=9": ((1024, 0.9),)}
COSTS = DeviceCosts((1e3, 0.0, 0.0), {"x": MethodCosts((1050.0, 0.0, 0.0), (100.0, 0.0, 0.0), 1.0, 0.0, USUAL)})


def plan_of(n: int, m: int, density: float) -> TilePlan:
    """About this density, in tiles of 32."""
    mask = torch.rand(1, 4, -(-n // 32), -(-m // 32), generator=torch.Generator().manual_seed(n + m)) < density
    return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=32, block_k=32)


def layer(idx: int) -> LayerSpec:
    return LayerSpec(idx, 4, 2, 32, 0.2)


def cost(plan: TilePlan | None, tried: bool, n: int, m: int) -> float:
    """Of one pass by COSTS, over dense."""
    return 0.1 * tried + (1.0 if plan is None else 1.05 * plan.density())


def run(choice: BreakEven, densities: dict[tuple[int, int], float], n: int, chunks: int, layers: int) -> tuple[float, float]:
    """A prompt whose plans have these densities; (what it cost, what dense would have)."""
    total = dense = 0.0
    for chunk in range(chunks):
        m = n * (chunk + 1)
        choice.begin_chunk()
        for idx in range(layers):
            weight = Size(n, m, 4, 32).causal
            tried = choice.tries(layer(idx), n, m, CPU)
            plan = plan_of(n, m, densities[chunk, idx]) if tried else None
            taken = tried and choice.takes(layer(idx), plan)
            total += weight * cost(plan if taken else None, tried, n, m)
            dense += weight
    return total, dense


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "chunks", "layers"), [(1024, 1, 30), (512, 4, 12), (2048, 1, 8)])
def test_a_prompt_never_takes_three_percent_longer_than_dense_whatever_its_plans_hold(
    n: int, chunks: int, layers: int, seed: int
) -> None:
    gen = random.Random(seed)
    for kind in ("dense", "sparse", "mixed"):
        densities = {
            (chunk, idx): {"dense": gen.uniform(0.85, 1), "sparse": gen.uniform(0, 0.2), "mixed": gen.choice((0.05, 1.0))}[kind]
            for chunk in range(chunks)
            for idx in range(layers)
        }
        choice = BreakEven(COSTS, "x")
        total, dense = run(choice, densities, n, chunks, layers)
        # the first look of each chunk is paid for by what usually is
        first = sum(0.1 * Size(n, n * (chunk + 1), 4, 32).causal for chunk in range(chunks))
        assert total <= (1 + ALLOWANCE) * dense + first
        assert choice.counts.total() == chunks * layers
        if kind == "sparse":
            assert total < 0.6 * dense and choice.counts["pays"] >= 0.7 * chunks * layers


def test_what_is_expected_comes_from_the_layers_before_and_at_first_from_the_measurements() -> None:
    choice = BreakEven(COSTS, "x")
    assert not choice.tries(layer(0), 512, 512, CPU), "shorter than anything measured"
    assert choice.counts == Counter(no_gain=1)
    assert choice.tries(layer(0), 1024, 1024, CPU), "usually 0.4 of the pairs"
    assert not choice.takes(layer(0), plan_of(1024, 1024, 1.0))
    assert choice.counts["too_dense"] == 1
    assert not choice.tries(layer(1), 1024, 1024, CPU), "the layer before it was dense"
    assert dense_share(choice.counts) == 1.0
    choice.begin_chunk()
    assert choice.tries(layer(0), 1024, 2048, CPU), "another chunk is another text"
    assert choice.counts == Counter(no_gain=2, too_dense=1)
    assert BreakEven(COSTS, "x:size=7").tries(layer(0), 1024, 1024, CPU), "not measured with this, taken as it usually is"
    assert not BreakEven(COSTS, "x:size=9").tries(layer(0), 1024, 1024, CPU), "denser with this parameter"


def test_parameters_are_named_alike_where_they_are_measured_and_where_they_are_served() -> None:
    for spec in ("recall:recall=0.95", "recall:recall=0.990", "flashprefill:correction=true", "sale:tau=4e-3"):
        name, params = parse_spec(spec)
        assert fitting.full_spec(spec) == prefill_methods.create(name, params).spec
    assert fitting.full_spec("recall:recall=0.990") == "recall", "the default"
    assert fitting.full_spec("minference:vertical_tokens=1000,slash_tokens=800") == "minference:slash_tokens=800"
    assert fitting.full_spec("of another package:a=1") == "of another package:a=1"
    assert variant_of("flashprefill:alpha=1e-3,correction=true") == "flashprefill:correction=true"
    assert variant_of("recall:recall=0.95") == "recall"
    assert variant_of("dhsa-v1:chunk_tokens=16,budget=64") == variant_of("dhsa-v1:chunk_tokens=128") != variant_of("dhsa-v1")


def test_a_variant_that_was_not_measured_costs_what_the_method_does() -> None:
    own = replace(COSTS.methods["x"], margin=3.0)
    device = DeviceCosts(COSTS.dense, {"x": COSTS.methods["x"], "x:how=other": own})
    assert device.of("x:how=other,size=3") is own
    assert device.of("x:how=third") is device.of("x") is COSTS.methods["x"] and device.of("y") is None


def test_costs_are_looked_up_once_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of a thousand tokens on a GPU waits for the host: what each layer asks anew is paid for in full."""
    looked_up: list[str] = []
    of = DeviceCosts.of
    monkeypatch.setattr(DeviceCosts, "of", lambda costs, spec: looked_up.append(spec) or of(costs, spec))
    choice = BreakEven(costs_of(CPU, torch.float32), "recall:recall=0.95")
    assert not any(choice.tries(layer(idx), 64, 64, CPU) for idx in range(8)) and looked_up == ["recall:recall=0.95"]
    assert costs_of(CPU, torch.float32) is choice.device


def test_a_layer_that_was_too_dense_is_tried_again_once_the_allowance_is_there() -> None:
    choice = BreakEven(COSTS, "x")
    tried = []
    for _ in range(20):
        tried.append(choice.tries(layer(0), 1024, 1024, CPU))
        if tried[-1]:
            assert not choice.takes(layer(0), plan_of(1024, 1024, 1.0))
    assert 2 <= sum(tried) <= 7 and tried[0]
    assert choice._lost_ms <= ALLOWANCE * choice._dense_ms + 0.1 * COSTS.dense_ms(Size(1024, 1024, 4, 32))


def test_a_method_that_leaves_a_layer_dense_by_itself_counts_as_neither() -> None:
    choice = BreakEven(COSTS, "x")
    assert choice.tries(layer(0), 1024, 1024, CPU)
    assert not choice.takes(layer(0), None)
    assert (choice.counts, dense_share(choice.counts)) == (Counter(method=1), 0.0)


class Arriving:
    """A density on its way from an accelerator that does not exist: a plan on the meta device cannot be read, so anything that
    looked at it before it has arrived would raise."""

    densities: ClassVar[list[float]] = []
    waited: ClassVar[list[float]] = []

    def __init__(self, value: torch.Tensor) -> None:
        assert value.device.type == "meta"
        self._density = Arriving.densities.pop(0)

    def wait(self) -> float:
        Arriving.waited.append(self._density)
        return self._density


@pytest.fixture
def arriving(monkeypatch: pytest.MonkeyPatch) -> type[Arriving]:
    monkeypatch.setattr(break_even, "_Read", Arriving)
    monkeypatch.setattr(Arriving, "densities", [])
    monkeypatch.setattr(Arriving, "waited", [])
    return Arriving


def unread(n: int, m: int, heads: int = 4) -> Any:
    return SimpleNamespace(
        n_rows=n, n_keys=m, mask_heads=heads, kept_pairs=torch.empty(1, heads, dtype=torch.int64, device="meta")
    )


CUDA = torch.device("cuda")


def test_on_an_accelerator_a_density_is_known_a_fixed_number_of_layers_later(arriving: type[Arriving]) -> None:
    arriving.densities = [0.7, *([1.0] * (LAG - 1))]
    choice, read = BreakEven(COSTS, "x"), unread(1024, 1024)
    assert choice.tries(layer(0), 1024, 1024, CUDA) and choice.takes(layer(0), read), "what is usual"
    assert arriving.waited == []
    for idx in range(1, LAG):
        assert choice.tries(layer(idx), 1024, 1024, CUDA) and choice.takes(layer(idx), read), "as the first one"
        assert arriving.waited == [0.7], "a chunk's first one is waited for"
    assert choice.tries(layer(LAG), 1024, 1024, CUDA), "no other has had the time"
    assert not choice.tries(layer(LAG + 1), 1024, 1024, CUDA), "the second layer was dense"
    assert arriving.waited == [0.7, 1.0]
    assert choice._lost_ms == pytest.approx(0.15 * COSTS.dense_ms(Size(1024, 1024, 4, 32)) + break_even._AROUND_MS)
    choice.begin_chunk()
    arriving.densities = [0.1, 0.1]
    for idx in range(2):
        assert choice.tries(layer(idx), 1024, 2048, CUDA) and choice.takes(layer(idx), unread(1024, 2048))
    assert arriving.waited == [0.7, 1.0, 0.1], "what was on its way belonged to the chunk before"


def shipped() -> DeviceCosts:
    return DeviceCosts.from_json(json.loads((ROOT / "workers/prefill/costs.json").read_text())["devices"]["sm_90_16"])


@pytest.mark.parametrize(
    "method", sorted(set(shipped().methods) - {"dhsa-v1:chunk_tokens=set"})
)  # which reads a share that is given
def test_on_an_accelerator_no_density_that_all_layers_share_costs_three_percent(method: str, arriving: type[Arriving]) -> None:
    """The layers of an 8B Llama in chunks of 16,384, at densities that nobody would expect. They take what was fitted to an H100;
    the choice puts its margin on top."""
    costs, own, n, n_layers = shipped(), replace(shipped().methods[method], margin=1.0), 16384, 32
    for chunks in (1, 2, 4, 8):
        for density in (0.02, 0.5, 1.0):
            choice, total, whole = BreakEven(costs, method), 0.0, 0.0
            for m in range(n, (chunks + 1) * n, n):
                choice.begin_chunk()
                size = Size(n, m, 32, 128)
                dense = costs.dense_ms(size)
                for idx in range(n_layers):
                    one = LayerSpec(idx, 32, 8, 128, 0.1)
                    took = choice.tries(one, n, m, CUDA)
                    if took:
                        arriving.densities.append(density)
                        assert choice.takes(one, unread(n, m, 32))
                    total += own.selection_ms(size) + own.attention_ms(size, density) + break_even._AROUND_MS if took else dense
                    whole += dense
            assert total <= 1.03 * whole, (chunks, density, choice.counts)


@pytest.mark.parametrize("method", ["sea", "dhsa-v1"])
def test_what_was_measured_to_take_longer_than_dense_to_choose_is_not_tried(method: str) -> None:
    """On captured layers only, with what was learnt for their model."""
    for n in (8192, 16384):
        choice = BreakEven(shipped(), method)
        assert not any(choice.tries(LayerSpec(idx, 32, 8, 128, 0.1), n, m, CUDA) for m in (n, 131072) for idx in range(32))


def test_layers_with_a_window_or_soft_capping_are_dense(arriving: type[Arriving]) -> None:
    """A window is all that dense attention reads there, and no fast path of a plan soft-caps."""
    choice = BreakEven(COSTS, "x")
    assert not choice.tries(replace(LAYER, window=512), 1024, 1024, CPU)
    assert not choice.tries(replace(LAYER, softcap=50.0), 1024, 1024, CUDA)
    assert choice.counts == Counter(no_gain=2)


@pytest.mark.parametrize("device", [None, COSTS], ids=["device", "method"])
def test_what_nobody_measured_is_sparse_where_both_length_and_density_leave_no_doubt(device: DeviceCosts | None) -> None:
    choice = BreakEven(device, "of another package")
    assert not choice.tries(layer(0), 128, 8191, CPU)
    assert choice.tries(layer(0), 128, 8192, CPU) and choice.takes(layer(0), plan_of(128, 8192, 0.1))
    assert choice.tries(layer(1), 128, 8192, CPU) and not choice.takes(layer(1), plan_of(128, 8192, 0.5))
    assert not choice.tries(layer(2), 128, 8192, CPU), "those before it held 0.3 of the pairs"
    choice.begin_chunk()
    assert choice.tries(layer(2), 128, 8320, CPU)
    assert choice.counts == Counter(too_short=1, no_gain=1, unmeasured=1, too_dense=1)


def test_calls_smaller_than_any_that_was_measured_are_dense_whatever_the_allowance() -> None:
    method = replace(COSTS.methods["x"], least_pairs=Size(1024, 1024, 4, 32).attended(1.0)[0])
    choice = BreakEven(DeviceCosts(COSTS.dense, {"x": method}), "x")
    assert [choice.tries(layer(0), 512, 1024, CPU) for _ in range(50)] == 50 * [False]
    assert choice.counts == Counter(too_short=50)
    assert choice.tries(layer(0), 1024, 1024, CPU) and choice.tries(layer(0), 512, 2048, CPU)
