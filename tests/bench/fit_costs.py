"""Fit the break-even predictor's coefficients to the committed measurements: results/*.json -> workers/prefill/costs.json.

    python tests/bench/fit_costs.py [--results DIR] [--out FILE]

Reads `prefill/<N>[of<M>]/<workload>/<method>/{selection_ms, attention_ms, density}`, whose control is dense attention of the
same shape in the same run, and `executor/<N>/<density>/<tile>` (TFLOP/s on kept pairs, control cudnn). A kind of device needs
a file of the first kind; where it is missing, what costs.json holds of the device is kept. What was measured on captured layers
only, because it needs what was learnt for their model, is fitted to those.

Coefficients are not negative and minimise the relative error (`workers/prefill/costs.py` has the formulas). Selection and
attention are fitted per method and the parameters of it that choose what is run, whatever the others; where its cells are few,
attention is also fitted to them and the executor's, whichever predicts better. A method's margin is then the smallest of 1.00,
1.01, ... 3.00 that makes up for what its cells took longer than predicted, in the median, and with which none of them, predicted
from its own density, costs more than dense by 2 %: one less than is promised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()

from winnow.registry import parse_spec
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.costs import FILE, Coefficients, DeviceCosts, MethodCosts, Size, variant_of

RESULTS = Path(__file__).parent / "results"
ALLOWED = 1.02
PAIR_FLOOR = 0.8  # of what a pair costs in dense attention, at least: the executor measures 0.9 to 1.3
NEVER = 1e6  # a margin with which sparse is not chosen
FEW = 6  # cells: three coefficients fit three of them whatever they are
# the workloads whose densities are expected before anything is known of a prompt, where real text was not measured the second
STRUCTURED = ("text", "model-like")
CAPTURED = (9, 64)  # query heads and head size of the default model, whose layers are captured
# kind of device -> (files, query heads, head size)
DEVICES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "cpu_float32": (("break_even_cpu_float32.json",), 9, 64),
    "cpu_bfloat16": (("break_even_cpu_bfloat16.json",), 9, 64),
    "cpu_bfloat16_amx": (("break_even_cpu_bfloat16_amx.json",), 9, 64),
    "sm_90_16": (("prefill_h100.json", "executor_h100.json"), 32, 128),
}


@dataclass(frozen=True)
class Cell:
    """One measured (shape, method, plan). For a plan made up to measure the executor, selection_ms is None and variant ""."""

    variant: str
    spec: str
    workload: str
    size: Size
    density: float
    dense_ms: float
    attention_ms: float
    selection_ms: float | None


def read_cells(results: Path, names: Sequence[str], heads: int, head_size: int) -> list[Cell]:
    """The cells of these files; files that are not there have none."""
    rows = [row for name in names if (results / name).is_file() for row in json.loads((results / name).read_text())["rows"]]
    cells = list(_prefill_cells(rows, r"\d+(?:of\d+)?", heads, head_size))
    known = {cell.variant for cell in cells}
    captured = [cell for cell in _prefill_cells(rows, r"captured-\d+", *CAPTURED) if cell.variant not in known]
    return [*cells, *captured, *_executor_cells(rows, heads, head_size)]


def _prefill_cells(rows: list[dict[str, Any]], shape: str, heads: int, head_size: int) -> Iterator[Cell]:
    """shape: a pattern of the second part of the rows' names."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        match = re.fullmatch(rf"prefill/({shape})/([^/]+)/([^/]+)/(selection_ms|attention_ms|density)", row["name"])
        if match:
            found.setdefault((match[1], match[2], match[3]), {})[match[4]] = row
    for (at, workload, spec), cell in found.items():
        if len(cell) < 3:
            continue
        n, _, m = at.removeprefix("captured-").partition("of")
        size = Size(int(n), int(m or n), heads, head_size)
        yield Cell(
            variant_of(full_spec(spec)), spec, workload, size, cell["density"]["value"], cell["attention_ms"]["control_value"],
            cell["attention_ms"]["value"], cell["selection_ms"]["value"],
        )  # fmt: skip


def _executor_cells(rows: list[dict[str, Any]], heads: int, head_size: int) -> Iterator[Cell]:
    for row in rows:
        match = re.fullmatch(r"executor/(\d+)/(0?\.\d+)/(\d+x\d+)", row["name"])
        if match and row["unit"] == "TFLOP/s":
            size = Size(int(match[1]), int(match[1]), heads, head_size)
            exact = re.match(r"kept (0?\.\d+) of", row["note"])
            kept = float(exact[1] if exact else match[2])
            work = 4e-9 * size.causal * head_size  # over TFLOP/s: milliseconds
            yield Cell("", match[3], "tiles", size, kept, work / row["control_value"], work * kept / row["value"], None)


def fit(features: Sequence[Coefficients], values: Sequence[float], floor: Coefficients = (0.0, 0.0, 0.0)) -> Coefficients:
    """Coefficients >= floor of least squared relative error: the best of all choices of features of which none falls below."""
    x, y = np.asarray(features, float), np.asarray(values, float)
    weighted = x / y[:, None]
    left = 1 - weighted @ np.asarray(floor)
    best, error = np.zeros(3), float((left**2).sum())
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            solved = np.linalg.lstsq(weighted[:, chosen], left, rcond=None)[0]
            if (solved < 0).any():
                continue
            full = np.zeros(3)
            full[list(chosen)] = solved
            now = float(((weighted @ full - left) ** 2).sum())
            if now < error - 1e-9:
                best, error = full, now
    first, second, third = (float(value) for value in best + np.asarray(floor))
    return first, second, third


def fit_device(cells: Sequence[Cell]) -> DeviceCosts:
    """Everything about one kind of device: dense attention from all cells, each method from its own.

    Raises:
        ValueError: no cell with a selection.
    """
    chosen = [cell for cell in cells if cell.selection_ms is not None]
    bare = [cell for cell in cells if cell.selection_ms is None]
    if not chosen:
        raise ValueError("no prefill cells: run the benchmark first")
    dense = fit([c.size.attended(1.0) for c in cells], [c.dense_ms for c in cells])
    methods: dict[str, MethodCosts] = {}
    for name in sorted({c.variant for c in chosen}):
        own = [c for c in chosen if c.variant == name]
        selection = fit([c.size.selected() for c in own], [c.selection_ms or 0.0 for c in own])
        least = min(c.size.attended(1.0)[0] for c in own)
        found = []
        for runs in [own + bare, own] if len(own) < FEW else [own]:
            # few densities at few lengths leave open what depends on which: a pair read costs about what it costs dense
            least_pair = (PAIR_FLOOR * dense[0], 0.0, 0.0)
            attention = fit([c.size.attended(c.density) for c in runs], [c.attention_ms for c in runs], least_pair)
            found.append(with_margin(MethodCosts(attention, selection, 1.0, least, usual_densities(own)), dense, own))
        methods[name] = min(found, key=lambda m: m.margin)  # a method that does more than run a plan is not like the executor
    return DeviceCosts(dense, methods)


def usual_densities(cells: Sequence[Cell]) -> dict[str, tuple[tuple[int, float], ...]]:
    """By parameters and length, medians on the structured workload (else on all of them). Where the method was not measured as it
    comes, the densest stands for it: expecting too little would try what does not pay."""
    whole = [c for c in cells if c.size.rows == c.size.keys]
    own = next((found for kind in STRUCTURED if (found := [c for c in whole if c.workload.startswith(kind)])), whole)
    by_params: dict[str, list[Cell]] = {}
    for c in own:
        by_params.setdefault(full_spec(c.spec).partition(":")[2], []).append(c)
    found = {}
    if "" not in by_params:
        found[""] = _by_length(own, max)
    found |= {params: _by_length(mine, statistics.median) for params, mine in sorted(by_params.items())}
    return found


def _by_length(cells: Sequence[Cell], typical: Callable[[Iterator[float]], float]) -> tuple[tuple[int, float], ...]:
    lengths = sorted({c.size.keys for c in cells})
    return tuple((n, typical(c.density for c in cells if c.size.keys == n)) for n in lengths)


def full_spec(spec: str) -> str:
    """With the parameters that are not at their defaults, as `PrefillMethod.spec` has them."""
    name, params = parse_spec(spec)
    return prefill_methods.create(name, params).spec if name in prefill_methods.names() else spec


def with_margin(costs: MethodCosts, dense: Coefficients, cells: Sequence[Cell]) -> MethodCosts:
    """The same costs with the smallest margin that keeps the promise on these cells."""
    behind = statistics.median(
        ((c.selection_ms or 0.0) + c.attention_ms) / (costs.selection_ms(c.size) + costs.attention_ms(c.size, c.density))
        for c in cells
    )
    for percent in range(100 + min(50, max(0, round(100 * behind) - 100)), 301):
        found = replace(costs, margin=percent / 100)
        if all(cost_of_choice(found, dense, c) <= ALLOWED for c in cells):
            return found
    return replace(costs, margin=NEVER)


def cost_of_choice(method: MethodCosts, dense: Coefficients, cell: Cell) -> float:
    """What the choice between this cell's plan and dense costs, measured, over dense."""
    sparse = method.selection_ms(cell.size) + method.attention_ms(cell.size, cell.density) <= DeviceCosts(dense, {}).dense_ms(
        cell.size
    )
    return ((cell.selection_ms or 0.0) + cell.attention_ms) / cell.dense_ms if sparse else 1.0


def to_json(costs: DeviceCosts) -> dict[str, Any]:
    """Six significant digits are more than the measurements have."""

    def short(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    methods = {
        name: {"attention": short(m.attention), "selection": short(m.selection), "margin": m.margin,
               "least_pairs": float(f"{m.least_pairs:.6g}"),
               "densities": {params: [[keys, round(density, 4)] for keys, density in found]
                             for params, found in m.densities.items()}}
        for name, m in costs.methods.items()
    }  # fmt: skip
    return {"dense": short(costs.dense), "methods": methods}


def describe(costs: DeviceCosts, cells: Sequence[Cell]) -> Iterator[str]:
    """One line a method: how well it is predicted, and what its choices cost and gain on the measured cells."""
    for name, m in costs.methods.items():
        own = [c for c in cells if c.selection_ms is not None and name == c.variant]
        off = [((m.selection_ms(c.size) + m.attention_ms(c.size, c.density)) / m.margin)
               / ((c.selection_ms or 0.0) + c.attention_ms) - 1 for c in own]  # fmt: skip
        ratios = [cost_of_choice(m, costs.dense, c) for c in own]
        best = [min(1.0, ((c.selection_ms or 0.0) + c.attention_ms) / c.dense_ms) for c in own]
        yield (
            f"{name:44} {len(own):4} cells  predicted within {min(off):+.0%} .. {max(off):+.0%}  margin {m.margin:.2f}  "
            f"over dense: worst choice {max(ratios):.3f}, mean {statistics.mean(ratios):.3f}, best {statistics.mean(best):.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    before = json.loads(options.out.read_text())["devices"] if options.out.is_file() else {}
    devices = {kind: before[kind] for kind in DEVICES if kind in before}
    for kind, (names, heads, head_size) in DEVICES.items():
        cells = read_cells(options.results, names, heads, head_size)
        if not any(c.selection_ms is not None for c in cells):
            print(f"{kind}: nothing measured in {', '.join(names)}; {'kept as it was' if kind in devices else 'left out'}")
            continue
        costs = fit_device(cells)
        files = {name: json.loads((options.results / name).read_text()) for name in names if (options.results / name).is_file()}
        source = [f"{name} at {found['commit']}, {found['machine']}" for name, found in files.items()]
        devices[kind] = {"source": source, **to_json(costs)}
        print(f"{kind}: {'; '.join(source)}")
        for line in describe(costs, cells):
            print(f"  {line}")
    options.out.write_text(json.dumps({"made_by": "python tests/bench/fit_costs.py", "devices": devices}, indent=1) + "\n")


if __name__ == "__main__":
    main()
