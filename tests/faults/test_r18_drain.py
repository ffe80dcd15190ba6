"""R18: SIGTERM under load. And what a supervisor that is killed, or ends, leaves behind: nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from winnow.errors import Conflict, Draining, WorkerLost
from winnow.orchestration import processes, state
from winnow.orchestration.supervisor import down, read_state, up

from .deployment import LONG_PROMPT, Deployment, deployment_config, eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]
LONG_ANSWER = {"max_tokens": 250, "no_cache": True, "deadline_s": 60.0}


@pytest.fixture(params=["ray", "single"])
def fresh(request: pytest.FixtureRequest, own_home: Path, small_model: Path) -> Iterator[Deployment]:
    """A deployment of this test alone."""
    config = deployment_config(small_model, prefill=1)
    running = Deployment.start(config, single=request.param == "single")
    yield running
    running.stop()


def watch_health(address: str, changes: list[tuple[float, str]], ended: threading.Event) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not ended.is_set():
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=2).status
                word = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            except grpc.RpcError:
                word = "gone"
            if not changes or changes[-1][1] != word:
                changes.append((time.monotonic(), word))
            ended.wait(0.02)


@pytest.mark.promise("R18")
def test_sigterm_under_load_finishes_what_runs_and_leaves_nothing(fresh: Deployment) -> None:
    with fresh.client() as client:
        calm = client.complete(LONG_PROMPT, **LONG_ANSWER)
    everyone = fresh.processes()
    folders = [fresh.kv_dir, state.short_dir() / "ray"]
    changes: list[tuple[float, str]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=watch_health, args=(fresh.state.address, changes, ended))
    watcher.start()
    started, finished = threading.Barrier(4, timeout=30), []

    def ask() -> tuple[int, ...]:
        text, ids = "", []
        waiting = True
        with fresh.client() as own:
            for chunk in own.generate(LONG_PROMPT, **LONG_ANSWER):
                text += chunk.text
                ids += chunk.token_ids
                if chunk.token_ids and waiting:
                    waiting = False
                    started.wait()
        finished.append(time.monotonic())
        return tuple(ids)

    try:
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(ask) for _ in range(3)]
            started.wait()  # all three are in the middle of their answers
            fresh.terminate()
            answers = [r.result(timeout=60) for r in running]
        assert answers == [calm.token_ids] * 3
        with fresh.client() as late, pytest.raises((Draining, WorkerLost)):  # nothing answers, or it says that it is draining
            late.complete("Late.", deadline_s=20)
        assert fresh.exit_code(within_s=40) == 0
    finally:
        ended.set()
        watcher.join(timeout=10)
    words = [word for _, word in changes]
    assert words[:2] == ["SERVING", "NOT_SERVING"], words
    assert changes[1][0] < max(finished), "health turned after the last answer"
    assert read_state() is None
    eventually(lambda: not [p for p in everyone if processes.start_time(p)], 10, "every process is gone")
    assert [f for f in folders if f.exists()] == []


@pytest.mark.promise("R18")
def test_a_killed_supervisor_takes_everything_with_it_and_the_next_up_cleans(own_home: Path, small_model: Path) -> None:
    config = deployment_config(small_model, prefill=1)
    first = Deployment.start(config)
    with pytest.raises(Conflict, match="already running"):
        up(config)
    everyone = [p for p in first.processes() if p != first.state.pid]
    assert len(everyone) > 5
    with first.client() as client:
        calm = client.complete(LONG_PROMPT, max_tokens=8)
    assert first.segment_files()
    os.kill(first.state.pid, signal.SIGKILL)
    eventually(lambda: not [p for p in everyone if processes.start_time(p)], 20, "roles, Ray and metadata server are gone")
    assert read_state() is None
    assert down(5) is False
    leftover = first.kv_dir / "leftover.kv"
    first.kv_dir.mkdir(exist_ok=True)
    leftover.write_bytes(b"x")
    second = Deployment.start(config, single=True)
    try:
        assert not leftover.exists()
        with second.client() as client:
            assert client.complete(LONG_PROMPT, max_tokens=8).token_ids == calm.token_ids
    finally:
        second.stop()
    assert not first.kv_dir.exists()
