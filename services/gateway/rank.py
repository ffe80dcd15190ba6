"""Ranking: one task on one prefill worker, checked to hold every document once before it goes out (promise R26)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing

from winnow import telemetry
from winnow.errors import Unsupported
from winnow.proto.v1 import common_pb2, internal_pb2, internal_pb2_grpc, winnow_pb2
from winnow.services.common.links import Links
from winnow.services.gateway.calls import Emit
from winnow.services.gateway.hops import Hops
from winnow.services.gateway.router import Worker
from winnow.services.gateway.validation import Chosen
from winnow.types import Document
from winnow.wire import documents_to_proto, method_to_proto


class RankRunner:
    """Runs rank requests. Holds nothing between them."""

    def __init__(self, hops: Hops, links: Links) -> None:
        self._hops = hops
        self._links = links

    async def run(
        self,
        request: winnow_pb2.RankRequest,
        request_id: str,
        tenant: str,
        documents: Sequence[Document],
        ranker: Chosen,
        emit: Emit[winnow_pb2.RankEvent],
    ) -> None:
        """Rank and emit progress and one ranking; the first event carries the request's id."""
        task = internal_pb2.RankTask(
            request_id=request_id,
            query=request.query,
            documents=documents_to_proto(documents),
            ranker=method_to_proto(ranker.choice),
            tenant=tenant,
        )
        is_first = True

        async def on(worker: Worker) -> common_pb2.Ranking:
            nonlocal is_first
            if is_first:  # only now that there is a worker: a client may try a call again that got no event
                is_first = False
                await emit(winnow_pb2.RankEvent(request_id=request_id, progress=_progress(0, len(documents))))
            stub = internal_pb2_grpc.PrefillStub(self._links.channel(worker.info.address))
            async with aclosing(self._hops.stream(worker, stub.Rank(task, **self._links.options()))) as events:
                async for event in events:
                    if event.WhichOneof("event") == "ranking":
                        return event.ranking  # type: ignore[no-any-return]
                    await emit(winnow_pb2.RankEvent(progress=_progress(event.progress.done, event.progress.total)))
            raise RuntimeError("the rank stream ended without a ranking")

        with telemetry.span("rank", documents=len(documents)):
            ranking = await self._hops.retried("prefill", on, affinity=f"{tenant}/rank/{ranker.choice.spec}")
        check_ranking(ranking, documents)
        if ranking.fallback_used:
            if request.strict:
                raise Unsupported(
                    f"ranker: only {ranking.fallback_used} was possible and strict forbids a fallback; leave strict out"
                )
            telemetry.FALLBACKS.labels(slot="ranker").inc()
        if request.top_n:
            del ranking.items[request.top_n :]
        await emit(winnow_pb2.RankEvent(ranking=ranking))


def check_ranking(ranking: common_pb2.Ranking, documents: Sequence[Document]) -> None:
    """A worker's ranking holds each document once, best first, without NaN; anything else is our bug and never goes out."""
    ids = [item.doc_id for item in ranking.items]
    if sorted(ids) != sorted(d.doc_id for d in documents):
        raise RuntimeError("the ranking does not hold every document exactly once")
    scores = [item.score for item in ranking.items]
    if any(math.isnan(s) for s in scores) or scores != sorted(scores, reverse=True):
        raise RuntimeError("the ranking's scores are not in descending order")


def _progress(done: int, total: int) -> common_pb2.Progress:
    return common_pb2.Progress(stage="rank", done=done, total=total)
