"""`winnow rank-batch`: a file of queries with candidates through the running service, spread by Ray Data, resumable.

Ray Data reads the open requests and keeps several in flight; the service's own workers do the ranking, so a batch job and
interactive users share one set of models and one admission. The driver writes each ranking to disk as it arrives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from winnow.client import Client
from winnow.errors import InvalidRequest, StatusName, Unsupported, WinnowError
from winnow.orchestration.jobs.requests import read_requests
from winnow.orchestration.jobs.results import ResultLog
from winnow.types import Document

# Errors that say something about the request rather than about the service: another try would end the same way.
_OWN_FAULT = {StatusName.INVALID_ARGUMENT, StatusName.OUT_OF_RANGE}


@dataclass(frozen=True)
class BatchReport:
    """What a job did. `ranked` counts this run, `resumed` earlier ones; `skipped` lists lines and queries left out."""

    ranked: int
    resumed: int
    skipped: list[dict[str, Any]]
    run: Path
    results: Path


class _RankCall:
    """A Ray Data actor: one client, one request a call. An error of the request's own comes back as a row; others are raised."""

    def __init__(self, address: str, token: str, method: str, deadline_s: float) -> None:
        self.client = Client(address=address, token=token)
        self.method, self.deadline_s = method, deadline_s

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        documents = [Document(d["doc_id"], d["text"]) for d in row["documents"]]
        try:
            ranking = self.client.rank(row["query"], documents, method=self.method, deadline_s=self.deadline_s)
        except WinnowError as error:
            return {"qid": row["qid"], "method": "", "seconds": 0.0, "ranking": [], "error": str(error), "code": str(error.code)}
        return {"qid": row["qid"], "method": ranking.method, "seconds": ranking.seconds, "error": "", "code": "",
                "ranking": [asdict(item) for item in ranking.items]}  # fmt: skip


def rank_batch(
    requests: Path,
    output: Path,
    *,
    address: str,
    token: str,
    method: str = "",
    on_error: Literal["fail", "skip"] = "fail",
    resume: bool = False,
    concurrency: int = 2,
    deadline_s: float = 600.0,
    tag: str = "winnow",
    ray_address: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BatchReport:
    """Rank every query of a file.

    Args:
        requests: JSON Lines, see `requests.py`.
        output: folder for results.jsonl, run.trec, skipped.jsonl and manifest.json.
        address, token: of the running gateway.
        method: ranker, name or name:key=value,...; "" = the server's default.
        on_error: "skip" goes on without bad lines and refused requests and lists them; "fail" ends at the first.
        resume: go on where an earlier run of the same job stopped. Done queries are not sent again.
        concurrency: requests in flight.
        deadline_s: of one request.
        tag: last column of the run file.
        ray_address: a running Ray cluster; None = a local one for this job.
        on_progress: (queries done, queries).

    Raises:
        InvalidRequest: a bad line, or a request the server refused (on_error="fail").
        Conflict: the output folder belongs to another job.
        Unsupported: Ray Data is not installed.
        WinnowError: what the service answered; everything finished until then is kept for --resume.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise Unsupported("rank-batch needs Ray Data: pip install 'winnow-llm[batch]'") from None
    if concurrency < 1:
        raise InvalidRequest(f"concurrency must be at least 1, got {concurrency}")
    try:
        data = requests.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"requests: cannot read the file: {error.strerror}") from None
    wanted, bad = read_requests(data.splitlines(), skip_bad=on_error == "skip")
    with Client(address=address, token=token) as client:  # fails early and clearly when nobody is there
        served = client.capabilities()
    manifest = {"input": hashlib.sha256(data).hexdigest(), "ranker": method or served.default_ranker, "model": served.model}
    log = ResultLog(output, manifest, resume=resume)
    skipped: list[dict[str, Any]] = [{"line": b.number, "reason": b.reason} for b in bad]
    open_rows = [
        {"qid": r.qid, "query": r.query, "documents": [asdict(d) for d in r.documents]} for r in wanted if r.qid not in log.done
    ]
    resumed = len(wanted) - len(open_rows)
    on_progress(resumed, len(wanted))
    starts_ray = bool(open_rows) and not ray.is_initialized()
    try:
        if starts_ray:
            ray.init(address=ray_address, log_to_driver=False, configure_logging=False)
        if open_rows:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            rows = ray.data.from_items(open_rows, override_num_blocks=min(len(open_rows), 4 * concurrency))
            calls = rows.map(
                _RankCall, fn_constructor_args=(address, token, method, deadline_s), concurrency=concurrency, num_cpus=0.1
            )
            for finished, row in enumerate(calls.iter_rows(), start=1):
                _keep(row, log, skipped, on_error)
                on_progress(resumed + finished, len(wanted))
    finally:
        log.close()
        if starts_ray:
            ray.shutdown()
    run = log.write_run((r.qid for r in wanted), tag)
    log.write_skipped(skipped)
    return BatchReport(len(log.done) - resumed, resumed, skipped, run, output / "results.jsonl")


def _keep(row: dict[str, Any], log: ResultLog, skipped: list[dict[str, Any]], on_error: str) -> None:
    if not row["error"]:
        ranking = [{k: i[k] for k in ("doc_id", "score", "rank", "truncated")} for i in row["ranking"]]
        log.add({"qid": row["qid"], "method": row["method"], "seconds": float(row["seconds"]), "ranking": ranking})
        return
    code = StatusName(row["code"])
    if on_error == "skip" and code in _OWN_FAULT:
        skipped.append({"qid": row["qid"], "reason": row["error"]})
        return
    kind = InvalidRequest if code in _OWN_FAULT else WinnowError
    error = kind(f"qid {row['qid']}: {row['error']} (what is done is kept; --resume goes on)")
    error.code = code
    raise error
