"""Every promise that docs/promises.md marks as kept today is proven by at least one test that carries its id."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (R\d+) \| (today|later) \|", re.MULTILINE)


def documented() -> dict[str, str]:
    return dict(ROW.findall((ROOT / "docs" / "promises.md").read_text()))


def carried() -> dict[str, list[str]]:
    """Promise id -> tests that carry it, read from the source so that unselected tests count too."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.promise"):
                for argument in node.args:
                    found.setdefault(ast.literal_eval(argument), []).append(path.name)
    return found


def test_the_document_lists_every_promise_once() -> None:
    rows = ROW.findall((ROOT / "docs" / "promises.md").read_text())
    assert [name for name, _ in rows] == [f"R{n}" for n in range(1, 31)]


def test_every_promise_kept_today_has_a_test() -> None:
    tests = carried()
    assert [name for name, when in documented().items() if when == "today" and name not in tests] == []


def test_no_test_carries_an_unknown_promise() -> None:
    assert sorted(set(carried()) - set(documented())) == []
