"""The README's tables of the committed result files. The schema itself is `results.ResultFile`; docs/results.md explains it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple


class View(NamedTuple):
    """How a file whose names are paths becomes a table with one line for many rows.

    Attributes:
        pattern: matches the whole name of a row that is shown, the others stay in the file.
        line, column: where a row stands, from the pattern's groups.
        what: what the cells are, for the reader.
        values: columns that begin with one of these show values, the others ratios.
    """

    pattern: str
    line: str
    column: str
    what: str
    values: tuple[str, ...] = ()


_RATE = "TFLOP/s on kept pairs over those of the dense control"
NOT_SHOWN = {"break_even_cpu_bfloat16", "break_even_cpu_float32"}  # what workers/prefill/costs.json is fitted to
VIEWS: dict[str, tuple[View, ...]] = {
    "executor_h100": (View(r"(\w+)/(.+)", r"\2", r"\1", f"keys / density / tile or window; {_RATE}"),),
    "executor_cpu": (View(r"\w+/(.+)", r"\1", "time over dense", "keys / density / tile / lists"),),
    "stored_h100": (
        View(
            r"stored/(.+)/([^/]+)",
            r"\1",
            r"\2",
            "keys / density; TFLOP/s on kept pairs over those of contiguous bfloat16 in the kernel for Hopper, of `pack` over "
            "one sequence after another",
        ),
    ),
    "prefill_h100": (
        View(
            r"prefill/131072/model-like/([^/]+)/(selection_ms|attention_ms|density|recall|error)",
            r"\1",
            r"\2",
            "131,072 keys of the workload `model-like`; times over cuDNN dense attention, error of the output over the norm of "
            "dense's. `dhsa-v1` cuts chunks of one length here, `duoattention` and `seerattention` have seeded parameters: their "
            "times mean something, their recall does not",
            ("density", "recall", "error"),
        ),
        View(
            r"prefill/32768/(S[2347])/([^/]+)/(recall|density)",
            r"\2",
            r"\3 \1",
            "32,768 keys of each workload: verticals (S2), slashes (S3), segments (S4), a mixture by head (S7); S5 and S6 hold "
            "noise that nothing sparse can keep",
            ("density", "recall"),
        ),
        View(
            r"prefill/captured-8064/layer(\d+)/([^/]+)/(recall|density)",
            r"\2",
            r"\3 layer \1",
            "two layers of the default model on 8,064 tokens of real text; the last four lines with what was learnt for it",
            ("density", "recall"),
        ),
    ),
    "prefill_capture_cpu": (
        View(
            r"prefill/captured-8064/layer(\d+)/([^/]+)/(density|recall|error)",
            r"\2",
            r"\3 layer \1",
            "layers of the default model on 8,064 tokens of real text, on a CPU: what `correction` and `pooling` change; error "
            "of the output over the norm of dense's",
            ("density", "recall", "error"),
        ),
    ),
    "ttft_cpu": (
        View(
            r"ttft/(\d+)/(.+)",
            r"\2",
            r"\1",
            "a real text in the default model, end to end, by tokens; time over dense: as served, in one piece, and with the "
            "method in every layer, whether that pays or not",
        ),
    ),
    "quality_cpu": (
        View(
            r"quality/2048/([^/]+)/(score|perplexity|density)",
            r"\1",
            r"\2",
            "2,048 tokens on a CPU: score and perplexity over dense, density; 50 prompts "
            "(standard error .03 and .05) and 10 texts",
            ("density",),
        ),
    ),
    "ttft_served_h100": (
        View(
            r"ttft_served/(\d+)/(.+)",
            r"\2",
            r"\1",
            "an 8B-shaped model, end to end, by tokens; time over dense in one piece. Up to 8,192 all of it runs dense",
        ),
    ),
    "quality": (
        View(
            r"quality/(2048|4096|8064)/([^/]+)/(score|recall|density)",
            r"\2",
            r"\3 \1",
            "score over dense, recall, density, by length, in chunks of 4,096 tokens, the last 128 of a prompt dense. 550 "
            "prompts a length for `recall` and its .95 (standard error .01); 135 at 2,048 and 4,096 tokens (.01 to .03) and 62 "
            "at 8,064 (.03 to .05) for its .98, `dhsa`, `sale`, `seerattention`, and the densest variant of the methods that "
            "have several; 17 and 7 for the rest (`sea` 2), too few to tell their scores apart",
            ("recall", "density"),
        ),
        View(
            r"quality/all/([^/]+)/(score|perplexity|density)",
            r"\1",
            r"\2",
            "over all three lengths: score (standard error .006 for `recall` and its .95, of 1,650 prompts; .01 to .02 where "
            "330) and perplexity of real text over dense's, density",
            ("density",),
        ),
    ),
}  # fmt: skip


def _results_module() -> Any:
    """results.py beside this file; tests/ is no package, so it is loaded by path."""
    name = "winnow_bench_results"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("results.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


results = _results_module()


def load(folder: Path | None = None) -> dict[str, Any]:
    """Every `ResultFile` by file name without ".json", sorted. One that breaks the schema raises ValidationError."""
    paths = sorted((folder or results.FOLDER).glob("*.json"))
    return {path.stem: results.ResultFile.model_validate_json(path.read_text()) for path in paths}


def markdown(files: dict[str, Any]) -> str:
    """One table per file: value, control, their ratio, repetitions and spread."""
    if not files:
        return "No results are committed yet."
    return "\n\n".join(_one(name, data) for name, data in files.items() if name not in NOT_SHOWN)


def _one(name: str, data: Any) -> str:
    title = f"**{name}** · {data.machine} · {data.date[:10]} · commit `{data.commit}` · `{data.command}`"
    if name in VIEWS:
        return "\n\n".join((title, *(_grid(view, data) for view in VIEWS[name])))
    lines = [
        title,
        "",
        "| Measure | Value | Control | Ratio | n | Spread | Note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data.rows:
        value, control = f"{number(row.value)} {row.unit}".strip(), f"{number(row.control_value)} {row.unit}".strip()
        cells = (row.name, value, f"{row.control}: {control}", number(row.ratio), str(row.n), f"{row.spread:.0%}", row.note)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _grid(view: View, data: Any) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in data.rows:
        if found := re.fullmatch(view.pattern, row.name):
            column = found.expand(view.column)
            value = row.value if column.startswith(view.values or ("\0",)) else row.ratio
            cells.setdefault(found.expand(view.line), {})[column] = number(value)
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [
        f"{view.what[0].upper()}{view.what[1:]}.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, line in cells.items():
        lines.append(f"| {name} | " + " | ".join(line.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits without an exponent where that can be read."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):.10g}"
