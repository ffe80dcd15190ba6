"""Ranking requests from JSON Lines: one query with its candidate documents a line.

Two shapes are read: winnow's own `{"qid", "query", "documents": [{"id", "text", "title"?}]}` and RankLLM's
`{"query": {"qid", "text"}, "candidates": [{"docid", "doc": {"title"?, "text" | "contents" | "segment" | "body"}}]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from winnow.errors import InvalidRequest
from winnow.jsonl import BadLine, parse_document
from winnow.types import Document

_BODIES = ("text", "contents", "segment", "body")


@dataclass(frozen=True)
class RankRequest:
    """One query and the documents to order. `qid` is unique within a job and holds no white space (TREC runs are split at it)."""

    qid: str
    query: str
    documents: tuple[Document, ...]


def parse_request(line: bytes) -> RankRequest:
    """One line as a request.

    Raises:
        InvalidRequest: what is wrong with the line, without any of its text.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {getattr(error, 'msg', type(error).__name__)}") from None
    if not isinstance(record, dict):
        raise InvalidRequest("expected an object with qid, query and documents")
    query, qid = record.get("query"), record.get("qid")
    if isinstance(query, dict):
        query, qid = query.get("text"), query.get("qid", qid)
    qid = str(qid) if isinstance(qid, int) and not isinstance(qid, bool) else qid
    if not isinstance(qid, str) or not qid or qid.split() != [qid]:
        raise InvalidRequest("qid must be a number or a string without white space")
    if not isinstance(query, str) or not query.strip():
        raise InvalidRequest("query must be a text that is not empty")
    documents = tuple(_documents(record))
    return RankRequest(qid, query, documents)


def _documents(record: dict[str, Any]) -> Iterator[Document]:
    items = record.get("documents", record.get("candidates"))
    if not isinstance(items, list) or not items:
        raise InvalidRequest("documents must be a list that is not empty")
    seen: set[str] = set()
    for number, item in enumerate(items, start=1):
        try:
            document = parse_document(json.dumps(_flat(item)))
            if document.doc_id.split() != [document.doc_id]:
                raise InvalidRequest("id must not hold white space")
            if document.doc_id in seen:
                raise InvalidRequest("its id stands in the list already")
        except InvalidRequest as error:
            raise InvalidRequest(f"document {number}: {error}") from None
        seen.add(document.doc_id)
        yield document


def _flat(item: Any) -> Any:
    """RankLLM's candidate as winnow's document; anything else unchanged."""
    if not isinstance(item, dict) or not isinstance(item.get("doc"), dict):
        return item
    body = next((item["doc"][key] for key in _BODIES if key in item["doc"]), None)
    return {"id": item.get("docid"), "text": body, "title": item["doc"].get("title") or ""}


def read_requests(lines: Iterable[bytes], *, skip_bad: bool) -> tuple[list[RankRequest], list[BadLine]]:
    """All requests in order, and the lines skipped.

    Raises:
        InvalidRequest: a bad line, named by its number (skip_bad=False), or no request at all.
    """
    requests: list[RankRequest] = []
    skipped: list[BadLine] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = parse_request(line)
            if request.qid in seen:
                raise InvalidRequest(f"the same qid as line {seen[request.qid]}")
        except InvalidRequest as error:
            bad = BadLine(number, str(error))
            if not skip_bad:
                raise InvalidRequest(f"{bad} (--on-error skip goes on without such lines)") from None
            skipped.append(bad)
            continue
        seen[request.qid] = number
        requests.append(request)
    if not requests:
        raise InvalidRequest("requests: none in the file" + (f"; {len(skipped)} bad lines skipped" if skipped else ""))
    return requests, skipped
