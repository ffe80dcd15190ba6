"""R1 under load: a burst of far more requests than there are places costs refusals, not memory, and leaves nothing behind."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from winnow.config import GatewayConfig
from winnow.errors import Overloaded

from .deployment import LONG_PROMPT, Deployment, deployment_config, eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]
PLACES, QUEUE, STREAMS = 4, 4, 64
ASK = {"max_tokens": 4, "no_cache": True, "deadline_s": 60.0}


@pytest.fixture
def small(own_home: Path, small_model: Path) -> Iterator[Deployment]:
    """One process with four places and a queue of four."""
    gateway = GatewayConfig(port=0, max_inflight=PLACES, max_queue=QUEUE)
    running = Deployment.start(deployment_config(small_model).model_copy(update={"gateway": gateway}), single=True)
    yield running
    running.stop()


def memory_bytes(pids: list[int]) -> int:
    """What the processes hold, each shared page counted once in all (proportional set size)."""
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


@contextmanager
def peak_memory(pids: list[int]) -> Iterator[list[int]]:
    """A list whose only entry is the peak while the block runs."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], memory_bytes(pids))
            ended.wait(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def many(deployment: Deployment, threads: int, each: int, seen: Callable[[float, int | None], None]) -> None:
    """`threads` clients send `each` requests in a row; `seen` gets seconds, and for a refusal its time to come back in ms."""

    def work() -> None:
        with deployment.client() as client:
            for _ in range(each):
                began, refused = time.monotonic(), None
                try:
                    client.complete(LONG_PROMPT, **ASK)
                except Overloaded as error:
                    refused = error.retry_after_ms
                seen(time.monotonic() - began, refused)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result(timeout=120)


@pytest.mark.promise("R1")
def test_a_burst_of_64_streams_is_refused_without_growing_and_service_is_normal_after_it(small: Deployment) -> None:
    pids = small.processes()
    calm: list[float] = []
    many(small, PLACES + QUEUE, 1, lambda *_: None)  # allocators and caches reach their working size
    with peak_memory(pids) as normal:
        many(small, PLACES + QUEUE, 3, lambda seconds, _: calm.append(seconds))
    assert len(calm) == 3 * (PLACES + QUEUE)

    answered, refused = [], []
    with peak_memory(pids) as burst:
        many(small, STREAMS, 10, lambda seconds, back: (answered if back is None else refused).append((seconds, back)))
    assert len(answered) + len(refused) == 10 * STREAMS
    assert len(refused) > 5 * STREAMS and len(answered) >= PLACES + QUEUE
    assert all(back is not None and 100 <= back <= 30_000 for _, back in refused)
    assert burst[0] <= 1.10 * normal[0], f"{burst[0] >> 20} MiB in the burst, {normal[0] >> 20} MiB at the limit"

    eventually(small.is_idle, 10, "the burst is over")
    after: list[float] = []
    many(small, PLACES + QUEUE, 1, lambda seconds, _: after.append(seconds))
    assert statistics.median(after) <= 2 * statistics.median(calm)
