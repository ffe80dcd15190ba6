"""Documents from JSON Lines: one object a line with an id, a text and optionally a title.

The id is the first of `id`, `_id`, `doc_id` that is there (a number is taken as its decimal text). A title is put before
the text on a line of its own. Blank lines are passed over. A bad line is an error that names its number, or, with
on_error="skip", an entry of the list of skipped lines: nothing is dropped unseen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from winnow.errors import InvalidRequest
from winnow.types import Document

ID_KEYS = ("id", "_id", "doc_id")
MAX_ID_CHARS = 512
MAX_TEXT_BYTES = 1 << 20

OnError = Literal["fail", "skip"]


@dataclass(frozen=True)
class BadLine:
    """A line that is not a document. `number` counts from 1; `reason` holds none of its text."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}"


def parse_document(line: bytes | str) -> Document:
    """One line as a document.

    Raises:
        InvalidRequest: not JSON, not an object, no id or text, or one of them of another type or too long.
    """
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"not JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise InvalidRequest("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise InvalidRequest(f"expected an object with id and text, got {_kind(record)}")
    return Document(_doc_id(record), _text(record))


def _doc_id(record: dict[str, Any]) -> str:
    key = next((key for key in ID_KEYS if key in record), None)
    if key is None:
        raise InvalidRequest(f"no id: needs one of {', '.join(ID_KEYS)}")
    value = record[key]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InvalidRequest(f"{key} must be a string or a whole number, got {_kind(value)}")
    if not 1 <= len(value) <= MAX_ID_CHARS:
        raise InvalidRequest(f"{key} must have 1 to {MAX_ID_CHARS} characters, got {len(value)}")
    return value


def _text(record: dict[str, Any]) -> str:
    if "text" not in record:
        raise InvalidRequest("no text")
    for key in ("title", "text"):
        if not isinstance(record.get(key, ""), str):
            raise InvalidRequest(f"{key} must be a string, got {_kind(record[key])}")
    title, text = record.get("title", "").strip(), record["text"]
    whole = f"{title}\n{text}" if title else text
    try:
        size = len(whole.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("text holds half a surrogate pair, which is not Unicode text") from None
    if size > MAX_TEXT_BYTES:
        raise InvalidRequest(f"text of {size} bytes: at most {MAX_TEXT_BYTES}; split the document")
    return whole


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_documents(lines: Iterable[bytes], on_error: OnError = "fail") -> tuple[list[Document], list[BadLine]]:
    """All documents of `lines`, in order, and the lines skipped.

    Args:
        lines: an open binary file, or any lines of bytes.
        on_error: "fail" ends at the first bad line, "skip" goes on and lists it.

    Raises:
        InvalidRequest: a bad line (on_error="fail"), or no document at all.
    """
    documents: list[Document] = []
    skipped: list[BadLine] = []
    seen: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line.strip():
            continue
        try:
            document = parse_document(line)
            if document.doc_id in seen:
                raise InvalidRequest(f"the same id as line {seen[document.doc_id]}")
        except InvalidRequest as error:
            bad = BadLine(number, str(error))
            if on_error == "fail":
                raise InvalidRequest(f"{bad} (--on-error skip goes on without such lines)") from None
            skipped.append(bad)
            continue
        seen[document.doc_id] = number
        documents.append(document)
    if not documents:
        raise InvalidRequest("documents: no document in the file" + (f"; {len(skipped)} bad lines skipped" if skipped else ""))
    return documents, skipped


def read_documents_file(path: str, on_error: OnError = "fail") -> tuple[list[Document], list[BadLine]]:
    """`read_documents` of a file; "-" is standard input.

    Raises:
        InvalidRequest: no such file, or as `read_documents`.
    """
    if path == "-":
        return read_documents(sys.stdin.buffer, on_error)
    try:
        with Path(path).open("rb") as file:
            return read_documents(file, on_error)
    except OSError as error:
        raise InvalidRequest(f"documents: cannot read the file: {error.strerror}") from None
