"""Exit codes, and the one place where an error becomes a line on the screen.

| Code | Meaning | Errors |
|---|---|---|
| 0 | done | |
| 1 | failed | anything not listed here |
| 2 | wrong usage, or refused as it stands | INVALID_ARGUMENT, OUT_OF_RANGE, NOT_FOUND, FAILED_PRECONDITION, ALREADY_EXISTS |
| 69 | nothing answers, or it is going away | UNAVAILABLE |
| 75 | not now, try again later | RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, ABORTED |
| 77 | not allowed | UNAUTHENTICATED, PERMISSION_DENIED |
| 130 | stopped with Ctrl-C | CANCELLED |
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape

from winnow.cli.screen import stderr
from winnow.errors import StatusName, WinnowError

FAILED, USAGE, UNAVAILABLE, TRY_LATER, NOT_ALLOWED, INTERRUPTED = 1, 2, 69, 75, 77, 130

_CODES = {
    StatusName.INVALID_ARGUMENT: USAGE,
    StatusName.OUT_OF_RANGE: USAGE,
    StatusName.NOT_FOUND: USAGE,
    StatusName.FAILED_PRECONDITION: USAGE,
    StatusName.ALREADY_EXISTS: USAGE,
    StatusName.UNAVAILABLE: UNAVAILABLE,
    StatusName.RESOURCE_EXHAUSTED: TRY_LATER,
    StatusName.DEADLINE_EXCEEDED: TRY_LATER,
    StatusName.ABORTED: TRY_LATER,
    StatusName.UNAUTHENTICATED: NOT_ALLOWED,
    StatusName.PERMISSION_DENIED: NOT_ALLOWED,
    StatusName.CANCELLED: INTERRUPTED,
}

_REMEDIES = {
    StatusName.UNAVAILABLE: "is a pipeline running? `winnow status` tells, `winnow up` starts one",
    StatusName.UNAUTHENTICATED: "give a token with --token or WINNOW_TOKEN; `winnow token create` makes one",
    StatusName.PERMISSION_DENIED: "use a token with that scope: `winnow token create --scope …`",
    StatusName.RESOURCE_EXHAUSTED: "try again in a moment",
    StatusName.DEADLINE_EXCEEDED: "give it more time with --timeout",
    StatusName.INTERNAL: "the server's log has the details under this request",
}


def exit_code(error: WinnowError) -> int:
    """The exit code of an error, see the table above."""
    return _CODES.get(error.code, FAILED)


def say_error(error: WinnowError) -> None:
    """One red line on standard error: what happened and the way out."""
    text = str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.code, "")
    if remedy and "winnow " not in text:
        text = f"{text} ({remedy})"
    stderr.print(f"[bold red]error:[/] [red]{escape(' '.join(text.split()))}[/]", soft_wrap=True, highlight=False)


@contextmanager
def reported(*, as_json: bool = False) -> Iterator[None]:
    """Turns errors of the block into a line and an exit code; with as_json also into a JSON object on standard output."""
    try:
        yield
    except WinnowError as error:
        if as_json:
            sys.stdout.write(json.dumps({"error": {"code": error.code.value, "message": str(error)}}) + "\n")
        say_error(error)
        raise SystemExit(exit_code(error)) from None
    except KeyboardInterrupt:
        stderr.print("[yellow]stopped[/]")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        raise SystemExit(FAILED) from None
