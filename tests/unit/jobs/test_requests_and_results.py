"""Batch job files: requests of both shapes, bad lines by number, results that survive a crash, runs evaluators agree on."""

from __future__ import annotations

import json
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, nDCG

from winnow.errors import Conflict, CorruptBlock, InvalidRequest
from winnow.orchestration.jobs.requests import read_requests
from winnow.orchestration.jobs.results import RESULTS, ResultLog, run_lines

GOOD = json.dumps(
    {"qid": "q1", "query": "sort", "documents": [{"id": "a", "text": "x"}, {"id": 2, "text": "y", "title": "t"}]}
).encode()
PEER = json.dumps(
    {"query": {"qid": 7, "text": "sort"}, "candidates": [{"docid": "a", "score": 1.0, "doc": {"title": "T", "contents": "body"}}]}
).encode()


def test_both_shapes_are_read() -> None:
    requests, skipped = read_requests([GOOD, b"\n", PEER], skip_bad=False)
    assert [r.qid for r in requests] == ["q1", "7"]
    assert [(d.doc_id, d.text) for d in requests[0].documents] == [("a", "x"), ("2", "t\ny")]
    assert [(d.doc_id, d.text) for d in requests[1].documents] == [("a", "T\nbody")]
    assert skipped == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "expected an object"),
        (b'{"query": "a", "documents": [{"id": "1", "text": ""}]}', "qid"),
        (b'{"qid": "a b", "query": "a", "documents": [{"id": "1", "text": ""}]}', "qid"),
        (b'{"qid": "1", "query": " ", "documents": [{"id": "1", "text": ""}]}', "query"),
        (b'{"qid": "1", "query": "a", "documents": []}', "documents"),
        (b'{"qid": "1", "query": "a", "documents": [{"id": "1", "text": ""}, {"text": ""}]}', "document 2: no id"),
        (b'{"qid": "1", "query": "a", "documents": [{"id": "1", "text": ""}, {"id": "1", "text": ""}]}', "document 2: its id"),
        (b'{"qid": "1", "query": "a", "documents": [{"id": "1 2", "text": ""}]}', "white space"),
        (GOOD, "the same qid as line 1"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_listed(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match="line 2") as error:
        read_requests([GOOD, line], skip_bad=False)
    assert reason in str(error.value)
    requests, skipped = read_requests([GOOD, line], skip_bad=True)
    assert [r.qid for r in requests] == ["q1"]
    assert [(b.number, reason in b.reason) for b in skipped] == [(2, True)]


def _record(qid: str) -> dict[str, object]:
    return {"qid": qid, "method": "m", "seconds": 0.1, "ranking": [{"doc_id": "a", "score": 1.0, "rank": 1, "truncated": False}]}


def test_a_torn_last_line_is_done_again_and_nothing_is_doubled(tmp_path: Path) -> None:
    log = ResultLog(tmp_path, {"input": "1"}, resume=False)
    log.add(_record("q1"))
    log.add(_record("q1"))
    log.close()
    with (tmp_path / RESULTS).open("ab") as file:
        file.write(b'{"qid": "q2", "rank')
    log = ResultLog(tmp_path, {"input": "1"}, resume=True)
    assert list(log.done) == ["q1"]
    log.add(_record("q2"))
    log.close()
    assert [json.loads(line)["qid"] for line in (tmp_path / RESULTS).read_text().splitlines()] == ["q1", "q2"]


def test_a_folder_of_another_job_or_without_resume_is_refused(tmp_path: Path) -> None:
    log = ResultLog(tmp_path, {"input": "1", "ranker": "icr"}, resume=False)
    log.add(_record("q1"))
    log.close()
    with pytest.raises(Conflict, match="--resume"):
        ResultLog(tmp_path, {"input": "1", "ranker": "icr"}, resume=False)
    with pytest.raises(Conflict, match="another ranker"):
        ResultLog(tmp_path, {"input": "1", "ranker": "likelihood"}, resume=True)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    ResultLog(tmp_path, {}, resume=False).close()
    (tmp_path / RESULTS).write_text('{"qid": "q1"}\nbroken\n{"qid": "q3"}\n')
    with pytest.raises(CorruptBlock, match="line 2"):
        ResultLog(tmp_path, {}, resume=True)


def test_run_files_keep_the_order_of_ties_in_evaluators() -> None:
    """`z` stands before `a` with the same score: an evaluator sorting by score and then docid would turn them round."""
    items = [{"doc_id": d, "score": 0.5, "rank": i} for i, d in enumerate(["z", "m", "a"], start=1)]
    lines = run_lines("q", items, "tag")
    scores = [float(line.split()[4]) for line in lines]
    assert scores == sorted(set(scores), reverse=True)
    run = list(ir_measures.read_trec_run("".join(lines)))
    qrels = [ir_measures.Qrel("q", "z", 1)]
    assert ir_measures.calc_aggregate([RR @ 10, nDCG @ 10], qrels, run) == {RR @ 10: 1.0, nDCG @ 10: 1.0}
