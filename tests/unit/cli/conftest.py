"""A home of its own for every test of the command, no setting from outside, and the command as a function."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from winnow.cli import main


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WINNOW_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("WINNOW_HOME", str(home))
    return home


def run_command(*arguments: str, stdin: bytes = b"", columns: int = 100) -> subprocess.CompletedProcess[str]:
    """The entry point in this process, as the console script calls it; a process each would take a second each."""
    out, err = io.StringIO(), io.StringIO()
    source = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(sys, "stdin", source)
        patch.setattr(sys, "argv", ["winnow", *arguments])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(list(arguments), code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


@pytest.fixture
def winnow() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_command
