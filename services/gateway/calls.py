"""Running requests: who they are, how one is ended from outside, and the bounded buffer between work and a slow reader."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Generic, TypeVar

from winnow.errors import Conflict, Draining, UnknownName, WinnowError

T = TypeVar("T")
Emit = Callable[[T], Awaitable[None]]


class Call:
    """One running request. `end` stops its work with a reason, which becomes its status."""

    def __init__(self, tenant: str, request_id: str) -> None:
        self.tenant = tenant
        self.request_id = request_id
        self.reason: WinnowError | None = None
        self._task: asyncio.Task[None] | None = None

    def end(self, reason: WinnowError) -> None:
        """Stop the work; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            if self._task is not None:
                self._task.cancel()

    async def events(self, work: Callable[[Emit[T]], Awaitable[None]], buffer_size: int) -> AsyncIterator[T]:
        """Run `work` beside the reader and yield what it emits, in order.

        A reader that is slow fills the buffer, then `emit` waits, so a stalled client costs one buffer. Leaving the
        iteration on any way stops the work before it returns.

        Raises:
            what `work` raised; the reason, when the call was ended from outside (what was still buffered is dropped).
        """
        buffer: _Buffer[T] = _Buffer(buffer_size)

        async def run() -> None:
            try:
                await work(buffer.put)
            finally:
                buffer.close()

        if self.reason is not None:
            raise self.reason
        task = self._task = asyncio.create_task(run())
        task.add_done_callback(lambda _: buffer.close())  # a task cancelled before its first step never gets to its finally
        try:
            async for item in buffer:
                yield item
                if self.reason is not None:
                    break
            await asyncio.wait([task])
            if self.reason is not None:
                raise self.reason
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # looked at, so that nothing is reported as never retrieved


class _Buffer(Generic[T]):
    """A queue of bounded length that can be closed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._room = asyncio.Event()
        self._data = asyncio.Event()
        self._closed = False

    async def put(self, item: T) -> None:
        while len(self._items) >= self._size:
            self._room.clear()
            await self._room.wait()
        self._items.append(item)
        self._data.set()

    def close(self) -> None:
        self._closed = True
        self._data.set()

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            while self._items:
                item = self._items.popleft()
                self._room.set()
                yield item
            if self._closed:
                return
            self._data.clear()
            await self._data.wait()


class Calls:
    """The running requests of a gateway, by tenant and id."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], Call] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._running)

    def refuse_if_draining(self) -> None:
        """Raises Draining once the server is shutting down."""
        if self.is_draining:
            raise Draining("the server is shutting down and takes no new requests; try another one, or later")

    @contextlib.contextmanager
    def running(self, tenant: str, request_id: str) -> Iterator[Call]:
        """Count a request as running while the block runs.

        Raises:
            Draining: the server is shutting down.
            Conflict: the tenant has a running request of this id.
        """
        self.refuse_if_draining()
        key = (tenant, request_id)
        if key in self._running:
            raise Conflict(f"request_id: {request_id} is in use by a running request; choose another or leave it empty")
        call = self._running[key] = Call(tenant, request_id)
        self._empty.clear()
        try:
            yield call
        finally:
            del self._running[key]
            if not self._running:
                self._empty.set()

    def find(self, tenant: str, request_id: str) -> Call:
        """Raises UnknownName: not running, or another tenant's."""
        call = self._running.get((tenant, request_id))
        if call is None:
            raise UnknownName(f"request_id: no running request {request_id!r:.70}; it may have finished")
        return call

    async def drain(self, grace_s: float) -> None:
        """Take no new requests, let the running ones finish for grace_s seconds, end the rest with UNAVAILABLE."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        for call in list(self._running.values()):
            call.end(Draining("the server shut down before this request was finished; try again"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await self._empty.wait()
