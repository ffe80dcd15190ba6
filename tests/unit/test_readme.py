"""The README is true: generated parts are fresh, named files exist, every WINNOW_* variable of the code is in its table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("src/winnow", "index", "workers", "services", "orchestration")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/promises.md", "docs/results.md")


def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.mark.timeout(120)
def test_generated_parts_are_fresh() -> None:
    done = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_files_exist(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []


def test_every_variable_the_code_reads_is_in_the_table() -> None:
    table = set(re.findall(r"^\| `(WINNOW_\w+)` \|", readme(), re.MULTILINE))
    used: dict[str, str] = {}
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            used |= {
                name: str(path.relative_to(ROOT))
                for name in re.findall(r"[\"'](WINNOW_[A-Z][A-Z0-9_]*[A-Z0-9])[\"']", path.read_text())
            }
    assert {name: path for name, path in used.items() if name not in table} == {}
    assert {"WINNOW_HOME", "WINNOW_GATEWAY__PORT", "WINNOW_METADATA__REDIS_URL"} <= table


def test_every_command_is_named() -> None:
    import typer

    from winnow.cli.app import app

    group = typer.main.get_command(app)
    names = getattr(group, "commands", {})
    assert len(names) >= 11
    assert [name for name in names if f"winnow {name}" not in readme()] == []


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for doc in DOCUMENTS for name in re.findall(r"`make ([a-z-]+)`", (ROOT / doc).read_text())}
    assert named - targets == set()
