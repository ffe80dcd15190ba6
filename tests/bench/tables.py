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
VIEWS = {
    "executor_h100": View(r"(\w+)/(.+)", r"\2", r"\1", f"keys / density / tile or window; {_RATE}"),
    "executor_cpu": View(r"\w+/(.+)", r"\1", "time over dense", "keys / density / tile / lists"),
    "prefill_h100": View(
        r"prefill/131072/model-like/([^/]+)/(selection_ms|attention_ms|density|recall)",
        r"\1",
        r"\2",
        "131,072 keys of the workload `model-like`; times over cuDNN dense attention. `dhsa-v1`, `duoattention` and "
        "`seerattention` run with random parameters here: their times mean something, their recall does not",
        ("density", "recall"),
    ),
    "ttft_cpu": View(
        r"ttft/(\d+)/(.+)",
        r"\2",
        r"\1",
        "a real text in the default model, end to end, by tokens; time over dense: as served, in one piece, and with the method "
        "in every layer, whether that pays or not",
    ),
    "quality": View(
        r"quality/(2048|4096)/([^/]+)/(score|recall|density)",
        r"\2",
        r"\3 \1",
        "score over dense, recall, density, by length, as served (chunks of 2,048 tokens, the last 128 dense). `recall` at .95, "
        ".98 and .99: 27 prompts at 2,048 and 15 at 4,096; the others one to three, too few to tell them apart by score",
        ("recall", "density"),
    ),
    "quality_4096": View(
        r"quality/4096/([^/]+)/(score|perplexity|density)",
        r"\1",
        r"\2",
        "more prompts of 4,096 tokens, in bf16: score and perplexity over dense, density; 29 prompts and 5 texts",
        ("density",),
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
        return _grid(title, VIEWS[name], data)
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


def _grid(title: str, view: View, data: Any) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in data.rows:
        if found := re.fullmatch(view.pattern, row.name):
            column = found.expand(view.column)
            value = row.value if column.startswith(view.values or ("\0",)) else row.ratio
            cells.setdefault(found.expand(view.line), {})[column] = number(value)
    title = f"{title}\n\n{view.what[0].upper()}{view.what[1:]}."
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [title, "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, line in cells.items():
        lines.append(f"| {name} | " + " | ".join(line.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits without an exponent where that can be read."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):.10g}"
