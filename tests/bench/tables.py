"""The README's tables of the committed result files. The schema itself is `results.ResultFile`; docs/results.md explains it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


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
    return "\n\n".join(_one(name, data) for name, data in files.items())


def _one(name: str, data: Any) -> str:
    lines = [
        f"**{name}** · {data.machine} · {data.date[:10]} · commit `{data.commit}` · `{data.command}`",
        "",
        "| Measure | Value | Control | Ratio | n | Spread | Note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data.rows:
        value, control = f"{number(row.value)} {row.unit}".strip(), f"{number(row.control_value)} {row.unit}".strip()
        cells = (row.name, value, f"{row.control}: {control}", number(row.ratio), str(row.n), f"{row.spread:.0%}", row.note)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits without an exponent where that can be read."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):.10g}"
