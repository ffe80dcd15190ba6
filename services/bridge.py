"""From a working thread into the event loop: events of an engine's job, and work that runs in a pool.

A thread never waits for a slow reader, so what it emits is kept in bounded form: of progress only the latest, of tokens at
most as many as the job may generate. Leaving on any way cancels the work and waits until the thread is done with it, so
that what the work used (a mapping, a slot) can be freed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import Generic, Protocol, TypeVar

E = TypeVar("E")
R = TypeVar("R")
Report = Callable[[int, int], Awaitable[None]]
OnProgress = Callable[[int, int], None]
IsCancelled = Callable[[], bool]


class Cancellable(Protocol):
    """An engine's handle on a job."""

    def cancel(self) -> None: ...


class Bridge(Generic[E]):
    """Events of one job. `put` is called by the engine's thread, everything else in the loop.

    Args:
        is_last: an event after which no other comes.
        is_replaced: an event that a newer one of its kind makes worthless (progress).

    Attributes:
        last: the last event, once it came.
    """

    def __init__(self, is_last: Callable[[E], bool], is_replaced: Callable[[E], bool] = lambda _: False) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_last = is_last
        self._is_replaced = is_replaced
        self._items: deque[E] = deque()
        self._some = asyncio.Event()
        self._ended = asyncio.Event()
        self.last: E | None = None

    def put(self, event: E) -> None:
        """Hand an event over. Raises RuntimeError when the loop is gone; the engine then ends the job."""
        self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: E) -> None:
        if self._items and self._is_replaced(self._items[-1]) and self._is_replaced(event):
            self._items.pop()
        self._items.append(event)
        if self._is_last(event):
            self.last = event
            self._ended.set()
        self._some.set()

    async def batches(self) -> AsyncIterator[list[E]]:
        """What came since the last time, never empty; ends after the last event."""
        while True:
            await self._some.wait()
            self._some.clear()
            batch = list(self._items)
            self._items.clear()
            if batch:
                yield batch
            if self.last is not None and not self._items:
                return

    async def wait_ended(self) -> None:
        await self._ended.wait()


@contextlib.asynccontextmanager
async def running(bridge: Bridge[E], submit: Callable[[Callable[[E], None]], Cancellable]) -> AsyncIterator[Bridge[E]]:
    """Submit a job and cancel it on the way out; the block ends when the engine has let go of it.

    Raises:
        what `submit` raises.
    """
    job = submit(bridge.put)
    try:
        yield bridge
    finally:
        job.cancel()
        await settled(bridge.wait_ended())


async def settled(work: Awaitable[object]) -> None:
    """Wait for a clean-up to end, however often this task is cancelled meanwhile (a deadline and a cancel come together).

    Raises:
        CancelledError: after the work ended, when a cancel came while waiting.
    """
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


async def in_thread(pool: Executor, work: Callable[[OnProgress, IsCancelled], R], report: Report) -> R:
    """Run `work(on_progress, is_cancelled)` in a pool and report its progress from the loop.

    Cancelling this coroutine makes `is_cancelled` true and waits for the thread; its outcome is then dropped.
    """
    loop = asyncio.get_running_loop()
    changed, stop = asyncio.Event(), threading.Event()
    latest: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        latest[:] = [(done, total)]
        changed.set()

    def on_progress(done: int, total: int) -> None:
        loop.call_soon_threadsafe(note, done, total)

    job = pool.submit(work, on_progress, stop.is_set)
    future = asyncio.wrap_future(job)
    future.add_done_callback(lambda _: changed.set())
    try:
        while not future.done():
            await changed.wait()
            changed.clear()
            if latest and not future.done():
                await report(*latest.pop())
        return future.result()
    finally:
        stop.set()
        if not job.cancel() and not job.done():  # running: cancelling `future` would only stop the waiting for it
            await settled(asyncio.wait([future]))
        if future.done() and not future.cancelled():
            future.exception()  # looked at, so that nothing is reported as never retrieved
