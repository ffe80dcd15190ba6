"""Tables of the committed result files, for README.md and docs/results.md, which explains the schema (`results.ResultFile`)."""

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
        errors: columns that begin with one of these show ratio, standard error and n of each row, where its note has the error.
        fewest: rows of those columns with fewer repetitions are too noisy to be shown.
    """

    pattern: str
    line: str
    column: str
    what: str
    values: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    fewest: int = 0


_RATE = "TFLOP/s on kept pairs over those of the dense control"
# what workers/prefill/costs.json is fitted to
NOT_SHOWN = {"break_even_cpu_bfloat16", "break_even_cpu_bfloat16_amx", "break_even_cpu_float32"}
FRONT = (
    "executor_h100",
    "prefill_h100",
    "quality",
    "ttft_served_h100",
    "ttft_cpu",
    "ttft_cpu_amx",
    "spine_cpu",
)  # in the README, by the first view
_TTFT_CPU = View(
    r"ttft/(\d+)/(.+)",
    r"\2",
    r"\1",
    "a real text in the default model, end to end, by tokens; time over dense: as served, in one piece, and with the method in "
    "every layer, whether that pays or not",
)
VIEWS: dict[str, tuple[View, ...]] = {
    "executor_h100": (
        View(
            r"(executor(?:_flex)?)/(\d+/0\.\d+)/128x128",
            r"\2",
            r"\1",
            f"the executor and FlexAttention, keys / density; {_RATE}",
        ),
        View(r"(\w+)/(.+)", r"\2", r"\1", f"keys / density / tile or window; {_RATE}"),
    ),
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
            "times mean something, their recall does not. Recall and error are of 48 rows, one from each of as many equal parts",
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
    "ttft_cpu": (_TTFT_CPU,),
    "ttft_cpu_amx": (_TTFT_CPU,),
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
            r"quality/all/([^/]+)/(score|perplexity|recall|density)",
            r"\1",
            r"\2",
            "the default model, over 2,048, 4,096 and 8,064 tokens: task score over dense's with its standard error and the "
            "number of prompts, where there are 100; perplexity over dense's of 10 to 294 real texts before a prompt's dense "
            "end; recall of 9 prompts; density. `sea` at two lengths only, with 2 texts and 6 prompts",
            ("recall", "density"),
            ("score",),
            100,
        ),
        View(
            r"quality/(2048|4096|8064)/([^/]+)/(score|recall|density)",
            r"\2",
            r"\3 \1",
            "the same by length, scores of 50 prompts at least, in chunks of 4,096 tokens, the last 128 of a prompt dense",
            ("recall", "density"),
            ("score",),
            50,
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


def markdown(files: dict[str, Any], front: bool = False) -> str:
    """Tables of each file: its views, else all rows with control, ratio, n and spread. `front`: only what the README shows."""
    if not files:
        return "No results are committed yet."
    names = [name for name in FRONT if name in files] if front else [name for name in files if name not in NOT_SHOWN]
    return "\n\n".join(_one(name, files[name], front) for name in names)


def _one(name: str, data: Any, front: bool) -> str:
    title = f"**{name}** · {data.machine} · {data.date[:10]} · commit `{data.commit}` · `{data.command}`"
    if name in VIEWS:
        return "\n\n".join((title, *(_grid(view, data) for view in VIEWS[name][: 1 if front else None])))
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
            cell = number(row.value if column.startswith(view.values or ("\0",)) else row.ratio)
            if column.startswith(view.errors or ("\0",)):
                if row.n < view.fewest:
                    continue
                error = re.search(r" ± ([\d.]+) ", row.note)
                cell = f"{row.ratio:.3f} ± {float(error[1]) / row.control_value:.3f} ({row.n})" if error else f"{cell} ({row.n})"
            cells.setdefault(found.expand(view.line), {})[column] = cell
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
