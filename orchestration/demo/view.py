"""How the demo looks. Made for 80 columns and more; on a pipe it is plain text without bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from winnow.client import Client
from winnow.orchestration.demo.answering import PATHS, Answer, Question
from winnow.orchestration.demo.ranking import Measured, Ranked
from winnow.orchestration.state import RunState

OnStage = Callable[[str, int, int], None]
STAGES = {
    "download": "downloading the model",
    "check": "checking the download",
    "convert": "converting the model",
    "queued": "waiting",
    "prefill": "reading the text",
    "index": "indexing the keys",
    "rank": "ranking",
    "queries": "asking known-item queries",
}


@contextmanager
def bars(console: Console) -> Iterator[OnStage]:
    """A function (stage, done, total) with one bar for the stage under way; nothing is left of it afterwards."""
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def on_stage(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[stage] = progress.add_task(STAGES.get(stage, stage), total=total or None)
            progress.update(tasks[stage], completed=done, total=total or None, visible=True)

        yield on_stage


@contextmanager
def steps(console: Console) -> Iterator[Callable[[str], None]]:
    """A function that shows the step under way: in place on a terminal, one line each elsewhere."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda text: status.update(escape(text))
    else:
        yield lambda text: console.print(f"  {text}", markup=False)


def heading(console: Console, number: int, text: str) -> None:
    """The title of a part."""
    console.print()
    console.rule(f"[bold]{number}  {text}[/]", align="left")


def pipeline(console: Console, client: Client, state: RunState, seconds: float) -> None:
    """What is running now."""
    status = client.status()
    roles = [f"{worker.info.worker_id} (process {worker.info.pid})" for worker in status.workers]
    console.print(f"  serving on [bold]{state.address}[/] after {seconds:.0f} s; metadata: {status.metadata}; {state.mode} mode")
    console.print(f"  workers: {', '.join(roles)}", markup=False)


@contextmanager
def spoken(console: Console, path: str, question: Question) -> Iterator[tuple[OnStage, Callable[[str], None]]]:
    """For one answer: a function for its progress and one that prints its text as it comes."""
    prefill, decode = PATHS[path]
    name = prefill if prefill == decode else f"{prefill} + {decode}"
    console.print(f"\n“[bold]{escape(question.text)}[/]”  [dim]{name}[/]")
    with ExitStack() as stack:
        on_stage = stack.enter_context(bars(console))
        speaking = False

        def on_text(piece: str) -> None:
            nonlocal speaking
            if not speaking:
                stack.close()  # the bar goes before the words come
                console.print(f"  [dim]{escape(question.stem)}[/]", end="")
                speaking = True
            console.print(piece.replace("\n", " "), end="", markup=False, soft_wrap=True)

        yield on_stage, on_text
    console.print()


def ranked(console: Console, result: Ranked) -> None:
    """The first five of both rankers side by side; the document meant is marked."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=False)
    shown.add_column("", justify="right", style="dim")
    width = min(40, (console.width - 24) // 2)  # what the scores and gaps leave
    for title in (f"winnow ({result.method})", "BM25"):
        shown.add_column(title, no_wrap=True, overflow="ellipsis", width=width, header_style="dim")
        shown.add_column("score", justify="right", no_wrap=True, min_width=6, header_style="dim")
    for place, (ours, theirs) in enumerate(zip(result.top, result.bm25_top, strict=True), start=1):
        cells = [str(place)]
        for (doc_id, score), form in ((ours, ".3f"), (theirs, ".2f")):
            name = f"[bold green]{escape(doc_id)} ✓[/]" if doc_id == result.meant else escape(doc_id)
            cells += [name, format(score, form)]
        shown.add_row(*cells)
    console.print(f"\n“[bold]{escape(result.query)}[/]”")
    console.print(shown)
    places = f"the one meant is at {result.place}, with BM25 at {result.bm25_place}; " if result.meant else ""
    console.print(f"[dim]{places}{result.seconds:.1f} s, with BM25 {result.bm25_seconds * 1000:.0f} ms[/]")


def measured(console: Console, result: Measured) -> None:
    """hit@1 and MRR@10 of both, with the seconds a query takes."""
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    shown.add_column("")
    for title in ("hit@1", "MRR@10", "seconds a query"):
        shown.add_column(title, justify="right", header_style="dim")
    n = result.n_queries
    shown.add_row(f"winnow ({result.method})", f"{result.hit_at_1:.2f}", f"{result.mrr_at_10:.3f}", f"{result.seconds / n:.2f}")
    shown.add_row("BM25", f"{result.bm25_hit_at_1:.2f}", f"{result.bm25_mrr_at_10:.3f}", f"{result.bm25_seconds / n:.4f}")
    console.print(f"\n[bold]What that is worth[/]: {n} known-item queries over {result.n_documents} documents")
    console.print("[dim](a docstring's first sentence asks for the rest of it, so exactly one document is right)[/]")
    console.print(shown)


def answers(console: Console, title: str, pair: Sequence[Answer]) -> None:
    """The figures of one question on both paths, side by side."""
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    shown.add_column("", style="dim")
    for answer in pair:
        prefill, decode = PATHS[answer.path]
        shown.add_column(prefill if prefill == decode else f"{prefill} +\n{decode}", justify="right", header_style="dim")
    rows: list[tuple[str, Callable[[Answer], str]]] = [
        ("time to first token", lambda a: f"{a.ttft_s:.2f} s"),
        ("speed after it", lambda a: f"{a.tokens_per_s:.1f} tokens/s"),
        ("prompt tokens", lambda a: str(a.usage.prompt_tokens)),
        ("  taken from the prefix cache", lambda a: str(a.usage.cached_tokens)),
        ("prefill density of the others", lambda a: f"{a.usage.prefill_density:.3f}" if a.usage.computed_tokens else "-"),
        ("  share of attention mass on what it read", lambda a: _share(a.usage.prefill_recall)),
        ("share of keys read per token", lambda a: f"{a.usage.keys_read_share:.1%}"),
    ]
    if any(answer.right is not None for answer in pair):
        rows.append(("the planted fact", lambda a: "[green]found ✓[/]" if a.right else "[red]missed[/]"))
    if any(answer.usage.fallback_used for answer in pair):
        rows.append(("fell back", lambda a: escape(a.usage.fallback_used) or "no"))
    for name, cell in rows:
        shown.add_row(name, *(cell(answer) for answer in pair))
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(shown)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
