"""The report: one HTML file that needs nothing else, no network and no script, and the same figures as JSON."""

from __future__ import annotations

import base64
import datetime
import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation import figures
from winnow.orchestration.evaluation.journal import Record
from winnow.orchestration.evaluation.maps import AttentionMap
from winnow.orchestration.evaluation.summary import CONTROL, Row, methods_of, summarise
from winnow.orchestration.journals import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, REPORT = "results.json", "report.html"

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd }
p, figcaption, dl { max-width: 60rem } .quiet, figcaption { color: #555; font-size: .9rem }
figure { margin: 1rem 0 } figure img { max-width: 100%; height: auto } .side { display: flex; flex-wrap: wrap; gap: 1rem }
.side figure { margin: 0 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem; overflow-wrap: anywhere }
thead th { border-bottom: 2px solid #999; vertical-align: bottom } tr.control td { background: #f4f4f4 }
tbody th { text-align: left; padding-top: 1rem; border-bottom: 1px solid #999 } td.note { text-align: left; white-space: normal }
dt { font-weight: 600 } dd { margin: 0 0 .3rem 1.2rem } code { background: #f4f4f4; padding: 0 .2rem }
"""

_TERMS = {
    "score": "mean over the tasks that are answered, 0 to 1; every task counts once. Perplexity is not part of it.",
    "same answer": "share of prompts whose answer is dense attention's, word for word.",
    "KL": "Kullback-Leibler divergence of the next-token distribution at the prompt's end from dense attention's, in nats, "
    "mean over prompts.",
    "density": "(query, key) pairs read over causal pairs, all layers and heads. Dense reads 1.",
    "recall": "share of a query row's exact attention mass on the keys that are read: mean, 5th percentile (mean over prompts) "
    "and least of all rows sampled, over layers and heads. What a method estimates of the rest does not count.",
    "R / oracle": "recall over the most that as many key tiles can hold; 1 = no better choice of tiles exists.",
    "eps": "error of the attention output: length of the difference from exact attention over the exact output's length.",
    "prefill": "median seconds from the prompt to the next token's scores; / dense: median ratio to dense on the same prompt.",
    "select, attend": "seconds of choosing keys and of attention itself over dense's attention on the same prompts.",
}


@dataclass(frozen=True)
class _Column:
    title: str
    value: Callable[[Row], float | None]
    form: str


_COLUMNS = (
    _Column("score", lambda row: row.score, ".3f"),
    _Column("score\n/ dense", lambda row: _ratio(row.score, row.dense_score), ".3f"),
    _Column("same\nanswer", lambda row: row.same_answer, ".0%"),
    _Column("KL", lambda row: row.kl, ".2g"),
    _Column("density", lambda row: row.density, ".3f"),
    _Column("recall\nmean", lambda row: row.recall_mean, ".4f"),
    _Column("recall\np5", lambda row: row.recall_p5, ".3f"),
    _Column("recall\nmin", lambda row: row.recall_min, ".3f"),
    _Column("R /\noracle", lambda row: row.oracle_ratio, ".4f"),
    _Column("eps", lambda row: row.eps, ".2g"),
    _Column("prefill\ns", lambda row: row.prefill_s, ".3g"),
    _Column("prefill\n/ dense", lambda row: row.time_ratio, ".2f"),
    _Column("select\n/ dense", lambda row: row.select_ratio, ".2f"),
    _Column("attend\n/ dense", lambda row: row.attend_ratio, ".2f"),
)


def write_report(folder: Path, environment: dict[str, str], records: Sequence[Record]) -> tuple[Path, Path]:
    """Write results.json and report.html into `folder`, each whole or not at all, replacing older ones.

    Args:
        environment: as the journal's.
        records: those that count, `Journal.latest`.

    Raises:
        InvalidRequest: no cell is finished, or the folder cannot be written.
        Unsupported: matplotlib is not installed.
    """
    if not records:
        raise InvalidRequest("report: no cell is finished yet; run the evaluation first")
    rows = summarise(records)
    cells = [{**record, "measured": _without_map(record)} for record in records]
    data = {"format": 1, "environment": environment, "rows": [asdict(row) for row in rows], "cells": cells}
    page = html_report(environment, records, rows)
    try:
        return (
            write_atomic(folder / RESULTS, json.dumps(data, indent=1, ensure_ascii=False) + "\n"),
            write_atomic(folder / REPORT, page),
        )
    except OSError as error:
        raise InvalidRequest(f"--out: cannot write there ({error.strerror}); choose another folder") from None


def _without_map(record: Record) -> Record | None:
    measured = record.get("measured")
    return None if measured is None else {name: value for name, value in measured.items() if name != "map"}


def html_report(environment: dict[str, str], records: Sequence[Record], rows: Sequence[Row]) -> str:
    """The page."""
    methods = [method for method in methods_of(records) if any(row.method == method and not row.unsupported for row in rows)]
    about = " · ".join(
        f"{name} {environment[name]}" for name in ("model", "dtype", "device", "threads", "torch") if name in environment
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>winnow evaluation of {_text(environment.get('model', ''))}</title><style>{_CSS}</style></head><body>",
        "<h1>How prefill methods compare with dense attention</h1>",
        f'<p class="quiet">{_text(about)} · winnow {_text(environment.get("winnow", ""))} · {len(records)} cells · '
        f"{datetime.date.today().isoformat()}</p>",
        "<h2>Every method beside dense</h2>",
        _table(rows),
        _terms(),
        "<h2>Scores by task</h2>",
        _task_table(rows, records),
        "<h2>Score against time</h2>",
        _figure(
            figures.frontier([row for row in rows if not row.unsupported], methods),
            "Up is better, left is faster. The grey line joins what nothing else beats in both; the dotted line is dense's time.",
            "Mean score of each method against its prefill time over dense",
        ),
        *_needles(records, methods),
        *_heads(records, methods),
        *_maps(records, methods),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(f"<th>{_text(column.title).replace(chr(10), '<br>')}</th>" for column in _COLUMNS)
    lines = [f'<div class="wide"><table><thead><tr><th>method</th>{heads}<th>prompts</th></tr></thead><tbody>']
    for length in sorted({row.length for row in rows}):
        lines.append(f'<tr><th colspan="{len(_COLUMNS) + 2}">{length} tokens</th></tr>')
        for row in (row for row in rows if row.length == length):
            name = f"<td>{_text(row.method)}</td>"
            if row.unsupported:
                lines.append(f'<tr>{name}<td class="note" colspan="{len(_COLUMNS) + 1}">{_text(row.unsupported)}</td></tr>')
                continue
            cells = "".join(f"<td>{_number(column.value(row), column.form)}</td>" for column in _COLUMNS)
            mark = ' class="control"' if row.method == CONTROL else ""
            lines.append(f"<tr{mark}>{name}{cells}<td>{row.prompts}</td></tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _task_table(rows: Sequence[Row], records: Sequence[Record]) -> str:
    generates = {record["task"]: record["generates"] for record in records if "unsupported" not in record}
    heads = "".join(f"<th>{_text(task)}{'' if answered else '<br>(perplexity)'}</th>" for task, answered in generates.items())
    lines = [f'<div class="wide"><table><thead><tr><th>method</th>{heads}</tr></thead><tbody>']
    for length in sorted({row.length for row in rows}):
        lines.append(f'<tr><th colspan="{len(generates) + 1}">{length} tokens</th></tr>')
        for row in (row for row in rows if row.length == length and not row.unsupported):
            values = [(row.by_task.get(task), answered) for task, answered in generates.items()]
            cells = "".join(
                f"<td>{_number(value, '.3f') if answered or value is None else _number(1 / value, '.3g')}</td>"
                for value, answered in values
            )
            mark = ' class="control"' if row.method == CONTROL else ""
            lines.append(f"<tr{mark}><td>{_text(row.method)}</td>{cells}</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _terms() -> str:
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(meaning)}</dd>" for name, meaning in _TERMS.items())
    return f'<details><summary>What the columns mean</summary><dl class="quiet">{listed}</dl></details>'


def _needles(records: Sequence[Record], methods: Sequence[str]) -> Iterator[str]:
    placed = dict.fromkeys(r["task"] for r in records if r["depth"] is not None and "unsupported" not in r)
    if placed:
        yield "<h2>Where in the prompt evidence is found</h2>"
    for task in placed:
        caption = (
            f"Mean score of {task} by prompt length and by where in the prompt the evidence begins. Hatched: no prompt there."
        )
        yield _figure(figures.needle_map(records, methods, task), caption, f"Heat map of {task}: depth against length")


def _heads(records: Sequence[Record], methods: Sequence[str]) -> Iterator[str]:
    drawn = []
    for method in (method for method in methods if method != CONTROL):
        mine = [record for record in records if record["method"] == method and record.get("measured")]
        if mine:
            longest = max(record["length"] for record in mine)
            found = [record["measured"]["by_head"] for record in mine if record["length"] == longest]
            density, recall = (np.mean([by_head[name] for by_head in found], axis=0) for name in ("density", "recall_mean"))
            caption = f"{method} at {longest} tokens, mean over {len(found)} prompts."
            drawn.append(
                _figure(figures.head_maps(density, recall, method), caption, f"Density and recall per layer and head of {method}")
            )
    if drawn:
        yield "<h2>What each layer and head reads, and what it keeps of the attention mass</h2>"
        yield from drawn


def _maps(records: Sequence[Record], methods: Sequence[str]) -> Iterator[str]:
    drawn = []
    for method in methods:
        mine = [
            record for record in records if record["method"] == method and record.get("measured") and record["measured"]["map"]
        ]
        if mine:
            record = max(mine, key=lambda record: int(record["length"]))
            picture = AttentionMap.from_json(record["measured"]["map"])
            by_head = record["measured"]["by_head"]
            density, recall = (by_head[name][picture.layer][picture.head] for name in ("density", "recall_mean"))
            caption = f"density {density:.3f}, recall {recall:.3f}"
            drawn.append(
                _figure(figures.attention_picture(picture, method), caption, f"Attention map of {method} with what it reads")
            )
    if drawn:
        yield "<h2>One head's attention, and what is read of it</h2>"
        yield (
            f"<p>Layer {picture.layer}, query head {picture.head}, {_text(record['task'])}, {picture.n_tokens} tokens. "
            "Blue is exact attention mass. What a method reads is tinted and framed in orange.</p>"
        )
        yield f'<div class="side">{"".join(drawn)}</div>'


def _figure(figure: Figure, caption: str, alternative: str) -> str:
    data = base64.b64encode(figures.svg(figure)).decode()
    image = f'<img alt="{_text(alternative)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _ratio(value: float | None, control: float | None) -> float | None:
    return value / control if value is not None and control else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
