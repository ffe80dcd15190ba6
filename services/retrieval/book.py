"""The indexes one process holds: who uses them, and when an abandoned one goes."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from prometheus_client import Counter

from winnow import telemetry
from winnow.errors import CorruptBlock, UnknownName
from winnow.types import SegmentHandle
from winnow.workers.decode.local_retrieval import LocalRetrieval, SegmentIndex

EXPIRED = Counter("winnow_retrieval_expired_indexes_total", "Indexes closed because nobody used them any more")
log = telemetry.get_logger("retrieval")


@dataclass(eq=False)
class OpenIndex:
    """One index.

    Attributes:
        held: what it keeps alive (a mapped or copied segment); closed with it.
        pool: its own thread, because `SegmentIndex.attend` is not reentrant.
        users: streams and sessions attached now.
        last_used: by the book's clock.
        mean_s: running mean of one search, seconds; decides where the next one runs.
    """

    index_id: str
    index: SegmentIndex
    handle: SegmentHandle
    held: AsyncExitStack
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "winnow-search"))
    users: int = 0
    last_used: float = 0.0
    mean_s: float = 0.0


class IndexBook:
    """Ledger of open indexes. Used inside the event loop only, but for `detach`.

    Args:
        idle_s: an index nobody is attached to for this long is closed: its gateway died before it could close it.
    """

    def __init__(self, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._open: dict[str, OpenIndex] = {}
        self._counting = threading.Lock()  # a local session ends in the engine's thread

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, index_id: object) -> bool:
        return index_id in self._open

    def add(self, index: SegmentIndex, handle: SegmentHandle, held: AsyncExitStack) -> OpenIndex:
        """Enter a built index under a fresh id. The book closes `held` from now on."""
        entry = OpenIndex(secrets.token_hex(12), index, handle, held, last_used=self._clock())
        self._open[entry.index_id] = entry
        return entry

    def get(self, index_id: str) -> OpenIndex:
        """Raises UnknownName: closed, expired, or never opened here."""
        entry = self._open.get(index_id)
        if entry is None:
            raise UnknownName("index_id: no such index here; it was closed, or nobody used it for too long; open it again")
        return entry

    @contextlib.contextmanager
    def attached(self, index_id: str) -> Iterator[OpenIndex]:
        """Use an index while the block runs; it does not expire meanwhile. Raises UnknownName."""
        entry = self._attach(index_id)
        try:
            yield entry
        finally:
            self.detach(entry)

    def session(self, index_id: str) -> LocalSession:
        """A session for a decode engine in this process. Raises UnknownName."""
        return LocalSession(self, self._attach(index_id))

    def _attach(self, index_id: str) -> OpenIndex:
        entry = self.get(index_id)
        with self._counting:
            entry.users += 1
        return entry

    def detach(self, entry: OpenIndex) -> None:
        """The end of a `session`; from any thread."""
        with self._counting:
            entry.users -= 1
            entry.last_used = self._clock()

    async def close(self, index_id: str) -> None:
        """Free an index; closing it twice does nothing. A search that runs is finished on the bytes it has."""
        entry = self._open.pop(index_id, None)
        if entry is not None:
            entry.pool.shutdown(wait=False)
            await entry.held.aclose()

    async def sweep(self) -> int:
        """Close indexes that nobody used for `idle_s`; returns how many."""
        now = self._clock()
        idle = [e for e in self._open.values() if not e.users and now - e.last_used >= self._idle_s]
        for entry in idle:
            log.warning("index abandoned, closing it", segment_id=entry.handle.segment_id, owner=entry.handle.owner)
            EXPIRED.inc()
            await self.close(entry.index_id)
        return len(idle)

    async def close_all(self) -> None:
        for index_id in list(self._open):
            await self.close(index_id)

    def check(self) -> None:
        """Raises CorruptBlock: a count is off. For tests."""
        bad = [e.index_id for e in self._open.values() if e.users < 0]
        if bad:
            raise CorruptBlock(f"index book: users below zero for {', '.join(bad)}")


class LocalSession(LocalRetrieval):
    """A `LocalRetrieval` that tells the book when it ends. Searches run in the index's thread, beside the caller's work."""

    def __init__(self, book: IndexBook, entry: OpenIndex) -> None:
        super().__init__(entry.index, entry.pool)
        self._book = book
        self._entry: OpenIndex | None = entry

    def close(self) -> None:
        super().close()
        entry, self._entry = self._entry, None
        if entry is not None:
            self._book.detach(entry)
