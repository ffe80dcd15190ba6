"""Bounded admission (promise R1): so many requests are worked on, so many wait in order, one more is refused at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from types import TracebackType

from winnow import telemetry
from winnow.errors import Overloaded

_FIRST_GUESS_S = 1.0  # length of a request before any has finished, for the retry hint


class Ticket:
    """A place in the gateway, counted from the moment it is made. Use it as a context manager."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._turn = asyncio.Event()
        self.entered = time.monotonic()
        self._started = 0.0

    @property
    def is_waiting(self) -> bool:
        return not self._turn.is_set()

    async def turn(self) -> None:
        """Wait for a place among those worked on, first come first served."""
        await self._turn.wait()

    def _start(self) -> None:
        self._started = time.monotonic()
        self._turn.set()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._admission._leave(self)


class Admission:
    """Counts requests. All of it runs in one event loop, so a check and its change are one step."""

    def __init__(self, max_inflight: int, max_queue: int) -> None:
        self.max_inflight = max_inflight
        self.max_queue = max_queue
        self._working: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self._typical_s = _FIRST_GUESS_S

    @property
    def inflight(self) -> int:
        return len(self._working)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def enter(self) -> Ticket:
        """Take a place.

        Raises:
            Overloaded: both the places and the queue are full; says when to come back.
        """
        ticket = Ticket(self)
        if len(self._working) < self.max_inflight:
            self._working.add(ticket)
            ticket._start()
        elif len(self._waiting) < self.max_queue:
            self._waiting.append(ticket)
        else:
            raise Overloaded(
                f"gateway: {self.max_inflight} requests are worked on and {self.max_queue} wait, which is all it takes "
                "(gateway.max_inflight, gateway.max_queue); try again later",
                retry_after_ms=self.retry_hint_ms(),
            )
        self._report()
        return ticket

    def retry_hint_ms(self) -> int:
        """When a place should be free, from the length of recent requests; between 0.1 and 30 s."""
        rounds = (len(self._waiting) + 1) / self.max_inflight
        return int(1000 * min(30.0, max(0.1, self._typical_s * rounds)))

    def check(self) -> None:
        """Verify the counts: nobody waits while there is room, no ticket is counted twice."""
        assert len(self._working) <= self.max_inflight and len(self._waiting) <= self.max_queue
        assert not self._waiting or len(self._working) == self.max_inflight
        assert not self._working.intersection(self._waiting)

    def _leave(self, ticket: Ticket) -> None:
        if ticket in self._working:
            self._working.remove(ticket)
            self._typical_s += 0.2 * (time.monotonic() - ticket._started - self._typical_s)
            while self._waiting and len(self._working) < self.max_inflight:
                following = self._waiting.popleft()
                self._working.add(following)
                following._start()
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        self._report()

    def _report(self) -> None:
        telemetry.INFLIGHT.set(len(self._working))
        telemetry.QUEUED.set(len(self._waiting))
