"""What a decode stream has said so far: text, reason, usage, and the tail the cache may keep."""

from __future__ import annotations

import time
from dataclasses import replace

from winnow import telemetry
from winnow.errors import Unsupported
from winnow.proto.v1 import internal_pb2, winnow_pb2
from winnow.services.gateway.job import GenerateJob
from winnow.services.gateway.text import TextStream
from winnow.services.gateway.validation import Chosen
from winnow.types import Usage
from winnow.workers.model.tokenizer import Tokenizer


class Answer:
    """Built from the events of one decode stream, in order."""

    def __init__(self, job: GenerateJob, decode: Chosen, usage: Usage, tokenizer: Tokenizer, entered: float) -> None:
        self._job = job
        self._decode = decode
        self._usage = usage
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, job.sampling.stop)
        self._entered = entered
        self._first = self._last = 0.0
        self._ids: list[int] = []
        self._next = 0
        self._share = 1.0
        self.reason = ""

    def take(self, event: internal_pb2.DecodeEvent) -> winnow_pb2.Piece | None:
        """The piece to show for an event; None when it adds nothing. Sets `reason` at the end."""
        if event.sequence != self._next:
            raise RuntimeError(f"the decode stream skipped from {self._next} to {event.sequence}")
        self._next += 1
        if event.token_ids:
            self._last = time.monotonic()
            if not self._ids:
                self._first = self._last
                telemetry.TTFT.observe(self._first - self._entered)
        self._ids.extend(event.token_ids)
        self._share = event.keys_read_share or self._share
        text, stopped = self._text.push(event.token_ids)
        if not stopped and event.finish_reason:
            rest, stopped = self._text.finish()
            text += rest
        self.reason = "stop" if stopped else event.finish_reason
        if event.fallback_used:
            self._usage = note_fallback(self._usage, "decode", event.fallback_used, self._job.strict)
        if not (text or event.token_ids):
            return None
        return winnow_pb2.Piece(text=text, token_ids=event.token_ids, logprobs=[self._logprobs(e) for e in event.logprobs])

    def _logprobs(self, entry: internal_pb2.DecodeLogprobs) -> winnow_pb2.TopLogprobs:
        pairs = zip(entry.token_ids, entry.logprobs, strict=True)
        return winnow_pb2.TopLogprobs(
            items=[winnow_pb2.TokenLogprob(token_id=i, text=self._tokenizer.decode([i]), logprob=p) for i, p in pairs]
        )

    def tail(self) -> list[int]:
        """Tokens whose KV the segment's owner may keep for a later turn: only what exact attention wrote into its own bytes."""
        exact = self._decode.caps.exact and not self._usage.fallback_used
        if not (exact and self.reason in ("eos", "length")) or self._job.no_cache:
            return []
        fed = self._ids if self.reason == "eos" else self._ids[:-1]  # the last of a full answer was never fed back
        return [self._job.token_ids[-1], *fed]

    def usage(self) -> Usage:
        usage = replace(
            self._usage,
            completion_tokens=len(self._ids),
            ttft_s=self._first - self._entered if self._ids else 0.0,
            decode_s=self._last - self._first,
            keys_read_share=self._share,
        )
        telemetry.TOKENS.labels(kind="prompt").inc(usage.prompt_tokens)
        telemetry.TOKENS.labels(kind="cached").inc(usage.cached_tokens)
        telemetry.TOKENS.labels(kind="completion").inc(usage.completion_tokens)
        return usage


def note_fallback(usage: Usage, slot: str, used: str, strict: bool) -> Usage:
    """Record that something stepped in for a method; never silent, and refused under `strict` (promise R10)."""
    if not used:
        return usage
    if strict:
        raise Unsupported(f"{slot}: only {used} was possible and strict forbids a fallback; try later or leave strict out")
    telemetry.FALLBACKS.labels(slot=slot).inc()
    text = used if used.startswith(f"{slot}:") else f"{slot}: {used}"
    return replace(usage, fallback_used="; ".join(filter(None, (usage.fallback_used, text))))
