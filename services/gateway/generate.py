"""One generation, stage by stage: reduce, prefill, open an index, decode, stream text; see "life of a request" in the README."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace

from winnow import telemetry
from winnow.errors import Draining, Unsupported, WorkerLost
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc, winnow_pb2
from winnow.services.common.links import Links
from winnow.services.gateway.answer import Answer, note_fallback
from winnow.services.gateway.calls import Emit
from winnow.services.gateway.hops import Hops, Lease
from winnow.services.gateway.job import GenerateJob
from winnow.services.gateway.methods import exact_decode
from winnow.services.gateway.router import Router, Worker
from winnow.services.gateway.validation import Chosen
from winnow.types import Usage
from winnow.wire import method_to_proto, sampling_to_proto, usage_to_proto
from winnow.workers.model.tokenizer import Tokenizer

QUERY_SAMPLE = 256  # query vectors a layer and head kept for index training
AFFINITY_TOKENS = 256
log = telemetry.get_logger("gateway")


class Events:
    """Numbers a request's events without gaps; the first one carries the request's id."""

    def __init__(self, request_id: str, emit: Emit[winnow_pb2.GenerateEvent]) -> None:
        self._request_id = request_id
        self._emit = emit
        self._next = 0

    async def progress(self, stage: str, done: int, total: int) -> None:
        await self._send(winnow_pb2.GenerateEvent(progress={"stage": stage, "done": done, "total": total}))

    async def piece(self, piece: winnow_pb2.Piece) -> None:
        await self._send(winnow_pb2.GenerateEvent(piece=piece))

    async def finish(self, reason: str, usage: Usage) -> None:
        await self._send(winnow_pb2.GenerateEvent(finish=winnow_pb2.Finish(reason=reason, usage=usage_to_proto(usage))))

    async def _send(self, event: winnow_pb2.GenerateEvent) -> None:
        if self._next == 0:
            event.request_id = self._request_id
        event.sequence = self._next
        self._next += 1
        await self._emit(event)


class Generator:
    """Runs jobs. Holds nothing between them. `tails_mapped`: decode workers write tails into segments they map."""

    def __init__(self, hops: Hops, router: Router, links: Links, tokenizer: Tokenizer, tails_mapped: bool) -> None:
        self._tails_mapped = tails_mapped
        self._hops = hops
        self._router = router
        self._links = links
        self._tokenizer = tokenizer

    async def run(self, job: GenerateJob, events: Events, entered: float) -> None:
        """Work a job through and emit its events; `entered` is when it was admitted (monotonic seconds).

        Raises:
            WinnowError: the request's one terminal status.
        """
        usage = Usage(prompt_tokens=len(job.token_ids))
        if job.reducer is not None:
            job, usage = await self._reduce(job, job.reducer, usage, events)
        request = internal_pb2.PrefillRequest(
            request_id=job.request_id,
            token_ids=job.token_ids,
            tail_tokens=job.sampling.max_tokens,
            method=method_to_proto(job.prefill.choice),
            no_cache=job.no_cache,
            context_tokens=job.context_tokens,
            tenant=job.tenant,
            query_sample=QUERY_SAMPLE if job.decode.caps.needs else 0,
        )

        async def progress(done: int, total: int) -> None:
            await events.progress("prefill", done, total)

        affinity = f"{job.tenant}/{job.prefill.choice.spec}/{job.token_ids[:AFFINITY_TOKENS]}"
        lease, result = await self._hops.prefill(request, progress, affinity=affinity, prefer=job.prefer)
        async with self._hops.leased(lease):
            usage = replace(
                usage, cached_tokens=result.cached_tokens, prefill_density=result.density or 1.0,
                prefill_recall=result.recall if result.HasField("recall") else None, prefill_dense_share=result.dense_share,
            )  # fmt: skip
            await self._decode(job, lease, usage, events, entered)

    async def _reduce(self, job: GenerateJob, reducer: Chosen, usage: Usage, events: Events) -> tuple[GenerateJob, Usage]:
        """Let the draft worker shorten the prompt; without one the whole prompt is read, and the answer says so."""

        async def on(worker: Worker) -> list[int]:
            stub = internal_pb2_grpc.DraftStub(self._links.channel(worker.info.address))
            request = internal_pb2.ScoreRequest(
                request_id=job.request_id, token_ids=job.token_ids, scorer=method_to_proto(reducer.choice)
            )
            async with aclosing(self._hops.stream(worker, stub.Score(request, **self._links.options()))) as answers:
                async for event in answers:
                    if event.WhichOneof("event") == "result":
                        return list(event.result.kept)
                    await events.progress("draft", event.progress.done, event.progress.total)
            raise RuntimeError("the draft stream ended without a result")

        try:
            with telemetry.span("draft"):
                kept = await self._hops.retried("draft", on)
        except (WorkerLost, Draining):
            if job.strict:
                raise Unsupported(
                    f"reducer: {reducer.choice.name} needs a draft worker and none is serving; strict forbids reading "
                    "the whole prompt instead; try later or leave strict out"
                ) from None
            return job, note_fallback(usage, "reducer", "whole prompt (draft lost)", False)
        if kept != sorted(set(kept)) or not kept or not 0 <= kept[0] <= kept[-1] < len(job.token_ids):
            raise RuntimeError("the draft worker's answer is not a strictly ascending choice of prompt tokens")
        shorter = replace(job, token_ids=[job.token_ids[i] for i in kept])
        return shorter, replace(usage, prompt_tokens=len(kept), reduced_from_tokens=len(job.token_ids))

    @asynccontextmanager
    async def _index(self, job: GenerateJob, lease: Lease, events: Events) -> AsyncIterator[tuple[str, str]]:
        """(address, index id) of the index the decode method asks for; ("", "") when it asks for none.

        Raises:
            WorkerLost, Draining: no retrieval worker.
        """
        wanted = job.decode.instance.index_spec(lease.handle.n_tokens)
        if wanted is None:
            yield "", ""
            return
        spec, sink_tokens, recent_tokens = wanted
        worker = self._router.pick("retrieval", near=lease.worker.info)
        stub = internal_pb2_grpc.RetrievalStub(self._links.channel(worker.info.address))
        request = internal_pb2.OpenIndexRequest(
            request_id=job.request_id,
            segment=lease.handle,
            owner_address=lease.worker.info.address,
            index=spec,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        )
        index_id = ""
        with telemetry.span("index"), self._router.assigned(worker):
            call = stub.Open(request, **self._links.options())
            async with aclosing(self._hops.stream(worker, call, lease)) as answers:
                async for event in answers:
                    if event.WhichOneof("event") == "result":
                        index_id = event.result.index_id
                        break
                    await events.progress("index", event.progress.done, event.progress.total)
        if not index_id:
            raise RuntimeError("the retrieval stream ended without an index")

        async def close() -> None:
            stub = internal_pb2_grpc.RetrievalStub(self._links.channel(worker.info.address))
            await stub.Close(internal_pb2.CloseIndexRequest(index_id=index_id), metadata=self._links.metadata(), timeout=5.0)

        try:
            with self._router.assigned(worker):
                yield worker.info.address, index_id
        finally:
            self._hops.later(close())

    async def _decode(self, job: GenerateJob, lease: Lease, usage: Usage, events: Events, entered: float) -> None:
        async with AsyncExitStack() as stack:
            decode = job.decode
            try:
                where = await stack.enter_async_context(self._index(job, lease, events))
            except (WorkerLost, Draining):
                decode, usage = _without_retrieval(job, usage)
                where = ("", "")
            sampling = job.sampling
            if sampling.temperature > 0 and sampling.seed < 0:
                sampling = replace(sampling, seed=secrets.randbits(63))
            worker = self._router.pick("decode", near=lease.worker.info)
            request = internal_pb2.DecodeRequest(
                request_id=job.request_id,
                segment=lease.handle,
                owner_address=lease.worker.info.address,
                last_token_id=job.token_ids[-1],
                sampling=sampling_to_proto(sampling),
                method=method_to_proto(decode.choice),
                retrieval_address=where[0],
                index_id=where[1],
                strict=job.strict,
                eos_token_ids=self._tokenizer.eos_ids,
            )
            stack.enter_context(self._router.assigned(worker))
            stack.enter_context(telemetry.span("decode"))
            stub = internal_pb2_grpc.DecodeStub(self._links.channel(worker.info.address))
            call = stub.Decode(request, **self._links.options())
            answers = await stack.enter_async_context(aclosing(self._hops.stream(worker, call, lease)))
            answer = Answer(job, decode, usage, self._tokenizer, entered)
            async for event in answers:
                piece = answer.take(event)
                if piece is not None:
                    await events.piece(piece)
                if answer.reason:
                    break
            if not answer.reason:
                raise RuntimeError("the decode stream ended without a finish reason")
            if self._writes_in_place(worker, lease):
                lease.tail = answer.tail()
        await events.finish(answer.reason, answer.usage())

    def _writes_in_place(self, worker: Worker, lease: Lease) -> bool:
        """The decode worker wrote its tail into the owner's bytes, not into a copy of its own."""
        owner = lease.worker.info
        if worker.info.worker_id == owner.worker_id:
            return True
        return self._tails_mapped and bool(lease.handle.location) and worker.info.host_id == owner.host_id


def _without_retrieval(job: GenerateJob, usage: Usage) -> tuple[Chosen, Usage]:
    name, fallback = job.decode.choice.name, job.decode.caps.fallback
    if job.strict or not fallback:
        raise Unsupported(
            f"decode: {name} needs a retrieval worker and none is serving; try later"
            + (f", or leave strict out to fall back to {fallback}" if fallback else "")
        )
    return exact_decode(fallback), note_fallback(usage, "decode", f"{fallback} (retrieval lost)", False)
