"""What both engines give back for a submitted job: a handle that cancels it, and the event of a job that failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from winnow.errors import Cancelled

E = TypeVar("E")


@dataclass(frozen=True)
class Failed:
    """The job ended without a result; it holds nothing any more. `error` is `Cancelled` after `JobHandle.cancel`."""

    error: BaseException

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """A panic in a library's native code is no `Exception`: raised again as it is, it would end a caller's thread or loop."""
        return cls(error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}"))


@dataclass(eq=False)
class JobHandle(Generic[E]):
    """A submitted job with events of type E. `finished` is set after its last event was delivered."""

    request_id: str
    on_event: Callable[[E], None]
    finished: threading.Event = field(default_factory=threading.Event)
    wake: Callable[[], None] = lambda: None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop the job before its next step. Safe from any thread, at any time, any number of times."""
        self._cancelled.set()
        self.wake()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def raise_if_cancelled(self) -> None:
        """Raises Cancelled."""
        if self.is_cancelled:
            raise Cancelled("the request was cancelled")
