"""`winnow rank` and `winnow rank-batch`: order documents by relevance to a query."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from winnow.cli.exits import reported
from winnow.cli.options import Address, AsJson, TimeoutS, TlsCa, Token
from winnow.cli.screen import print_json, stage_bars, stderr, stdout, table
from winnow.jsonl import BadLine, read_documents_file

OnErrorOption = Annotated[
    Literal["fail", "skip"],
    typer.Option("--on-error", help="At a bad line: fail names it and ends; skip goes on and lists the skipped at the end."),
]


def rank(
    documents: Annotated[
        str,
        typer.Argument(metavar="DOCS.JSONL", help='Lines of {"id" or "_id" or "doc_id", "text", optional "title"}; - = stdin.'),
    ],
    query: Annotated[str, typer.Option("--query", "-q", help="What the documents are ranked for.")],
    method: Annotated[str, typer.Option(help="Ranker, NAME or NAME:key=value,... (default: the server's).")] = "",
    top: Annotated[int, typer.Option(help="Show only the best N; 0 = all.", min=0)] = 10,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse instead of falling back to another ranker.")] = False,
    on_error: OnErrorOption = "fail",
    address: Address = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    timeout: TimeoutS = None,
    as_json: AsJson = False,
) -> None:
    """Rank the documents of a JSON Lines file for one query, best first."""
    with reported(as_json=as_json):
        docs, skipped = read_documents_file(documents, on_error)
        from winnow.cli.connect import connect

        with connect(address, token, tls_ca) as client, stage_bars(shown=not as_json) as on_stage:
            ranking = client.rank(
                query,
                docs,
                method=method or None,
                top_n=top,
                strict=strict,
                deadline_s=timeout,
                on_progress=lambda done, total: on_stage("rank", done, total),
            )
        if as_json:
            print_json({**asdict(ranking), "documents": len(docs), "skipped": [asdict(bad) for bad in skipped]})
            return
        texts = {document.doc_id: " ".join(document.text.split()) for document in docs}
        shown = table("", "rank", "score", "document", "text", right=("rank", "score"))
        for item in ranking.items:
            mark = " [yellow](cut)[/]" if item.truncated else ""
            shown.add_row(str(item.rank), f"{item.score:.4f}", escape(item.doc_id) + mark, escape(texts[item.doc_id][:160]))
        stdout.print(shown)
        stderr.print(f"[dim]{len(docs)} documents, {ranking.method}, {ranking.seconds:.2f} s[/]")
        if ranking.fallback_used:
            stderr.print(f"[yellow]fell back: {escape(ranking.fallback_used)}[/]")
        say_skipped(skipped)


def say_skipped(skipped: list[BadLine]) -> None:
    """List the lines that were left out, on standard error."""
    if skipped:
        stderr.print(f"[yellow]{len(skipped)} lines skipped:[/]")
        for bad in skipped:
            stderr.print(f"  {bad}", markup=False)


def rank_batch(
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS.JSONL", help="A query with its candidate documents on each line.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Gets results.jsonl, run.trec, skipped.jsonl and manifest.json.")
    ],
    method: Annotated[str, typer.Option(help="Ranker, NAME or NAME:key=value,... (default: the server's).")] = "",
    on_error: OnErrorOption = "fail",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run of the same job stopped.")] = False,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 2,
    tag: Annotated[str, typer.Option(help="Last column of the TREC run.")] = "winnow",
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster (default: a local one for this job).")] = None,
    address: Address = None,
    token: Token = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one request.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Rank a file of queries with their candidates through the running service, on Ray Data. Killed anywhere, it can be resumed.

    A line is {"qid", "query", "documents": [{"id", "text", "title"?}, ...]}.
    """
    with reported(as_json=as_json):
        from winnow.cli.connect import endpoint
        from winnow.orchestration.jobs.rank import rank_batch as run

        where = endpoint(address, token)
        with stage_bars(shown=not as_json) as on_stage:
            report = run(
                requests,
                output,
                address=where.address,
                token=where.token,
                method=method,
                on_error=on_error,
                resume=resume,
                concurrency=concurrency,
                deadline_s=timeout,
                tag=tag,
                ray_address=ray_address,
                on_progress=lambda done, total: on_stage("rank", done, total),
            )
        if as_json:
            print_json({**asdict(report), "run": str(report.run), "results": str(report.results)})
            return
        stdout.print(f"{report.ranked} queries ranked, {report.resumed} kept from earlier runs, {len(report.skipped)} skipped")
        stdout.print(f"run      {report.run}\nresults  {report.results}", markup=False)
        for bad in report.skipped:
            place = f"line {bad['line']}" if "line" in bad else f"query {bad['qid']}"
            stderr.print(f"  skipped {place}: {bad['reason']}", markup=False)
