"""The words and tables of a report: what was measured, the answer, every method beside dense, and what the words mean."""

from __future__ import annotations

import datetime
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.errors import InvalidRequest, UnknownName
from winnow.orchestration.evaluation.journal import Record
from winnow.orchestration.evaluation.summary import CONTROL, Row, fastest, kl_text, methods_of, ranked, ratio, verdict
from winnow.orchestration.evaluation.task import tasks
from winnow.registry import Registry, parse_spec
from winnow.workers.prefill.base import prefill_methods

_TERMS = {
    "score": "mean over the tasks that are answered, 0 to 1; every task counts once. Perplexity is not part of it.",
    "same answer": "share of prompts whose answer is dense attention's, word for word.",
    "perplexity / dense": "over all likelihood tasks, on the same prompts; 1 is dense's, above is worse.",
    "KL": "Kullback-Leibler divergence of the next-token distribution at the prompt's end from dense attention's, in nats, "
    "mean over prompts. A method that reads everything may show a few thousandths, by rounding in another order. The prompt's "
    "last tokens are dense under every method, as served, and their rows decide the next token: see the dense end above.",
    "density": "(query, key) pairs read over causal pairs, all layers and heads, of the prompts measured. Dense reads 1.",
    "recall": "share of a query row's exact attention mass on the keys that are read: mean, 5th percentile (mean over prompts) "
    "and least of all rows sampled, over layers and heads. What a method estimates of the rest does not count.",
    "R / oracle": "recall over the most that as many key tiles can hold. The oracle chooses for each row by itself, methods for "
    "whole tiles of rows, so 1 may be out of reach.",
    "error": "of the attention output: length of the difference from exact attention over the exact output's length.",
    "prefill": "median seconds from the prompt to the next token's scores; / dense: median ratio to dense on the same prompt.",
    "select, attend": "seconds of choosing keys and of attention itself over dense's attention on the same prompts.",
    "prompts, measured": "how many the method was run on, and on how many of them attention was measured row by row: density to "
    "error, select and attend are of these.",
}


@dataclass(frozen=True)
class _Column:
    group: str
    title: str
    value: Callable[[Row], float | None]
    form: str | Callable[[float], str]


_COLUMNS = (
    _Column("quality", "score", lambda row: row.score, ".3f"),
    _Column("quality", "score\n/ dense", lambda row: ratio(row.score, row.dense_score), ".3f"),
    _Column("quality", "same\nanswer", lambda row: row.same_answer, ".0%"),
    _Column("quality", "perplexity\n/ dense", lambda row: row.perplexity_ratio, ".3f"),
    _Column("quality", "KL,\nnats", lambda row: row.kl, kl_text),
    _Column("attention", "density", lambda row: row.shown_density, ".3f"),
    _Column("attention", "recall\nmean", lambda row: row.recall_mean, ".4f"),
    _Column("attention", "recall\np5", lambda row: row.recall_p5, ".3f"),
    _Column("attention", "recall\nmin", lambda row: row.recall_min, ".3f"),
    _Column("attention", "R /\noracle", lambda row: row.oracle_ratio, ".4f"),
    _Column("attention", "error", lambda row: row.eps, ".3f"),
    _Column("time", "prefill,\nseconds", lambda row: row.prefill_s, ".3f"),
    _Column("time", "prefill\n/ dense", lambda row: row.time_ratio, ".2f"),
    _Column("time", "select\n/ dense", lambda row: row.select_ratio, ".2f"),
    _Column("time", "attend\n/ dense", lambda row: row.attend_ratio, ".2f"),
)


def answer(rows: Sequence[Row]) -> str:
    """Which method to use at each length, by what must be kept; empty where nothing was measured that could tell."""
    lengths = sorted({row.length for row in rows})
    found = {length: dict(fastest(rows, length)) for length in lengths}
    needs = dict.fromkeys(need for by_need in found.values() for need in by_need)
    if not needs:
        return ""
    controls = {row.length: row for row in rows if row.method == CONTROL}
    lines = ["<h2>The fastest method, by what it must keep</h2>"]
    heads = "".join(f'<th scope="col">{length:,} tokens</th>' for length in lengths)
    lines.append(f'{_SCROLLED}<table class="words"><thead><tr><th scope="col">at least</th>{heads}</tr></thead><tbody>')
    for need in needs:
        cells = ""
        for length in lengths:
            name, why = (
                verdict(found[length][need], controls[length])
                if need in found[length]
                else ("dense", _why_not_asked(need, length, rows))
            )
            cells += f'<td><b>{text(name)}</b><br><span class="quiet">{text(why)}</span></td>'
        lines.append(f'<tr><th scope="row">{text(need)}</th>{cells}</tr>')
    lines.append(
        "</tbody></table></div>"
        '<p class="quiet">Prefill time over dense\'s on the same prompt: median (least to greatest). Below 1 is faster; '
        "the two are not told apart where the range holds 1, or where dense's own times lie further apart. A method that read "
        "every key is dense and does not count. The attention mass is mean recall. "
        f"{_dense_times(controls.values())}</p>"
    )
    return "".join(lines)


def _why_not_asked(need: str, length: int, rows: Sequence[Row]) -> str:
    """Why no method stands beside dense at a length."""
    controls = [row for row in rows if row.length == length and row.method == CONTROL]
    if "score" in need and controls and controls[0].dense_score == 0:
        return "its own score is 0 here, of which nobody can keep a share"
    return "nothing else was measured that skips keys"


def _dense_times(controls: Iterable[Row]) -> str:
    """Dense's times, which say how much a time can be trusted, and a warning where that is little."""
    known = [(row.length, row.prefill_s, *row.prefill_range) for row in controls if row.prefill_s and row.prefill_range]
    told = "; ".join(f"{s:.3g} s ({low:.3g} to {high:.3g}) at {length:,} tokens" for length, s, low, high in known)
    busy = (
        " Dense's times differ by more than a fifth: perhaps something else used the machine."
        if any(h > 1.2 * low for _, _, low, h in known)
        else ""
    )
    fewest = min(row.prompts for row in controls)
    few = f" With so few prompts a length ({fewest}) these are first impressions: --seeds gives more." if fewest < 10 else ""
    return f"Dense took {told}.{busy}{few}"


def setup(environment: dict[str, str], records: Sequence[Record]) -> str:
    """What was measured, on what, with what, and how to do it again."""
    finished = [record for record in records if "unsupported" not in record]
    lengths = sorted({record["length"] for record in records})
    commits = ", ".join(_said(records, "commit"))
    versions = (f"winnow {environment.get('winnow', '?')}", f"commit {commits}" if commits else "",
                f"torch {environment.get('torch', '?')}", f"python {environment.get('python', '?')}")  # fmt: skip
    facts = {
        "model": f"{environment.get('model', '?')}, {environment.get('dtype', '?')}",
        "device": f"{environment.get('device', '?')}, threads: {environment.get('threads', '?')}",
        "lengths": ", ".join(f"{length:,}" for length in lengths) + " tokens",
        "methods": ", ".join(methods_of(records)),
        "tasks": "; ".join(_tasks(finished)),
        "prefill": how_prefilled(environment),
        "versions": ", ".join(filter(None, versions)),
        "written": datetime.date.today().isoformat(),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{text(fact)}</dd>" for name, fact in facts.items())
    commands = _said(records, "command")
    listed += (
        f"<dt>command</dt><dd>{'<br>'.join(f'<code>{text(command)}</code>' for command in commands)}</dd>" if commands else ""
    )
    return f'<h2>What was measured</h2><dl class="facts">{listed}</dl>'


def how_prefilled(environment: dict[str, str]) -> str:
    """What besides the method decides what is read and how long it takes."""
    chunk, tail = (int(environment.get(name, 0)) for name in ("chunk_tokens", "tail_tokens"))
    pieces = f"{chunk:,} tokens planned at a time" if chunk else "whole prompts planned at once"
    end = f"the last {tail:,} tokens of a prompt are dense" if tail else "no dense end"
    return f"{pieces}; {end}; the method in every layer, whether that pays or not (a server leaves those dense where it does not)"


def _said(records: Sequence[Record], name: str) -> list[str]:
    return list(dict.fromkeys(record[name] for record in records if record.get(name)))


def _tasks(records: Sequence[Record]) -> Iterator[str]:
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [r for r in records if r["task"] == task and r["method"] == CONTROL]
        counts = sorted({sum(r["length"] == length for r in mine) for length in {r["length"] for r in mine}})
        asked = sorted({r["asked_depth"] for r in mine if r["asked_depth"] is not None})
        depths = f" at depths {', '.join(f'{depth:.0%}' for depth in asked)}" if asked else ""
        yield f"{task}, prompts a length: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}{depths}"


def main_table(rows: Sequence[Row]) -> str:
    """Every figure of every method and length."""
    groups = [column.group for column in _COLUMNS]
    over = "".join(f'<th scope="colgroup" colspan="{groups.count(g)}">{g}</th>' for g in dict.fromkeys(groups))
    heads = "".join(f'<th scope="col">{text(column.title).replace(chr(10), "<br>")}</th>' for column in _COLUMNS)
    lines = [f'{_SCROLLED}<table><thead><tr class="groups"><td></td>{over}<td></td></tr>'
             f'<tr><th scope="col">method</th>{heads}<th scope="col">prompts,<br>measured</th></tr></thead>']  # fmt: skip

    def cells(row: Row) -> str:
        if row.unsupported:
            return f'<td class="note" colspan="{len(_COLUMNS) + 1}">{text(row.unsupported)}</td>'
        figures = "".join(f"<td>{_number(column.value(row), column.form)}</td>" for column in _COLUMNS)
        return f"{figures}<td>{row.prompts}, {row.measured}</td>"

    return "".join([*lines, *_bodies(rows, len(_COLUMNS) + 2, cells), "</table></div>"])


def task_table(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """Each task's score."""
    generates = {record["task"]: record["generates"] for record in records if "unsupported" not in record}
    heads = "".join(
        f'<th scope="col">{text(task)}{"" if answered or task.startswith("perplexity") else "<br>perplexity"}</th>'
        for task, answered in generates.items()
    )

    def cells(row: Row) -> str:
        values = [(row.by_task.get(task), answered) for task, answered in generates.items()]
        return "".join(f"<td>{_number(v if answered or v is None else 1 / v, '.3f' if answered else '.2f')}</td>"
                       for v, answered in values)  # fmt: skip

    shown = [row for row in rows if not row.unsupported]
    head = f'{_SCROLLED}<table><thead><tr><th scope="col">method</th>{heads}</tr></thead>'
    return "".join([head, *_bodies(shown, len(generates) + 1, cells), "</table></div>"])


def _bodies(rows: Sequence[Row], n_columns: int, cells: Callable[[Row], str]) -> Iterator[str]:
    """A group of lines a length, dense first and marked, then the best first."""
    for length in sorted({row.length for row in rows}):
        yield f'<tbody><tr><th class="length" scope="rowgroup" colspan="{n_columns}">{length:,} tokens</th></tr>'
        for row in ranked(row for row in rows if row.length == length):
            mark, role = (' class="control"', ' <span class="quiet">(control)</span>') if row.method == CONTROL else ("", "")
            yield f'<tr{mark}><th scope="row"><span>{text(row.method)}</span>{role}</th>{cells(row)}</tr>'
        yield "</tbody>"


def glossary(records: Sequence[Record]) -> str:
    """What the words of the tables mean: columns, methods and tasks, folded away."""
    methods = _known(prefill_methods, methods_of(records), lambda cls: cls.caps.notes)
    about = _known(tasks, dict.fromkeys(record["task"] for record in records), lambda cls: cls.about)
    parts = (("columns mean", _TERMS), ("methods do", methods), ("tasks are", about))
    return "".join(
        f"<details><summary>What the {kind}</summary><dl>"
        + "".join(f"<dt>{text(name)}</dt><dd>{text(meaning)}</dd>" for name, meaning in listed.items())
        + "</dl></details>"
        for kind, listed in parts
        if listed
    )


def _known(registry: Registry[Any], specs: Iterable[str], about: Callable[[Any], str]) -> dict[str, str]:
    """What is said of plug-ins that are installed here: a folder may hold cells of one that is not."""
    found = {}
    for spec in specs:
        try:
            found[spec] = about(registry.get(parse_spec(spec)[0]))
        except (UnknownName, InvalidRequest):
            continue
    return found


def text(plain: str) -> str:
    """Escaped for HTML."""
    return html.escape(plain, quote=True)


_SCROLLED = '<div class="wide" tabindex="0">'


def _number(value: float | None, form: str | Callable[[float], str]) -> str:
    return "-" if value is None else format(value, form) if isinstance(form, str) else text(form(value))
