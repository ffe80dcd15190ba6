"""Prefill service: prompts into KV segments, documents into rankings. A thin skin over the engine of this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc.aio

from winnow import telemetry
from winnow.config import PrefillConfig, RankConfig
from winnow.errors import InvalidRequest
from winnow.index.store import SegmentStore
from winnow.proto.v1 import common_pb2, internal_pb2, internal_pb2_grpc
from winnow.registry import parse_spec
from winnow.services.bridge import Bridge, running
from winnow.services.worker import Gate
from winnow.types import MethodChoice
from winnow.wire import documents_from_proto, handle_to_proto, method_from_proto, ranking_to_proto
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.job import Event, Failed, PrefillJob, PrefillResult, Progress, RankJob, RankResult
from winnow.workers.prefill.worker import PrefillEngine
from winnow.workers.ranking.base import rankers


class PrefillServicer(internal_pb2_grpc.PrefillServicer):
    """Bridges calls to the engine. Cancelling a call stops its job at the next step and frees its segment."""

    def __init__(self, engine: PrefillEngine, store: SegmentStore, gate: Gate, config: PrefillConfig, rank: RankConfig) -> None:
        self._engine = engine
        self._store = store
        self._gate = gate
        self._config = config
        self._rank = rank

    async def Prefill(self, request: internal_pb2.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """See internal.proto. Raises what the engine raises, and the job's own error."""
        note_request(request.request_id)
        choice = chosen(request.method, self._config.method)
        method = prefill_methods.create(choice.name, dict(choice.params))
        check_tokens("token_ids", request.token_ids, self._engine.model.spec.vocab_size)
        job = PrefillJob(
            request.request_id, list(request.token_ids), request.tail_tokens, method,
            request.no_cache, request.context_tokens, request.tenant, request.query_sample,
        )  # fmt: skip
        bridge: Bridge[Event] = Bridge(_is_last, _is_progress)
        handed_over = False
        try:
            with self._gate.work():
                async with running(bridge, lambda put: self._engine.submit(job, put)):
                    async for batch in bridge.batches():
                        for event in batch:
                            handed_over = isinstance(event, PrefillResult)  # before the write: a reader may have it, then leave
                            if isinstance(event, PrefillResult):
                                _count(choice.name, event)
                            await context.write(_prefill_event(event))
        finally:
            if isinstance(bridge.last, PrefillResult) and not handed_over:
                self._store.release(bridge.last.segment)

    async def Rank(self, request: internal_pb2.RankTask, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """See internal.proto. Raises what the engine raises, and the job's own error."""
        note_request(request.request_id)
        choice = chosen(request.ranker, self._rank.method)
        job = RankJob(
            request.request_id, request.query, documents_from_proto(request.documents),
            rankers.create(choice.name, dict(choice.params)), request.tenant,
        )  # fmt: skip
        bridge: Bridge[Event] = Bridge(_is_last, _is_progress)
        with self._gate.work():
            async with running(bridge, lambda put: self._engine.submit_rank(job, put)):
                async for batch in bridge.batches():
                    for event in batch:
                        await context.write(_rank_event(event))


def note_request(request_id: str) -> None:
    """Go on under the request's own id in logs and errors, where it has a valid one."""
    if telemetry.is_request_id(request_id):
        telemetry.rename_request(request_id)


def chosen(message: common_pb2.Method, default: str) -> MethodChoice:
    """The method asked for, else the configured default. Raises InvalidRequest for parameters without a name."""
    if message.name:
        return method_from_proto(message)
    if message.params:
        raise InvalidRequest("method.params: given without method.name; name the method they belong to")
    return MethodChoice(*parse_spec(default))


def check_tokens(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for an id outside the vocabulary: it would read outside the embedding table."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise InvalidRequest(f"{field}: every id must be in [0, {vocab_size})")


def _count(method: str, result: PrefillResult) -> None:
    if result.recall is not None:
        telemetry.PREFILL_RECALL.labels(method=method).observe(result.recall)
    for reason, passes in result.passes.items():
        if passes:
            telemetry.PREFILL_PASSES.labels(method=method, reason=reason).inc(passes)


def _is_last(event: Event) -> bool:
    return not isinstance(event, Progress)


def _is_progress(event: Event) -> bool:
    return isinstance(event, Progress)


def _prefill_event(event: Event) -> internal_pb2.PrefillEvent:
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Progress):
        return internal_pb2.PrefillEvent(progress=common_pb2.Progress(stage="prefill", done=event.done, total=event.total))
    assert isinstance(event, PrefillResult)
    return internal_pb2.PrefillEvent(
        result=internal_pb2.PrefillResult(
            segment=handle_to_proto(event.segment), cached_tokens=event.cached_tokens, density=event.density,
            queue_s=event.queue_s, work_s=event.work_s, recall=event.recall, dense_share=event.dense_share,
        )
    )  # fmt: skip


def _rank_event(event: Event) -> internal_pb2.RankTaskEvent:
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Progress):
        return internal_pb2.RankTaskEvent(progress=common_pb2.Progress(stage="rank", done=event.done, total=event.total))
    assert isinstance(event, RankResult)
    return internal_pb2.RankTaskEvent(ranking=ranking_to_proto(replace(event.ranking, seconds=event.work_s)))
