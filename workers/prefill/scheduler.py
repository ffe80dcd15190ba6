"""Which job runs the next step: the shortest remaining work first, with a fixed share for whoever waited longest.

Work is counted in token-layers (tokens of a step times layers it runs), not in seconds, so that the order of steps is the
same on every machine. Attention's growth with the prefix is left out: it would not change who is shorter.

Own design. Shortest-remaining-first alone keeps short prompts moving (promise R2) but starves a long one under a steady
load of short ones; so out of every `1 / FAIR_SHARE` units of work one goes to the job that has gone longest without a step,
whatever is left of it. A short job waits for at most one such step for every `1 / FAIR_SHARE` of its size run before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

FAIR_SHARE = 1 / 8

T = TypeVar("T")


@dataclass(eq=False)
class Entry(Generic[T]):
    """A job in the schedule.

    Attributes:
        remaining: work left, token-layers; the owner lowers it after each step.
        last_ran: the scheduler's work clock when the job last ran, or entered.
        order: entry number; breaks ties.
        step: work of its last step.
    """

    item: T
    remaining: int
    last_ran: int = 0
    order: int = 0
    step: int = 0


class Scheduler(Generic[T]):
    """Not thread-safe: the engine's thread, or a lock, owns it."""

    def __init__(self) -> None:
        self._entries: dict[T, Entry[T]] = {}
        self._clock = 0
        self._credit = 0.0  # work owed to whoever waits longest: a share of what the shorter jobs did meanwhile
        self._entered = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def items(self) -> list[T]:
        """Jobs in the order they entered."""
        return list(self._entries)

    def add(self, item: T, work: int) -> None:
        self._entered += 1
        self._entries[item] = Entry(item, work, self._clock, self._entered)

    def remove(self, item: T) -> None:
        self._entries.pop(item, None)
        if not self._entries:
            self._credit = 0.0

    def pick(self, without: Iterable[T] = ()) -> T | None:
        """The job to run next, or None. Mutates nothing: `ran` books the work."""
        barred = set(without)
        entries = [e for e in self._entries.values() if e.item not in barred]
        if not entries:
            return None
        shortest = min(entries, key=_by_length)
        waiting = min(entries, key=lambda e: (e.last_ran, e.order))
        if waiting.last_ran < shortest.last_ran and self._credit >= max(1, waiting.step):
            return waiting.item
        return shortest.item

    def ran(self, item: T, work: int, remaining: int) -> None:
        """Book a step of `work` token-layers; the job has `remaining` left."""
        entry = self._entries[item]
        if len(self._entries) > 1:
            if entry is min(self._entries.values(), key=_by_length):
                # At most one step's worth is ever owed: a quiet past gives no right to a burst later.
                most = max(work, *(e.step for e in self._entries.values()))
                self._credit = min(self._credit + FAIR_SHARE * work, most)
            else:
                self._credit -= work
        self._clock += work
        entry.last_ran, entry.step = self._clock, work
        entry.remaining = remaining


def _by_length(entry: Entry[T]) -> tuple[int, int]:
    return entry.remaining, entry.order
