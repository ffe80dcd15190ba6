"""Where a batch job keeps what is done: one JSON line per query, synced to disk, and a TREC run made from it at the end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from winnow.errors import Conflict, CorruptBlock
from winnow.orchestration.journals import whole_lines, write_atomic

RESULTS, MANIFEST, RUN, SKIPPED = "results.jsonl", "manifest.json", "run.trec", "skipped.jsonl"


class ResultLog:
    """Append-only results of one job in one folder. A torn last line, left by a crash, is cut off on opening.

    Args:
        folder: made if it is not there.
        manifest: what the results depend on (input digest, ranker, model); a folder of another job is refused.
        resume: go on with what is there; otherwise a folder with results is refused.

    Raises:
        Conflict: the folder holds results of another job, or any when resume is False.
        CorruptBlock: a line before the last one is damaged.
    """

    def __init__(self, folder: Path, manifest: dict[str, str], *, resume: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept, path = folder / MANIFEST, folder / RESULTS
        if path.exists() and not resume:
            raise Conflict("output: the folder holds results already; use --resume, or another folder")
        if kept.exists():
            known = json.loads(kept.read_text())
            for key in sorted(manifest.keys() | known.keys()):
                if known.get(key) != manifest.get(key):
                    raise Conflict(f"output: the folder belongs to a job with another {key}; use another folder")
        else:
            write_atomic(kept, json.dumps(manifest, indent=1) + "\n")
        self.done = self._read(path)
        self._file = path.open("ab")

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        done: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole_lines(path), start=1):
            try:
                record = json.loads(line)
                done.setdefault(record["qid"], record)
            except (ValueError, KeyError, TypeError):
                raise CorruptBlock(
                    f"output: line {number} of {RESULTS} is damaged; remove the line to have it done again"
                ) from None
        return done

    def add(self, record: dict[str, Any]) -> None:
        """Write one finished query; it is on disk when this returns. A query done before is left alone."""
        if record["qid"] in self.done:
            return
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[record["qid"]] = record

    def write_run(self, qids: Iterable[str], tag: str) -> Path:
        """The TREC run of all finished queries, in the order of `qids`."""
        lines = [line for qid in qids if qid in self.done for line in run_lines(qid, self.done[qid]["ranking"], tag)]
        return write_atomic(self.folder / RUN, "".join(lines))

    def write_skipped(self, skipped: Iterable[dict[str, Any]]) -> Path:
        """What was left out and why, one JSON line each."""
        return write_atomic(self.folder / SKIPPED, "".join(json.dumps(s) + "\n" for s in skipped))

    def close(self) -> None:
        self._file.close()


def run_lines(qid: str, ranking: list[dict[str, Any]], tag: str) -> list[str]:
    """`qid Q0 docid rank score tag`. Evaluators sort by score and break ties by docid, so equal scores are made to fall."""
    lines, last = [], math.inf
    for item in ranking:
        score = min(float(item["score"]), math.nextafter(last, -math.inf))
        lines.append(f"{qid} Q0 {item['doc_id']} {item['rank']} {score!r} {tag}\n")
        last = score
    return lines
