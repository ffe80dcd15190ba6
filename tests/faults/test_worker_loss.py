"""R8, R14, R15 and R11 on one running deployment: workers, Ray's head and the metadata server are hurt while requests run."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time

import grpc
import pytest
import redis

from winnow.errors import WorkerLost
from winnow.orchestration import state
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common.links import Links
from winnow.types import Chunk, Generation

from .deployment import CHUNK_TOKENS, LONG_PROMPT, Deployment, Load, eventually, listening_addresses, run_with

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
# as /proc/net writes them: 127.0.0.1, ::1, and 127.0.0.1 mapped into IPv6
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
ASK = {"max_tokens": 16, "no_cache": True, "deadline_s": 90.0}


@pytest.fixture(scope="module")
def calm(deployment: Deployment) -> Generation:
    """The answer when nothing is hurt."""
    with deployment.client() as client:
        answer = client.complete(LONG_PROMPT, **ASK)
    assert answer.usage.prompt_tokens > 1300 and answer.usage.completion_tokens > 0
    return answer


@pytest.mark.promise("R28")
def test_every_process_listens_on_loopback_only(deployment: Deployment) -> None:
    listening = {pid: addresses for pid in deployment.processes() if (addresses := listening_addresses(pid))}
    assert len(listening) >= 5  # gateway, three roles and Ray's own at least
    assert {a for addresses in listening.values() for a in addresses} <= LOOPBACK
    assert stat.S_IMODE(state.run_dir().stat().st_mode) == 0o700
    readable = [p.name for p in state.run_dir().iterdir() if p.is_file() and stat.S_IMODE(p.stat().st_mode) & 0o077]
    assert readable == []


def hurt_during_prefill(deployment: Deployment, at: str, number: signal.Signals) -> tuple[str, int, Generation | None]:
    """Send a signal to the worker that reads the prompt, at its start, middle or last chunk.

    Returns the worker, its epoch, and the answer (None = UNAVAILABLE).
    """
    before = deployment.workers()
    files = deployment.segment_files()
    victim = ""

    def on_chunk(chunk: Chunk) -> None:
        nonlocal victim
        if victim or chunk.stage != "prefill":
            return
        least = {"start": 0, "middle": chunk.total // 2, "last chunk": chunk.total - 2 * CHUNK_TOKENS}[at]
        if chunk.done >= least:
            victim = deployment.segment_owner(files)
            os.kill(before[victim].pid, number)

    answer: Generation | None = None
    with deployment.client() as client:
        try:
            answer = run_with(client, on_chunk, **ASK)
        except WorkerLost:
            assert victim, "lost a worker before any was hurt"
    assert victim, "the prompt was read before a progress event came"
    return victim, before[victim].epoch, answer


@pytest.mark.promise("R8")
@pytest.mark.promise("R14")
@pytest.mark.parametrize("at", ["start", "middle", "last chunk"])
def test_a_prefill_worker_killed_mid_prompt_costs_no_answer(deployment: Deployment, calm: Generation, at: str) -> None:
    eventually(lambda: len(deployment.workers()) == 3, 60, "all workers are registered")
    victim, epoch, answer = hurt_during_prefill(deployment, at, signal.SIGKILL)
    assert victim.startswith("prefill-")
    assert answer is None or answer.token_ids == calm.token_ids
    back = deployment.wait_back(victim, epoch, 60)
    assert back.epoch > epoch
    eventually(deployment.is_idle, 10, "nothing is held for the request")
    with deployment.client() as client:
        assert client.complete(LONG_PROMPT, **ASK).token_ids == calm.token_ids


@pytest.mark.promise("R8")
def test_a_prefill_worker_that_is_stopped_is_left_and_replaced(deployment: Deployment, calm: Generation) -> None:
    victim, epoch, answer = hurt_during_prefill(deployment, "middle", signal.SIGSTOP)
    assert answer is None or answer.token_ids == calm.token_ids
    deployment.wait_back(victim, epoch, 60)
    with deployment.client() as client:
        assert client.complete(LONG_PROMPT, **ASK).token_ids == calm.token_ids


@pytest.mark.promise("R14")
def test_a_segment_of_an_earlier_epoch_is_refused_by_its_restarted_owner(deployment: Deployment) -> None:
    worker = deployment.workers()["prefill-0"]
    os.kill(worker.pid, signal.SIGKILL)
    back = deployment.wait_back("prefill-0", worker.epoch, 60)

    async def renew(owner_epoch: int) -> grpc.StatusCode:
        links = Links(deployment.config, (state.run_dir() / "secret").read_text())
        handle = internal_pb2.SegmentHandle(
            segment_id="1", owner="prefill-0", owner_epoch=owner_epoch, host_id=back.host_id, fencing=1
        )
        try:
            stub = internal_pb2_grpc.SegmentsStub(links.channel(back.address))
            await stub.Renew(internal_pb2.LeaseRequest(segment=handle, ttl_s=5.0), metadata=links.metadata(), timeout=5)
        except grpc.aio.AioRpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        finally:
            await links.close()
        return grpc.StatusCode.OK

    assert asyncio.run(renew(worker.epoch)) in (grpc.StatusCode.ABORTED, grpc.StatusCode.NOT_FOUND)
    deployment.ask_metadata(lambda store: store.register(worker, 30.0))  # the old process speaks again
    assert deployment.workers()["prefill-0"].epoch == back.epoch


@pytest.mark.promise("R11")
@pytest.mark.parametrize("fault", ["slow", "flushed", "idle connections closed", "stopped", "killed"])
def test_a_metadata_server_in_trouble_changes_no_answer(deployment: Deployment, calm: Generation, fault: str) -> None:
    with Load(deployment, 2, **ASK).running() as load:
        n_before = len(load.results)
        with redis.from_url(deployment.metadata_url) as admin:
            pid = deployment.metadata_pid()
            if fault == "slow":
                admin.client_pause(2000, all=True)
            elif fault == "flushed":
                admin.flushall()
                admin.script_flush()
            elif fault == "idle connections closed":
                admin.client_kill_filter(_type="normal", skipme=True)
            elif fault == "stopped":
                os.kill(pid, signal.SIGSTOP)
            else:
                os.kill(pid, signal.SIGKILL)
            hurt_at = time.monotonic()
            try:
                eventually(lambda: len(load.results) >= n_before + 4, 60, "requests go on meanwhile")
                if fault in ("slow", "stopped"):
                    time.sleep(max(0.0, 2.0 - (time.monotonic() - hurt_at)))  # how long this fault lasts
            finally:
                if fault == "stopped":
                    os.kill(pid, signal.SIGCONT)
        with deployment.client() as client:
            eventually(lambda: client.status().metadata == "embedded", 5, "the gateway reaches it again")
        eventually(lambda: len(_registered(deployment)) == 3, 5, "workers announced again")
    assert load.errors == []
    assert {r.token_ids for r in load.results} == {calm.token_ids}


@pytest.mark.promise("R11")
def test_a_metadata_server_killed_again_and_again_always_comes_back(deployment: Deployment, calm: Generation) -> None:
    """A process full of gRPC threads must be able to start it anew every time, not only mostly."""
    with Load(deployment, 2, **ASK).running() as load:
        for _ in range(6):
            _kill_metadata_server(deployment)
            eventually(lambda: _answers(deployment), 5, "it is back")
        eventually(lambda: len(_registered(deployment)) == 3, 5, "workers announced again")
    assert load.errors == []
    assert {r.token_ids for r in load.results} == {calm.token_ids}


@pytest.mark.promise("R11")
def test_a_metadata_server_that_cannot_start_is_tried_until_it_can(deployment: Deployment, calm: Generation) -> None:
    sock = state.short_dir() / "meta.sock"
    with Load(deployment, 2, **ASK).running() as load:
        _kill_metadata_server(deployment)
        sock.unlink(missing_ok=True)
        sock.mkdir()  # nothing can listen there now
        n_before = len(load.results)
        eventually(lambda: len(load.results) >= n_before + 4, 60, "requests go on without it")
        assert not _answers(deployment)
        sock.rmdir()
        eventually(lambda: _answers(deployment), 20, "it is back")  # one that started just before waits 10 s in vain first
        eventually(lambda: len(_registered(deployment)) == 3, 5, "workers announced again")
    assert load.errors == []
    assert {r.token_ids for r in load.results} == {calm.token_ids}


def _kill_metadata_server(deployment: Deployment) -> None:
    pid = deployment.metadata_pid()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not _answers(deployment), 5, "it is gone")


def _answers(deployment: Deployment) -> bool:
    try:
        with redis.from_url(deployment.metadata_url) as admin:
            return bool(admin.ping())
    except redis.ConnectionError:
        return False


def _registered(deployment: Deployment) -> list[str]:
    try:
        return list(deployment.workers())
    except Exception as error:
        assert type(error).__name__ == "MetadataUnavailable"  # just coming back
        return []


@pytest.mark.timeout(600)
def test_service_returns_by_itself_when_rays_head_is_killed(deployment: Deployment, calm: Generation) -> None:
    before = eventually(lambda: len(found := deployment.workers()) == 3 and found, 60, "all workers are registered")
    assert before
    head = [pid for pid in deployment.processes() if b"gcs_server" in _command(pid)]
    assert len(head) == 1
    killed_at = time.monotonic()
    os.kill(head[0], signal.SIGKILL)

    with deployment.client() as client:

        def answered() -> bool:
            try:
                return client.complete(LONG_PROMPT, **ASK).token_ids == calm.token_ids
            except WorkerLost:
                return False

        # Promise R15 says within 60 s. On two busy cores starting Ray and the roles anew has taken up to 75, so that bound is not
        # claimed yet; this test proves that service comes back and says the same.
        eventually(answered, 180, "requests are answered")
        served_after_s = time.monotonic() - killed_at
        for worker_id, worker in before.items():
            deployment.wait_back(worker_id, worker.epoch, 180)
        print(f"served {served_after_s:.1f} s, all workers anew {time.monotonic() - killed_at:.1f} s after the head was killed")
        assert client.complete(LONG_PROMPT, **ASK).token_ids == calm.token_ids


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""
