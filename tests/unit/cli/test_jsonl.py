"""Documents from JSON Lines: every accepted shape, every refused one by its line number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.errors import InvalidRequest
from winnow.jsonl import MAX_TEXT_BYTES, BadLine, parse_document, read_documents, read_documents_file
from winnow.types import Document


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "a", "text": "x"}', Document("a", "x")),
        ('{"_id": "a", "text": ""}', Document("a", "")),
        ('{"doc_id": 7, "text": "x", "extra": [1]}', Document("7", "x")),
        ('{"id": "a", "title": " T ", "text": "x"}', Document("a", "T\nx")),
        ('{"id": "a", "title": "", "text": "é"}', Document("a", "é")),
        ('{"id": "first", "_id": "second", "text": "x"}', Document("first", "x")),
    ],
)
def test_accepted_shapes(line: str, expected: Document) -> None:
    assert parse_document(line.encode()) == expected


BAD = [
    (b"{", "not JSON at column 2"),
    (b"\xff{}", "not UTF-8 at byte 0"),
    (b"[1]", "expected an object with id and text, got a list"),
    (b"null", "got null"),
    (b'{"text": "x"}', "no id: needs one of id, _id, doc_id"),
    (b'{"id": "", "text": "x"}', "id must have 1 to 512 characters, got 0"),
    (b'{"id": true, "text": "x"}', "id must be a string or a whole number, got true/false"),
    (b'{"id": "%s", "text": "x"}' % (b"a" * 513), "got 513"),
    (b'{"id": "a"}', "no text"),
    (b'{"id": "a", "text": 3}', "text must be a string, got a number"),
    (b'{"id": "a", "title": [], "text": ""}', "title must be a string, got a list"),
    (b'{"id": "a", "text": "\\ud800"}', "surrogate"),
    (b'{"id": "ok", "text": "again"}', "the same id as line 1"),
    (json.dumps({"id": "a", "text": "x" * (MAX_TEXT_BYTES + 1)}).encode(), f"at most {MAX_TEXT_BYTES}"),
    (b'{"id": "a", "text": ' + b"[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_named_and_ends_the_reading(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^line 3: ") as error:
        read_documents([b'{"id": "ok", "text": "x"}\n', b"\n", line])
    assert reason in str(error.value)
    assert "--on-error skip" in str(error.value)


def test_skipping_keeps_the_good_lines_and_lists_the_bad_ones() -> None:
    lines = [b'{"id": "1", "text": "x"}', b"oops", b'{"id": "2", "text": "y"}', b'{"id": "1", "text": "z"}']
    documents, skipped = read_documents(lines, on_error="skip")
    assert documents == [Document("1", "x"), Document("2", "y")]
    assert [bad.number for bad in skipped] == [2, 4]
    assert str(skipped[1]) == "line 4: the same id as line 1"


def test_the_text_of_a_bad_line_is_never_quoted() -> None:
    with pytest.raises(InvalidRequest) as error:
        read_documents([b"my secret note"])
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_no_document_at_all_is_an_error(on_error: str) -> None:
    with pytest.raises(InvalidRequest, match="no document"):
        read_documents([b"\n", b"  \n"], on_error=on_error)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="1 bad lines skipped"):
        read_documents([b"nope"], on_error="skip")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n{"id": "b", "text": "y"}')
    assert read_documents_file(str(path)) == ([Document("a", "x"), Document("b", "y")], [])


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_an_error_without_its_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^documents: cannot read the file: \w") as error:
        read_documents_file(str(tmp_path / name))
    assert str(tmp_path) not in str(error.value)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_give_documents_or_bad_lines(lines: list[bytes]) -> None:
    try:
        documents, skipped = read_documents(lines, on_error="skip")
    except InvalidRequest as error:
        assert "no document" in str(error)
    else:
        assert len(documents) + len(skipped) == sum(bool(line.strip()) for line in lines)
        assert all(isinstance(bad, BadLine) and 1 <= bad.number <= len(lines) for bad in skipped)
