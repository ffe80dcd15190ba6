"""scripts/setup.sh says in one line what a machine lacks and how to get it, before it changes anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_VENV = 'case "$*" in *ensurepip*) exit 1;; esac'
OLD = 'case "$*" in *"%d.%d"*) echo 3.9; exit 0;; *"(3, 11)"*) exit 1;; esac'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(checkout: Path, name: str, text: str) -> str:
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def setup(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "scripts/setup.sh", *arguments], cwd=checkout, env={**os.environ, "PATH": path, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def complains(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup: ") and [word for word in words if word not in line] == []


def test_no_python(checkout: Path) -> None:
    complains(setup(checkout, PYTHON="python-that-is-not-there"), "apt install python3")


def test_a_python_without_venv(checkout: Path) -> None:
    python = program(checkout, "py", f'{NO_VENV}\nexec "{sys.executable}" "$@"')
    complains(setup(checkout, PYTHON=python), "apt install python3-venv")


def test_a_python_that_is_too_old(checkout: Path) -> None:
    python = program(checkout, "py", f'{OLD}\nexec "{sys.executable}" "$@"')
    complains(setup(checkout, PYTHON=python), "Python 3.9", "needs 3.11 or newer")


def test_a_full_disk(checkout: Path) -> None:
    program(checkout, "df", 'echo header; echo "/dev/disk 1 1 500 99% /"')
    complains(setup(checkout, PYTHON=sys.executable), "only 500 MB free", "4000 MB")
    assert not (checkout / ".venv").exists()


def test_an_unknown_profile(checkout: Path) -> None:
    complains(setup(checkout, "everything"), "everything", "demo or dev")


def test_a_finished_environment_is_left_alone_until_the_project_changes(checkout: Path) -> None:
    digest = subprocess.run(
        "cksum pyproject.toml scripts/setup.sh | cksum | cut -d' ' -f1",
        shell=True,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (checkout / ".venv" / f".ready-dev-{digest}").touch()
    for profile in ("dev", "demo"):
        done = setup(checkout, profile, PYTHON="python-that-is-not-there")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (checkout / "pyproject.toml").write_text("changed")
    complains(setup(checkout, PYTHON="python-that-is-not-there"), "no python-that-is-not-there")
