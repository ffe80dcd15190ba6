"""What the commands print with: consoles, progress bars, tables, JSON. Data goes to standard output, the rest to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

STAGES = {
    "queued": "waiting for a place",
    "draft": "scoring the prompt",
    "prefill": "reading the text",
    "index": "indexing the keys",
    "rank": "ranking",
    "download": "downloading",
    "convert": "converting",
    "load": "loading the model",
}

OnStage = Callable[[str, int, int], None]


@contextmanager
def stage_bars(*, shown: bool = True) -> Iterator[OnStage]:
    """A function (stage, done, total) that keeps one progress bar per stage; the bars vanish with the block.

    total = 0 shows a spinner. Nothing is drawn when `shown` is False or standard error is not a terminal.
    """
    if not shown or not stderr.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def on_stage(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for old in tasks.values():
                    progress.update(old, visible=False)
                tasks[stage] = progress.add_task(STAGES.get(stage, stage), total=total or None)
            progress.update(tasks[stage], completed=done, total=total or None, visible=True)

        yield on_stage


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style; columns named in `right` are aligned right."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", header_style="dim", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """`value` as one JSON document on standard output; dataclasses become objects."""
    sys.stdout.write(json.dumps(value, default=_plain, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if hasattr(value, "DESCRIPTOR"):
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def bytes_text(size: float) -> str:
    """A size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
