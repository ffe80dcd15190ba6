"""Threads and the loop: nothing is lost or doubled, progress is bounded, leaving waits until the thread is done."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from winnow.errors import InvalidRequest
from winnow.services.bridge import Bridge, in_thread, running

pytestmark = pytest.mark.slow


class Job:
    """Ends its bridge in a thread of its own, once cancelled and allowed to."""

    def __init__(self, bridge: Bridge[int]) -> None:
        self.bridge = bridge
        self.may_end = threading.Event()
        self.cancels = 0

    def cancel(self) -> None:
        self.cancels += 1
        threading.Thread(target=self._end).start()

    def _end(self) -> None:
        self.may_end.wait(10)
        self.bridge.put(-1)


async def test_a_slow_reader_gets_every_token_and_only_the_latest_progress() -> None:
    bridge: Bridge[tuple[str, int]] = Bridge(lambda e: e[0] == "end", lambda e: e[0] == "progress")
    for event in [("progress", i) for i in range(1000)] + [("token", i) for i in range(50)] + [("end", 0)]:
        bridge.put(event)

    got = [event async for batch in bridge.batches() for event in batch]

    assert got == [("progress", 999), *[("token", i) for i in range(50)], ("end", 0)]


async def test_leaving_waits_for_the_thread_however_often_it_is_cancelled() -> None:
    bridge: Bridge[int] = Bridge(lambda e: e < 0)
    job = Job(bridge)
    entered, left = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        try:
            async with running(bridge, lambda put: job):
                entered.set()
                await asyncio.Event().wait()
        finally:
            left.set()

    task = asyncio.create_task(call())
    await entered.wait()
    for _ in range(3):  # a deadline and a caller that leaves come as two cancels
        task.cancel()
        await asyncio.sleep(0)
    assert not left.is_set()

    job.may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert bridge.last == -1
    assert job.cancels == 1


async def test_work_in_a_pool_reports_returns_and_raises() -> None:
    seen: list[tuple[int, int]] = []

    async def report(done: int, total: int) -> None:
        seen.append((done, total))

    with ThreadPoolExecutor(1) as pool:
        step = threading.Event()

        def work(on_progress: object, is_cancelled: object) -> str:
            on_progress(1, 2)  # type: ignore[operator]
            step.wait(10)
            return "done"

        task = asyncio.create_task(in_thread(pool, work, report))
        while not seen:
            await asyncio.sleep(0)
        step.set()
        assert (await task, seen) == ("done", [(1, 2)])

        def fail(on_progress: object, is_cancelled: object) -> str:
            raise InvalidRequest("x: wrong")

        with pytest.raises(InvalidRequest, match="x: wrong"):
            await in_thread(pool, fail, report)


async def test_cancelling_work_in_a_pool_waits_for_its_thread() -> None:
    started, is_out = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work(on_progress: object, is_cancelled: object) -> None:
        loop.call_soon_threadsafe(started.set)
        stop = threading.Event()
        while not is_cancelled():  # type: ignore[operator]
            stop.wait(0.001)
        stop.wait(0.05)  # the last head of an index takes its time
        is_out.set()

    async def report(done: int, total: int) -> None:
        raise AssertionError("no progress was made")

    with ThreadPoolExecutor(1) as pool:
        task = asyncio.create_task(in_thread(pool, work, report))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_out.is_set()
