"""The demo from start to end: start a pipeline, rank real documents, answer about a long text, stop everything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from winnow.client import Client
from winnow.errors import InvalidRequest
from winnow.orchestration.demo import view
from winnow.orchestration.demo.answering import PATHS, Answer, Question, agreement, ask
from winnow.orchestration.demo.documents import KnownItem, known_items
from winnow.orchestration.demo.longtext import LongText, long_text
from winnow.orchestration.demo.pipeline import own_pipeline
from winnow.orchestration.demo.ranking import Measured, Ranked, RankingPart

ROOM_TOKENS = 200  # chat template, question and answer beside the text


@dataclass(frozen=True)
class DemoOptions:
    """How much of it: documents and known-item queries to rank, tokens of the long text, which model, with Ray or without."""

    n_documents: int = 100
    n_queries: int = 50
    n_tokens: int = 6400
    single: bool = False
    model: str = "default"


@dataclass
class DemoReport:
    """Everything the demo measured. `complete` says that every part ran and everything started was stopped."""

    complete: bool = False
    seconds: float = 0.0
    start_seconds: float = 0.0
    ranked: list[Ranked] = field(default_factory=list)
    measured: Measured | None = None
    answers: list[Answer] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)


def run_demo(options: DemoOptions, console: Console) -> DemoReport:
    """Run every part and print it to `console`.

    Raises:
        WinnowError: what went wrong; whatever had been started is stopped before.
    """
    report = DemoReport()
    started = time.perf_counter()
    console.print("[bold]winnow demo[/]: the whole pipeline on this machine, with real text")
    view.heading(console, 1, "Start the pipeline")
    model = _model_folder(options.model, console)
    text = _long_text(model, options.n_tokens)
    items = known_items(options.n_documents)
    with ExitStack() as stack:
        with view.steps(console) as say:
            told = [say]  # who hears of the steps: the spinner at first, the screen when it stops
            state = stack.enter_context(own_pipeline(model, single=options.single, on_progress=lambda line: told[0](line)))
        told[0] = lambda line: console.print(f"  {line}", markup=False)
        report.start_seconds = time.perf_counter() - started
        client = stack.enter_context(Client(state.address, state.token))
        view.pipeline(console, client, state, report.start_seconds)
        _rank(client, options, console, report, items)
        _answer(client, console, report, text)
        view.heading(console, 4, "Stop everything")
    report.seconds = time.perf_counter() - started
    report.complete = True
    console.print(f"  nothing of it is left; [bold]{report.seconds:.0f} s[/] in all")
    console.print('\nGo on with  winnow up  and  winnow generate --file notes.txt "question"', markup=False)
    return report


def _model_folder(source: str, console: Console) -> str:
    """The model as the pipeline and the tokenizer will load it; the default one is fetched and converted once."""
    if source != "default":
        return source
    from winnow.workers.model.default_model import ensure_default_model

    with view.bars(console) as on_stage:
        return str(ensure_default_model(on_stage))


def _long_text(model: str, n_tokens: int) -> LongText:
    from winnow.workers.model.loader import load_tokenizer

    tokenizer, spec, _ = load_tokenizer(model)
    if n_tokens + ROOM_TOKENS > spec.max_context:
        raise InvalidRequest(f"--tokens: at most {spec.max_context - ROOM_TOKENS} with this model's context, got {n_tokens}")
    return long_text(n_tokens, lambda piece: len(tokenizer.encode(piece)))


def _rank(client: Client, options: DemoOptions, console: Console, report: DemoReport, items: Sequence[KnownItem]) -> None:
    part = RankingPart(client, items)
    view.heading(console, 2, f"Rank {len(items)} real documents: docstrings of this Python's standard library")
    for query, meant in part.questions():
        with view.bars(console) as on_stage:
            result = part.ask(query, meant, on_stage)
        report.ranked.append(result)
        view.ranked(console, result)
    if options.n_queries:
        with view.bars(console) as on_stage:
            report.measured = part.measure(options.n_queries, on_stage)
        view.measured(console, report.measured)


def _answer(client: Client, console: Console, report: DemoReport, text: LongText) -> None:
    view.heading(console, 3, f"Ask about a long text: {text.tokens} tokens of Python's language reference")
    console.print(f"[dim]half-way in it stands: {escape(text.needle)}[/]")
    questions = (
        # seven digits and a full stop are eight tokens
        Question("A planted fact", f"What is the special magic number for {text.city}?", text.stem, text.number, 8),
        Question("A natural question about the same text", "What is a lambda expression?"),
    )
    for question in questions:
        pair = [_one_answer(client, console, text, question, path) for path in PATHS]
        report.answers += pair
        report.agreement[question.title] = agreement(pair[0].text, pair[1].text)
        view.answers(console, question.title, pair)
        same = report.agreement[question.title]
        console.print(
            "the answers are the same" if pair[0].text == pair[1].text else f"the answers share {same:.0%} of their words"
        )
    console.print(
        "\n[dim]At the second question both find the text's KV in the prefix cache, each its own: dense attention to the token, "
        "the sparse prefill in whole chunks, because what it reads in one depends on nothing behind it.[/]"
    )


def _one_answer(client: Client, console: Console, text: LongText, question: Question, path: str) -> Answer:
    with view.spoken(console, path, question) as (on_stage, on_text):
        return ask(client, text.text, question, path, on_stage=on_stage, on_text=on_text)
