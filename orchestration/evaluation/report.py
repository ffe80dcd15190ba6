"""The report: one HTML file that needs nothing else, no network and no script, and the same figures as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation import figures
from winnow.orchestration.evaluation.journal import Record
from winnow.orchestration.evaluation.maps import AttentionMap
from winnow.orchestration.evaluation.summary import CONTROL, Row, methods_of, summarise
from winnow.orchestration.evaluation.tables import answer, glossary, main_table, setup, task_table, text
from winnow.orchestration.journals import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, REPORT = "results.json", "report.html"

_CSS = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --quiet: #555; --line: #ddd; --rule: #999; --shade: #f1f1f1 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17191c; --quiet: #aaa; --line: #363a40; --rule: #777; --shade: #24282e }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto; max-width: 76rem;
  padding: 0 1rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 } figcaption { margin-top: .3rem }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line) } h1 + p + h2 { margin-top: 1.2rem }
p, figcaption, details dl { max-width: 60rem } .quiet, figcaption { color: var(--quiet); font-size: .9rem; font-weight: 400 }
.wide { overflow-x: auto } figure { margin: 1rem 0 } figure img { display: block; background: #fff; border-radius: 4px }
.side { display: flex; flex-wrap: wrap; gap: 1rem } .side figure { margin: 0; max-width: 100% } .side img { max-width: 100% }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); font-weight: 400 }
thead th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--rule) }
tr > :first-child { position: sticky; left: 0; background: var(--paper); text-align: left; white-space: normal;
  min-width: 10rem }
th[scope=row] > :first-child { overflow-wrap: anywhere } tr.control > * { background: var(--shade) }
.groups > * { border: 0; padding-bottom: 0 } .groups th { color: var(--quiet); text-align: left;
  border-left: 3px solid var(--line) }
.length { position: static !important; font-weight: 600; padding-top: .9rem; border-bottom-color: var(--rule) }
td.note, .words td, .words th { text-align: left; white-space: normal } .words td { min-width: 9rem; vertical-align: top }
dt { font-weight: 600; overflow-wrap: anywhere } dd { margin: 0 0 .3rem 1.2rem } summary { cursor: pointer; padding: .15rem 0 }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; font-size: .9rem; margin: 0 }
.facts dd { margin: 0; overflow-wrap: anywhere } code { background: var(--shade); padding: 0 .2rem }
@media (max-width: 40rem) { tr > :first-child { min-width: 6.5rem } th[scope=row] .quiet { display: block } }
@media print {
  @page { size: A4 landscape; margin: 12mm } :root { color-scheme: light } body { margin: 0; max-width: none; font-size: 9.5pt }
  .wide { overflow: visible } figure img { max-width: 100%; height: auto } figure, tr { break-inside: avoid }
  tbody { break-inside: avoid } h2, h2 + p, thead { break-after: avoid } details::details-content { content-visibility: visible }
}
"""


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
    data = {"format": 2, "environment": environment, "rows": [asdict(row) for row in rows], "cells": cells}
    page = html_report(environment, records, rows)
    try:
        return (
            write_atomic(folder / RESULTS, json.dumps(data, indent=1, ensure_ascii=False) + "\n"),
            write_atomic(folder / REPORT, page),
        )
    except OSError as error:
        raise InvalidRequest(
            f"--out: the report cannot be written there ({error.strerror}); finished cells are kept: make room or give access, "
            "then the same command with --resume writes it"
        ) from None


def _without_map(record: Record) -> Record | None:
    measured = record.get("measured")
    return None if measured is None else {name: value for name, value in measured.items() if name != "map"}


def html_report(environment: dict[str, str], records: Sequence[Record], rows: Sequence[Row]) -> str:
    """The page: what was measured and the answer first, then every figure, then the pictures."""
    methods = [method for method in methods_of(records) if any(row.method == method and not row.unsupported for row in rows)]
    model = text(environment.get("model", ""))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{model}: prefill methods beside dense attention (winnow)</title><style>{_CSS}</style></head><body>",
        f"<h1>Prefill methods beside dense attention, {model}</h1>",
        "<p>Each method skips keys while a prompt is processed; dense attention, the control, reads them all. Here is what a "
        f"method keeps of dense's quality, and of its time, in {text(environment.get('dtype', '?'))} on "
        f"{text(environment.get('device', '?'))}.</p>",
        answer(rows),
        setup(environment, records),
        "<h2>Every method beside dense</h2>",
        f'<p class="quiet">{_order(rows)}</p>',
        main_table(rows),
        glossary(records),
        "<h2>Scores by task</h2>",
        '<p class="quiet">Scores are 0 to 1, higher is better. Perplexity is 1 or more, lower is better.</p>',
        task_table(rows, records),
        "<h2>Score against time</h2>",
        _figure(
            figures.frontier([row for row in rows if not row.unsupported], methods),
            "Up is better, left is faster: a point left of the dotted line is faster than dense. Bars run from the least to the "
            "greatest time of a prompt. The grey line joins what nothing else beats in both.",
            "Quality of each method, as a share of dense's, against its prefill time over dense",
        ),
        *_needles(records, methods),
        *_heads(records, methods),
        *_maps(records, methods, int(environment.get("tail_tokens", 0))),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _order(rows: Sequence[Row]) -> str:
    first = "The best score over dense's" if any(row.score is not None for row in rows) else "The lowest perplexity over dense's"
    return f"{first} on the same prompts first; of equal ones the faster first."


def _needles(records: Sequence[Record], methods: Sequence[str]) -> Iterator[str]:
    placed = dict.fromkeys(r["task"] for r in records if r["depth"] is not None and "unsupported" not in r)
    if placed:
        yield "<h2>Where in the prompt evidence is found</h2>"
    for task in placed:
        caption = (
            f"Mean score of {task} by prompt length (left to right) and by where in the prompt the evidence begins (0% = at its "
            "start, top). Bright is found, dark is missed; a hatched cell had no prompt."
        )
        if all(r["asked_depth"] is not None for r in records if r["task"] == task and r["depth"] is not None):
            caption += (
                " Depths are those asked for; evidence goes where a sentence or an entry begins, and where that is on average "
                "more than 3% of the prompt off, both are named."
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
            caption = f"{method}, {longest:,} tokens, mean of the prompts measured ({len(found)})."
            drawn.append(
                _figure(figures.head_maps(density, recall, method), caption, f"Density and recall per layer and head of {method}")
            )
    if drawn:
        yield "<h2>What each layer and head reads, and what it keeps of the attention mass</h2>"
        yield (
            "<p>A column is a layer, a row is a query head. Density, left: dark reads little, which is cheap. Recall, right: "
            "bright keeps the attention mass, dark loses it. Good is dark on the left and bright on the right.</p>"
        )
        yield from drawn


def _maps(records: Sequence[Record], methods: Sequence[str], tail: int) -> Iterator[str]:
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
            caption = f"{record['length']:,} tokens; this head's density {density:.3f}, recall {recall:.3f}"
            caption += ". Everything is read: no tint." if method == CONTROL else ""
            drawn.append(
                _figure(figures.attention_picture(picture, method), caption, f"Attention map of {method} with what it reads")
            )
    if drawn:
        end = f" The last {tail:,} rows are dense under every method." if tail else ""
        yield "<h2>One head's attention, and what is read of it</h2>"
        yield (
            f"<p>Layer {picture.layer}, query head {picture.head}, {text(record['task'])}. A row is a query, a column is a key, "
            "and blue is the exact attention mass between them: the darker, the more. What a method reads is tinted orange, and "
            "a line runs between that and what it leaves out; blue without a tint is lost. A cell of which only a part is "
            f"read is tinted too. Grey is the future, which nobody reads.{end}</p>"
        )
        yield f'<div class="side">{"".join(drawn)}</div>'


def _figure(figure: Figure, caption: str, alternative: str) -> str:
    data = base64.b64encode(figures.svg(figure)).decode()
    image = f'<img alt="{text(alternative)}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure><div class="wide" tabindex="0">{image}</div><figcaption>{text(caption)}</figcaption></figure>'
