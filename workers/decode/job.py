"""What the decode engine is asked to do and what it answers: jobs, events, and the handle that cancels one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from winnow.index.segment import KVSegment
from winnow.types import MethodChoice, Sampling
from winnow.workers.decode.base import DecodeMethod, RetrievalSession


@dataclass(frozen=True)
class DecodeJob:
    """Continue a segment token by token.

    Attributes:
        segment: KV of the prompt but its last token; the engine writes its tail. It stays the caller's: the engine never
            closes it, and touches it no more once the last event is delivered.
        last_token_id: the prompt's last token, fed first.
        method: an instance, a name with parameters, or None for the engine's default.
        retrieval: the opened index, where the method asked for one. The method's state closes it; a job that ends before
            it was admitted has it closed by the engine.
        strict: raise instead of falling back to exact attention.
        eos_token_ids: tokens that end the text.
    """

    request_id: str
    segment: KVSegment
    last_token_id: int
    sampling: Sampling = field(default_factory=Sampling)
    method: DecodeMethod | MethodChoice | None = None
    retrieval: RetrievalSession | None = None
    strict: bool = False
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """New tokens of a sequence.

    Attributes:
        sequence: from 0, without gaps.
        token_ids: usually one. An end-of-sequence token that ends the text is not among them.
        logprobs: per token, (token id, log-probability) pairs, the chosen token first; empty unless asked for.
        finish_reason: "" until the last event; then "eos", or "length" for max_tokens or a full segment.
        keys_read_share: of the sequence so far.
        fallback_used: only in the last event.
    """

    sequence: int
    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: str = ""
    keys_read_share: float = 1.0
    fallback_used: str = ""


@dataclass(frozen=True)
class Failed:
    """The sequence ended without a finish reason; it holds nothing any more. `error` is `Cancelled` after a cancel."""

    error: BaseException


Event = Tokens | Failed
OnEvent = Callable[[Event], None]


@dataclass(eq=False)
class JobHandle:
    """A submitted sequence. `finished` is set after its last event was delivered."""

    request_id: str
    on_event: OnEvent
    finished: threading.Event = field(default_factory=threading.Event)
    wake: Callable[[], None] = lambda: None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Free the sequence's slot before the next step. Safe from any thread, at any time, any number of times."""
        self._cancelled.set()
        self.wake()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()
