"""Every call has a deadline: the server's default if the caller sets none, never more than the maximum, and each hop
gets what is left less a margin (promise R5). The server enforces it itself, so a caller that sets none ends as well."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass

from winnow.config import GatewayConfig
from winnow.errors import DeadlineExceeded

# gRPC rounds a deadline up on the wire (9.95 s arrive as more than 10), so hops state the exact time beside it.
TIMEOUT_KEY = "winnow-timeout-ms"

_deadline: ContextVar[float | None] = ContextVar("winnow_deadline", default=None)


@dataclass(frozen=True)
class DeadlineRule:
    """Seconds: `default_s` for calls without a deadline, `max_s` the longest, `margin_s` taken off at each hop."""

    default_s: float = 300.0
    max_s: float = 3600.0
    margin_s: float = 0.05

    @classmethod
    def from_config(cls, config: GatewayConfig) -> DeadlineRule:
        return cls(config.default_deadline_s, config.max_deadline_s, config.hop_margin_s)

    def budget(self, given_s: float | None, stated_ms: str = "") -> float:
        """Seconds this call may take.

        Args:
            given_s: what is left of the caller's gRPC deadline, None = none set.
            stated_ms: value of TIMEOUT_KEY in the call's metadata; it can only shorten the time.
        """
        wanted = self.default_s if given_s is None or math.isnan(given_s) else given_s
        if stated_ms.isdecimal() and len(stated_ms) < 12:
            wanted = min(wanted, int(stated_ms) / 1000)
        return min(wanted, self.max_s)


def remaining() -> float | None:
    """Seconds left for the current call, None outside of one; never negative."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def next_hop(margin_s: float) -> float | None:
    """Timeout for a call made on behalf of the current one.

    Raises:
        DeadlineExceeded: nothing is left after the margin.
    """
    left = remaining()
    if left is None:
        return None
    if left <= margin_s:
        raise DeadlineExceeded(f"deadline: {left:.3f} s left, less than the {margin_s} s a hop keeps back; allow more time")
    return left - margin_s


@contextlib.asynccontextmanager
async def limit(budget_s: float) -> AsyncIterator[None]:
    """Run a block within budget_s seconds of the current task.

    Raises:
        DeadlineExceeded: the time is over; what ran in the block was cancelled.
    """
    if budget_s <= 0:
        raise DeadlineExceeded("deadline: already over when the call arrived; allow more time")
    token = _deadline.set(time.monotonic() + budget_s)
    try:
        async with asyncio.timeout(budget_s) as scope:
            yield
    except TimeoutError:
        if scope.expired():
            raise DeadlineExceeded(f"deadline: the {budget_s:.3g} s of this call are over; allow more time") from None
        raise
    finally:
        _deadline.reset(token)
