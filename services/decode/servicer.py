"""Decode service: gets hold of the segment, opens the retrieval session, streams tokens. A thin skin over the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc.aio

from winnow.config import DecodeConfig
from winnow.errors import Conflict
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.bridge import Bridge, running
from winnow.services.prefill.servicer import check_tokens, chosen, note_request
from winnow.services.retrieval.session import SessionOpener
from winnow.services.transfer import SegmentReader
from winnow.services.worker import Gate
from winnow.wire import handle_from_proto, sampling_from_proto
from winnow.workers.decode.base import DecodeMethod, RetrievalSession, decode_methods
from winnow.workers.decode.job import DecodeJob, Event, Failed, Tokens
from winnow.workers.decode.worker import DecodeEngine


class DecodeServicer(internal_pb2_grpc.DecodeServicer):
    """One call is one sequence. Cancelling a call frees its slot before the next step, then its segment and session."""

    def __init__(
        self, engine: DecodeEngine, reader: SegmentReader, sessions: SessionOpener, gate: Gate, config: DecodeConfig
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._sessions = sessions
        self._gate = gate
        self._config = config
        self._tails: set[str] = set()  # segments whose tail is being written here

    async def Decode(self, request: internal_pb2.DecodeRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """See internal.proto. A reader that falls behind gets several tokens in one event; nothing is dropped.

        Raises:
            Conflict: another call continues this segment.
            Otherwise as `SegmentReader.open` and `DecodeEngine.submit`, and the sequence's own error.
        """
        note_request(request.request_id)
        choice = chosen(request.method, self._config.method)
        method = decode_methods.create(choice.name, dict(choice.params))
        sampling = sampling_from_proto(request.sampling)
        check_tokens("last_token_id", [request.last_token_id], self._engine.model.spec.vocab_size)
        handle = handle_from_proto(request.segment)
        bridge: Bridge[Event] = Bridge(_is_last)
        with self._gate.work(), self._tail(handle.segment_id):
            async with self._reader.open(handle, request.owner_address, writable=True) as obtained:
                obtained.segment.truncate(max(handle.n_tokens, obtained.segment.n_tokens))  # what an attempt before left
                session = self._session(request, method, handle.n_tokens)
                job = DecodeJob(
                    request.request_id, obtained.segment, request.last_token_id, sampling, method, session, request.strict,
                    tuple(request.eos_token_ids),
                )  # fmt: skip

                def submit(put: object) -> object:
                    try:
                        return self._engine.submit(job, put)  # type: ignore[arg-type]
                    except BaseException:
                        if session is not None:
                            session.close()  # refused jobs leave it to us
                        raise

                n_sent = 0
                async with running(bridge, submit):  # type: ignore[arg-type]
                    async for batch in bridge.batches():
                        await context.write(_merged(batch, n_sent))
                        n_sent += 1

    @contextlib.contextmanager
    def _tail(self, segment_id: str) -> Iterator[None]:
        """One sequence writes behind a segment at a time. Raises Conflict."""
        if segment_id in self._tails:
            raise Conflict(f"segment {segment_id}: it is being continued already; prefill the prompt again for another sequence")
        self._tails.add(segment_id)
        try:
            yield
        finally:
            self._tails.discard(segment_id)

    def _session(self, request: internal_pb2.DecodeRequest, method: DecodeMethod, n_tokens: int) -> RetrievalSession | None:
        """What the method asked for over the sealed tokens, or None where it asked for nothing or no index could be opened."""
        wanted = method.index_spec(n_tokens)
        if wanted is None or not request.index_id:
            return None
        _, sink_tokens, recent_tokens = wanted
        return self._sessions.open(request.retrieval_address, request.index_id, sink_tokens, recent_tokens)


def _is_last(event: Event) -> bool:
    return isinstance(event, Failed) or bool(event.finish_reason)


def _merged(batch: list[Event], sequence: int) -> internal_pb2.DecodeEvent:
    """Events that came since the last write as one message. Raises the sequence's error when it ended with one."""
    merged = internal_pb2.DecodeEvent(sequence=sequence)
    for event in batch:
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Tokens)
        merged.token_ids.extend(event.token_ids)
        for pairs in event.logprobs:
            merged.logprobs.add(token_ids=[i for i, _ in pairs], logprobs=[p for _, p in pairs])
        merged.keys_read_share = event.keys_read_share
        if event.finish_reason:
            merged.finish_reason = event.finish_reason
            merged.fallback_used = event.fallback_used
    return merged
