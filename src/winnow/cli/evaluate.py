"""`winnow evaluate` and `winnow capture`: measure prefill methods beside dense attention in a real model, without a pipeline."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from winnow.cli.exits import reported
from winnow.cli.options import AsJson
from winnow.cli.screen import bytes_text, print_json, stage_bars, stderr, stdout, table
from winnow.config import load_config
from winnow.errors import InvalidRequest, UnknownName

if TYPE_CHECKING:
    from winnow.orchestration.evaluation.journal import Record
    from winnow.orchestration.evaluation.summary import Row
    from winnow.registry import Registry
    from winnow.workers.model.loader import LoadedModel

N = TypeVar("N")

Model = Annotated[str, typer.Option(help="Folder, .gguf file, hub id, or default.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def evaluate(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for report.html, results.json and the finished cells.", show_default=False)
    ],
    model: Model = "default",
    methods: Annotated[
        str, typer.Option(help="Prefill methods, NAME or NAME:key=value,... with commas between; all = every one.")
    ] = "flexprefill",
    lengths: Annotated[str, typer.Option(help="Prompt tokens, exact.")] = "1024,2048",
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, NAME or NAME:key=value,... with commas between; all = every one: needle, multi-key, multi-value, "
            "multi-query, key-value, tracking, common-words, frequent-words, questions, perplexity."
        ),
    ] = "needle",
    seeds: Annotated[int, typer.Option(help="Prompts of each task and length.")] = 2,
    depths: Annotated[
        str, typer.Option(help="Put evidence at these shares of the prompt, e.g. 0,0.5,1 (default: one drawn for each seed).")
    ] = "",
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a method plans at a time; 0 = the prompt in one pass (default: prefill.sparse_chunk_tokens)."
        ),
    ] = None,
    tail: Annotated[
        int | None, typer.Option(help="Last tokens of a prompt that stay dense; 0 = none (default: prefill.dense_tail_tokens).")
    ] = None,
    measured_seeds: Annotated[
        int, typer.Option(help="Seeds of which attention is measured layer by layer, in a second prefill.")
    ] = 1,
    rows: Annotated[int, typer.Option(help="Query rows it is measured on.")] = 64,
    attention_map: Annotated[
        str,
        typer.Option(
            "--map", metavar="LAYER:HEAD", help="Head whose attention map is drawn (default: the middle layer's first)."
        ),
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder that holds cells; finished ones stay.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure prefill methods beside dense attention: task scores, recall, density, KL, time. Stopped, it can be resumed.

    A cell is one method on one prompt. Each finished one is kept at once, and --resume goes on after it. Dense always takes part.
    A method runs in every layer, also where a server would leave it dense because it does not pay there.

    Everything runs in this process, with real text from this Python's own documentation.
    """
    with reported(as_json=as_json):
        from winnow.orchestration.evaluation import figures
        from winnow.orchestration.evaluation.journal import check_free, environment
        from winnow.orchestration.evaluation.report import write_report
        from winnow.orchestration.evaluation.runner import Evaluation, Grid
        from winnow.orchestration.evaluation.summary import summarise
        from winnow.orchestration.evaluation.tables import how_prefilled
        from winnow.orchestration.evaluation.task import tasks as known_tasks
        from winnow.workers.prefill.base import prefill_methods
        from winnow.workers.prefill.prompt import sparse_chunk_tokens

        figures.check_installed()
        serving = load_config().prefill
        grid = Grid(
            methods=split_specs("--methods", methods, prefill_methods.names),
            lengths=_numbers("--lengths", lengths, int),
            tasks=split_specs("--tasks", tasks, known_tasks.names),
            seeds=seeds,
            depths=_numbers("--depths", depths, float),
            chunk_tokens=chunk or 0,  # what is served depends on the device, which the model tells
            tail_tokens=serving.dense_tail_tokens if tail is None else tail,
            measured_seeds=measured_seeds,
            n_rows=rows,
            map_at=_layer_and_head(attention_map),
        )
        _check_specs("--methods", prefill_methods, grid.methods)
        _check_specs("--tasks", known_tasks, grid.tasks)
        check_free(out, resume=resume)
        loaded = _load(model, dtype, device, shown=not as_json)
        if chunk is None:
            grid = replace(grid, chunk_tokens=sparse_chunk_tokens(serving, loaded.decoder.device))
        with _cells(shown=not as_json) as (on_progress, on_cell):
            try:
                records = Evaluation(loaded, grid, on_progress, on_cell, command=_command()).run(out, resume=resume)
            except KeyboardInterrupt:
                stderr.print("[yellow]finished cells are kept: the same command with --resume goes on[/]")
                raise
        shared = environment(loaded, grid.chunk_tokens, grid.tail_tokens)
        results, page = write_report(out, shared, records)
        found = summarise(records)
        if as_json:
            print_json({"report": str(page), "results": str(results), "cells": len(records), "rows": found})
            return
        _show(found, how_prefilled(shared))
        stdout.print(f"\nreport   {page}\nresults  {results}", markup=False, soft_wrap=True)


def capture(
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write, or to replace.", show_default=False)],
    model: Model = "default",
    length: Annotated[int, typer.Option(help="Tokens of text.", min=1)] = 4096,
    layers: Annotated[str, typer.Option(help="all, or a list like 0,4,10-12; -1 is the last.")] = "all",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A text of your own (default: this Python's docs).")] = None,
    seed: Annotated[int, typer.Option(help="Of the text, where it is not your own.", min=0)] = 0,
    raw: Annotated[bool, typer.Option("--raw/--no-raw", help="Keep q and k from before RoPE too.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Store real q, k and v of a model's layers on a real text, for benchmarks of kernels and indexes."""
    with reported(as_json=as_json):
        from winnow.orchestration.evaluation.capture import capture as keep
        from winnow.orchestration.evaluation.capture import parse_layers
        from winnow.orchestration.evaluation.text import filler

        loaded = _load(model, dtype, device, shown=not as_json)
        chosen = parse_layers(layers, loaded.spec.n_layers)
        if file is None:
            bos = loaded.tokenizer.bos_ids
            ids = [*bos, *filler(loaded.tokenizer, max(0, length - len(bos)), seed)[0]][:length]
            text = f"this Python's documentation, seed {seed}"
        else:
            from winnow.cli.ask import read_text

            ids, text = loaded.tokenizer.encode_prompt(read_text(str(file)))[:length], "a text of the user's own"
            if len(ids) < length:
                raise InvalidRequest(f"--file: has {len(ids)} tokens, --length asks for {length}; ask for less or give more text")
        with stage_bars(shown=not as_json) as on_stage:
            path = keep(loaded, ids, chosen, out, text=text, with_raw=raw,
                        on_progress=lambda done, total: on_stage("capturing", done, total))  # fmt: skip
        size = path.stat().st_size
        if as_json:
            print_json({"path": str(path), "layers": chosen, "tokens": len(ids), "size_bytes": size})
            return
        stdout.print(f"{path}  ({len(chosen)} layers, {len(ids)} tokens, {bytes_text(size)})", markup=False, soft_wrap=True)


def _command() -> str:
    """What was typed; going on with it is not another command."""
    return shlex.join(["winnow", *(word for word in sys.argv[1:] if word != "--resume")])


def split_specs(option: str, text: str, names: Callable[[], list[str]]) -> tuple[str, ...]:
    """ "a,b:x=1,y=2,c" -> ("a", "b:x=1,y=2", "c"): a piece with "=" and no ":" before it belongs to the spec before it.

    Raises:
        InvalidRequest: empty, or such a piece without a spec before it.
    """
    if text.strip() == "all":
        return tuple(names())
    found: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        name, equals, _ = piece.partition("=")
        if equals and ":" not in name:
            if not found or ":" not in found[-1]:
                raise InvalidRequest(f"{option}: {piece!r:.40} belongs to no method or task; write NAME:key=value")
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    if not found:
        raise InvalidRequest(f"{option}: empty; known are {', '.join(names())}")
    return tuple(found)


def _check_specs(option: str, registry: Registry[Any], specs: tuple[str, ...]) -> None:
    """Raises UnknownName or InvalidRequest: before a model is loaded for nothing."""
    from winnow.registry import parse_spec

    for spec in specs:
        try:
            name, params = parse_spec(spec)
            registry.create(name, dict(params))
        except (UnknownName, InvalidRequest) as error:
            raise type(error)(f"{option}: {error}") from None


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(piece) for piece in text.split(",") if piece.strip())
    except ValueError:
        raise InvalidRequest(f"{option}: expected numbers with commas between, got {text!r:.40}") from None


def _layer_and_head(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    layer, _, head = text.partition(":")
    try:
        return int(layer), int(head)
    except ValueError:
        raise InvalidRequest(f"--map: expected LAYER:HEAD, for example 12:3, got {text!r:.40}") from None


def _load(source: str, dtype: str, device: str, *, shown: bool) -> LoadedModel:
    from winnow.workers.model.loader import load_model

    with stage_bars(shown=shown) as on_stage:
        return load_model(source, dtype=dtype, device=device, on_progress=on_stage)


@contextmanager
def _cells(*, shown: bool) -> Iterator[tuple[Callable[[int, int, str], None], Callable[[Record], None]]]:
    """Functions for the cell under way and for a finished one: a bar on a terminal, a line a cell elsewhere."""
    if not shown:
        yield lambda done, total, what: None, lambda record: None
    elif not stderr.is_terminal:
        at = [0, 0]

        def begin(done: int, total: int, what: str) -> None:
            at[:] = done + 1, total

        yield begin, lambda record: stderr.print(f"[{at[0]}/{at[1]}]  {_cell_line(record)}", markup=False, soft_wrap=True)
    else:
        columns = (SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                   TextColumn("{task.description}", markup=False))  # fmt: skip
        with Progress(*columns, console=stderr, transient=True) as progress:
            task = progress.add_task("", total=None)
            yield (
                lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
                lambda record: None,
            )


def _cell_line(record: Record) -> str:
    depth = "" if record["asked_depth"] is None else f"  depth {record['asked_depth']:.0%}"
    head = f"{record['method']}  {record['task']}  {record['length']} tokens{depth}  seed {record['seed']}"
    if "unsupported" in record:
        return f"{head}  cannot run: {record['unsupported']}"
    score = f"score {record['score']:.3f}" if record["generates"] else f"perplexity {1 / max(record['score'], 1e-300):.2f}"
    return f"{head}  {score}  density {record['density']:.2f}  prefill {record['prefill_s']:.2f} s"


def _show(rows: list[Row], how: str) -> None:
    """The chief figures and the answer, a table a length; the report has the rest."""
    from winnow.orchestration.evaluation.summary import CONTROL, fastest, kl_text, ranked, verdict

    for length in sorted({row.length for row in rows}):
        mine = ranked(row for row in rows if row.length == length)
        ran = [row for row in mine if not row.unsupported]
        alike = len({row.prompts for row in ran}) == 1
        columns: list[tuple[str, Callable[[Row], float | None], str | Callable[[float], str]]] = [
            ("score", lambda row: row.score, ".3f"),
            ("same", lambda row: row.same_answer, ".0%"),
            ("ppl", lambda row: row.perplexity_ratio, ".3f"),
            ("KL", lambda row: row.kl, kl_text),
            ("recall", lambda row: row.recall_mean, ".4f"),
            ("density", lambda row: row.shown_density, ".3f"),
            ("time", lambda row: row.time_ratio, ".2f"),
        ]
        if not alike:  # scores of different prompts say nothing beside each other
            columns[:2] = [("/dense", lambda row: None if row.score is None else row.quality, ".3f")]
            columns.append(("prompts", lambda row: row.prompts, ".0f"))
        columns = [column for column in columns if any(column[1](row) is not None for row in ran)]
        titles = tuple(title for title, _, _ in columns)
        counted = f", prompts a method: {ran[0].prompts}" if alike else ""
        shown = table(f"\n{length:,} tokens{counted}", "method", *titles, right=titles)
        # a method with its parameters must stay readable on a screen of 80 columns, and all figures be there
        shown.columns[0].min_width = 28 if len(columns) < 7 else 22
        for row in mine:
            name = (
                escape(row.method)
                + (" [dim](control)[/]" if row.method == CONTROL else "")
                + (f"\n[yellow]{escape(row.unsupported)}[/]" if row.unsupported else "")
            )
            shown.add_row(name, *(_figure(value(row), form) if row in ran else "-" for _, value, form in columns))
        stdout.print(shown)
        answers = table("", "to keep at least", "fastest", "prefill time")
        for need, best in fastest(rows, length):
            name, why = verdict(best, mine[0])
            answers.add_row(need, f"[bold]{escape(name)}[/]", escape(why))
        if answers.row_count:
            stdout.print("", answers)
    stdout.print(
        "\n[dim]same = answers equal to dense's, word for word; ppl = perplexity over dense's; time = prefill time over dense's "
        "on the same prompts, median (least to greatest): not told apart where that range holds 1, or where dense's own times "
        f"lie further apart; {how}[/]"
    )


def _figure(value: float | None, form: str | Callable[[float], str]) -> str:
    return "-" if value is None else format(value, form) if isinstance(form, str) else form(value)
