"""What the decode engine is asked to do and what it answers: jobs and events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from winnow.index.segment import KVSegment
from winnow.types import MethodChoice, Sampling
from winnow.workers.decode.base import DecodeMethod, RetrievalSession
from winnow.workers.job import Failed, JobHandle


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


Event = Tokens | Failed
OnEvent = Callable[[Event], None]
Handle = JobHandle[Event]
