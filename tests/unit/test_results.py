"""The committed result files keep their schema, and the schema tells a good file from a bad one."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("winnow_bench_tables", ROOT / "tests" / "bench" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()
ROW: dict[str, Any] = {
    "name": "ttft", "value": 1.1, "unit": "s", "control": "in process", "control_value": 1.0, "ratio": 1.1, "n": 3, "spread": 0.1,
}  # fmt: skip
GOOD: dict[str, Any] = {
    "commit": "abc1234", "date": "2026-11-22", "machine": "2 cores", "versions": {"torch": "2.13.0"}, "command": "make bench",
    "rows": [ROW],
}  # fmt: skip


def read(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    (folder / "spine.json").write_text(json.dumps(data))
    loaded: dict[str, Any] = tables.load(folder)
    return loaded


def test_a_good_file_becomes_a_table(tmp_path: Path) -> None:
    text = tables.markdown(read(tmp_path, GOOD))
    assert text.splitlines()[-1] == "| ttft | 1.1 s | in process: 1 s | 1.1 | 3 | 10% |  |"
    assert "abc1234" in text and "make bench" in text


def test_a_file_with_a_view_becomes_a_line_for_many_rows(tmp_path: Path) -> None:
    data = copy.deepcopy(GOOD)
    names = ("executor/8192/0.10/128x128", "executor_flex/8192/0.10/128x128", "executor/8192/0.25/128x128")
    data["rows"] = [{**ROW, "name": name} for name in names]
    (tmp_path / "executor_h100.json").write_text(json.dumps(data))
    lines = tables.markdown(tables.load(tmp_path)).splitlines()
    assert lines[-4:] == [
        "| | executor | executor_flex |",
        "|---|---|---|",
        "| 8192/0.10/128x128 | 1.1 | 1.1 |",
        "| 8192/0.25/128x128 | 1.1 |  |",
    ]


def test_scores_of_few_prompts_are_not_shown_and_the_front_page_gets_the_first_view(tmp_path: Path) -> None:
    data = copy.deepcopy(GOOD)
    kinds = {"quality/all/recall/score": 330, "quality/all/sea/score": 4, "quality/all/sea/perplexity": 2}
    note = "+0.100 ± 0.020 beside dense; needle 1.000"
    data["rows"] = [{**ROW, "name": name, "n": n, "note": note} for name, n in kinds.items()]
    data["rows"].append({**ROW, "name": "quality/2048/recall/score", "n": 100})
    (tmp_path / "quality.json").write_text(json.dumps(data))
    (tmp_path / "spine.json").write_text(json.dumps(GOOD))
    lines = tables.markdown(tables.load(tmp_path), front=True).splitlines()
    assert lines[-4:] == ["| | score | perplexity |", "|---|---|---|", "| recall | 1.100 ± 0.020 (330) |  |", "| sea |  | 1.1 |"]
    assert not any("2048" in line for line in lines) and not any("ttft" in line for line in lines)
    assert any("score 2048" in line for line in tables.markdown(tables.load(tmp_path)).splitlines())


def test_every_view_shows_something_of_its_committed_file() -> None:
    for name, data in tables.load().items():
        for view in tables.VIEWS.get(name, ()):
            assert any(re.fullmatch(view.pattern, row.name) for row in data.rows), (name, view.what)


@pytest.mark.parametrize(
    ("field", "value"), [("control", ""), ("ratio", 1.5), ("value", float("nan")), ("n", 0), ("value", "fast"), ("extra", 1)]
)
def test_a_row_that_breaks_the_schema_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    data = copy.deepcopy(GOOD)
    data["rows"][0][field] = value
    with pytest.raises(ValidationError):
        read(tmp_path, data)


@pytest.mark.parametrize("field", list(GOOD))
def test_a_missing_field_of_the_file_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        read(tmp_path, {key: value for key, value in GOOD.items() if key != field})


@pytest.mark.parametrize("field", list(ROW))
def test_a_missing_field_of_a_row_is_refused(tmp_path: Path, field: str) -> None:
    data = copy.deepcopy(GOOD)
    del data["rows"][0][field]
    with pytest.raises(ValidationError, match=field):
        read(tmp_path, data)


def test_committed_files_keep_the_schema_and_name_each_row_once() -> None:
    for name, data in tables.load().items():
        rows = [row.name for row in data.rows]
        assert rows and sorted(rows) == sorted(set(rows)), name


def test_the_document_explains_every_field() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    fields = [*tables.results.ResultFile.model_fields, *tables.results.Row.model_fields]
    assert [name for name in fields if f"\n| `{name}` |" not in text] == []


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0123456, "0.0123"), (1.1, "1.1"), (12.345, "12.3"), (1234.5, "1234"), (4e9, "4e+09")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert tables.number(value) == text
