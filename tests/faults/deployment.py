"""A real deployment for the fault tests: Ray, a process per role, the embedded metadata server, a small random model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from winnow import Client
from winnow.config import WinnowConfig
from winnow.orchestration import launch, processes, state
from winnow.orchestration.metadata import RedisMetadata
from winnow.orchestration.supervisor import RunState, down, up
from winnow.types import Chunk, Generation, WorkerInfo

T = TypeVar("T")
LONG_PROMPT = " ".join(f"Line {i}: the quiet river turns at stone {i * 37 % 101}." for i in range(41))  # about 1,500 tokens
CHUNK_TOKENS = 64


def deployment_config(model: Path, **cluster: int) -> WinnowConfig:
    """Small chunks, so that a prompt has a start, a middle and an end; one thread each, since all share two cores."""
    return WinnowConfig(
        **{  # type: ignore[arg-type]
            "model": {"source": str(model), "dtype": "fp32", "threads": 1},
            "gateway": {"port": 0, "drain_grace_s": 30.0},
            "prefill": {"chunk_tokens": CHUNK_TOKENS},
            "kv": {"budget_bytes": 256 << 20, "lease_s": 10.0},
            "cluster": {"prefill": 2, "decode": 1, "retrieval": 0, "draft": 0, **cluster},
        }
    )


@dataclass
class Deployment:
    """A running one, and the means to look into it and to hurt it."""

    state: RunState
    config: WinnowConfig

    @classmethod
    def start(cls, config: WinnowConfig, *, single: bool = False) -> Deployment:
        steps: list[str] = []
        began = time.monotonic()
        started = up(config, single=single, detach=False, on_progress=steps.append, timeout_s=200)
        print(f"up in {time.monotonic() - began:.1f} s: {steps}")
        return cls(started, config)

    def client(self) -> Client:
        return Client(self.state.address, self.state.token)

    @property
    def metadata_url(self) -> str:
        return f"unix://{state.short_dir()}/meta.sock"

    def metadata_pid(self) -> int:
        from winnow.orchestration.placer import read_children

        return read_children()["metadata"]["pid"]

    def ask_metadata(self, question: Callable[[RedisMetadata], Awaitable[T]]) -> T:
        async def asking() -> T:
            store = RedisMetadata(self.metadata_url, timeout_s=2.0)
            try:
                return await question(store)
            finally:
                await store.close()

        return asyncio.run(asking())

    def workers(self) -> dict[str, WorkerInfo]:
        return {w.worker_id: w for w in self.ask_metadata(lambda store: store.workers())}

    def segment_owner(self, known: set[str]) -> str:
        """Which worker made the segment file that is not among `known`."""
        (fresh,) = self.segment_files() - known
        match = re.match(r"([a-z]+-\d+)\.", fresh)
        assert match, fresh
        return match[1]

    def segment_files(self) -> set[str]:
        return {p.name for p in self.kv_dir.rglob("*.kv")}

    @property
    def kv_dir(self) -> Path:
        return state.kv_dir(self.config.kv.dir, self.config.kv.budget_bytes)

    def wait_back(self, worker_id: str, old_epoch: int, within_s: float) -> WorkerInfo:
        """Wait until the worker is registered under a newer epoch and the gateway uses it."""
        newer = eventually(
            lambda: (w := self.workers().get(worker_id)) is not None and w.epoch > old_epoch and w, within_s, f"{worker_id} back"
        )
        with self.client() as client:
            eventually(
                lambda: any(
                    w.info.worker_id == worker_id and w.info.epoch == newer.epoch and w.state == "serving"
                    for w in client.status().workers
                ),
                10,
                f"the gateway uses {worker_id} again",
            )
        return newer

    def is_idle(self) -> bool:
        """No request in the gateway, none in a worker."""
        with self.client() as client:
            status = client.status()
        return status.inflight == status.queued == 0 and all(w.running == w.waiting == 0 for w in status.workers)

    def terminate(self) -> None:
        os.kill(self.state.pid, signal.SIGTERM)

    def exit_code(self, within_s: float) -> int | None:
        """The supervisor's exit code once it has ended."""
        pid = self.state.pid
        eventually(lambda: launch.exit_code(pid) is not None, within_s, "the supervisor ends")
        return launch.exit_code(pid)

    def stop(self) -> None:
        down(60)

    def processes(self) -> list[int]:
        """Every live process of this deployment."""
        from winnow.orchestration.placer import read_children

        found = processes.in_session(self.state.pid, self.state.pid_started)
        for child in read_children().values():
            found += processes.in_session(child["pid"], child["started"])
        return found


def eventually(check: Callable[[], T], within_s: float, what: str, ready: Callable[[T], object] = lambda v: v) -> T:
    """Ask until the answer is true; returns it."""
    ends = time.monotonic() + within_s
    while not ready(answer := check()):
        assert time.monotonic() < ends, f"not within {within_s} s: {what}"
        time.sleep(0.05)  # another process's state: there is nothing to wait on
    return answer


def run_with(client: Client, on_chunk: Callable[[Chunk], None], prompt: str = LONG_PROMPT, **options: object) -> Generation:
    """A generation whose pieces are shown to `on_chunk` as they come."""
    text, tokens, last = "", [], Chunk()
    for last in client.generate(prompt, **options):  # type: ignore[arg-type]
        on_chunk(last)
        text += last.text
        tokens += last.token_ids
    assert last.usage is not None and last.finish_reason
    return Generation(text, last.finish_reason, last.usage, tuple(tokens))


class Load:
    """Threads that send the same request over and over until the block ends; results and errors are kept."""

    def __init__(self, deployment: Deployment, n_threads: int, **options: object) -> None:
        self.results: list[Generation] = []
        self.errors: list[BaseException] = []
        self._deployment = deployment
        self._n_threads = n_threads
        self._options = options
        self._ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Load]:
        with ThreadPoolExecutor(self._n_threads) as pool:
            futures: list[Future[None]] = [pool.submit(self._work) for _ in range(self._n_threads)]
            try:
                eventually(lambda: self.results, 30, "the load gets its first answer")
                yield self
            finally:
                self._ended.set()
        for future in futures:
            future.result()

    def _work(self) -> None:
        with self._deployment.client() as client:
            while not self._ended.is_set():
                try:
                    self.results.append(client.complete(LONG_PROMPT, **self._options))
                except Exception as error:  # judged by the test
                    self.errors.append(error)
                    self._ended.wait(0.2)


def listening_addresses(pid: int) -> set[str]:
    """Addresses of a process's listening TCP sockets, in the kernel's hexadecimal."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(fd)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found
