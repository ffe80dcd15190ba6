"""The batch job end to end: Ray Data, a real gateway with real roles, files on disk, a driver that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from winnow.config import load_config
from winnow.errors import InvalidRequest, WinnowError
from winnow.orchestration import launch
from winnow.orchestration.jobs.rank import rank_batch
from winnow.orchestration.state import RunState
from winnow.workers.model.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
N_QUERIES = 40


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunState]:
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("WINNOW_HOME", str(home))
    model = str(make_tiny_model(home / "tiny"))
    try:
        yield launch.up(load_config(None, {"model": {"source": model}, "gateway": {"port": 0}}), single=True, detach=False)
    finally:
        launch.down()
        patch.undo()


def write_requests(path: Path, n: int = N_QUERIES) -> Path:
    words = ["file", "list", "sort", "socket", "thread", "queue", "path", "regex"]
    lines = [
        json.dumps({
            "qid": f"q{i}", "query": f"how to use a {words[i % 8]}",
            "documents": [{"id": f"d{j}", "text": f"This {words[(i + j) % 8]} does number {j}."} for j in range(6)],
        })
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_query_once_in_order_and_the_same_again(service: RunState, tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "requests.jsonl", 12)
    seen: list[tuple[int, int]] = []
    options = {"address": service.address, "token": service.token}
    report = rank_batch(requests, tmp_path / "one", on_progress=lambda d, t: seen.append((d, t)), **options)
    assert (report.ranked, report.resumed, report.skipped) == (12, 0, [])
    run = report.run.read_text().splitlines()
    assert [line.split()[0] for line in run] == [f"q{i}" for i in range(12) for _ in range(6)]
    assert seen[0] == (0, 12) and seen[-1] == (12, 12)
    again = rank_batch(requests, tmp_path / "two", **options)
    assert again.run.read_text() == report.run.read_text()
    resumed = rank_batch(requests, tmp_path / "one", resume=True, **options)
    assert (resumed.ranked, resumed.resumed) == (0, 12)
    assert resumed.run.read_text() == again.run.read_text()


def test_a_refused_request_ends_the_job_or_is_listed(service: RunState, tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "requests.jsonl", 4)
    long = {"qid": "long", "query": "word " * 4000, "documents": [{"id": "d", "text": "x"}]}
    requests.write_text(requests.read_text() + json.dumps(long) + "\nnot json\n")
    options = {"address": service.address, "token": service.token}
    with pytest.raises(InvalidRequest, match="line 6"):
        rank_batch(requests, tmp_path / "strict", **options)
    report = rank_batch(requests, tmp_path / "lenient", on_error="skip", **options)
    assert report.ranked == 4
    assert [one.get("line", one.get("qid")) for one in report.skipped] == [6, "long"]
    assert all("word word" not in one["reason"] for one in report.skipped)
    requests.write_text("".join(requests.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(WinnowError, match="qid long"):
        rank_batch(requests, tmp_path / "fails", **options)


@pytest.mark.promise("R27")
def test_a_killed_driver_is_resumed_without_loss_or_double(service: RunState, tmp_path: Path) -> None:
    requests, output = write_requests(tmp_path / "requests.jsonl"), tmp_path / "out"
    command = [
        str(Path(sys.executable).with_name("winnow")), "rank-batch", str(requests), str(output), "--resume", "--json",
        "--address", service.address,
    ]  # fmt: skip
    environment = os.environ | {"WINNOW_TOKEN": service.token}
    results = output / "results.jsonl"
    driver = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ends = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n") >= 5):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < ends, "the job did not begin"
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    done = results.read_bytes().count(b"\n")
    assert 5 <= done < N_QUERIES, "killed too late to prove anything"
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert (report["resumed"], report["ranked"]) == (done, N_QUERIES - done)
    qids = [json.loads(line)["qid"] for line in results.read_text().splitlines()]
    assert sorted(qids) == sorted(f"q{i}" for i in range(N_QUERIES))
    calm = rank_batch(requests, tmp_path / "calm", address=service.address, token=service.token)
    assert (output / "run.trec").read_text() == calm.run.read_text()
