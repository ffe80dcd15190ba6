"""The public service: each call is admitted, checked, run beside its reader, and ended with one status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import TypeVar

import grpc

from winnow import telemetry
from winnow.errors import Cancelled, InvalidRequest
from winnow.proto.v1 import winnow_pb2, winnow_pb2_grpc
from winnow.services.common.auth import current_principal
from winnow.services.gateway import validation
from winnow.services.gateway.admission import Admission, Ticket
from winnow.services.gateway.calls import Calls, Emit
from winnow.services.gateway.generate import Events, Generator
from winnow.services.gateway.job import GenerateJob
from winnow.services.gateway.methods import Methods
from winnow.services.gateway.prompts import context_prompt, prompt_ids, question_ids
from winnow.services.gateway.rank import RankRunner
from winnow.services.gateway.sessions import Session, Sessions
from winnow.services.gateway.status import StatusReport
from winnow.workers.model.tokenizer import Tokenizer

Context = grpc.aio.ServicerContext
T = TypeVar("T")


class WinnowServicer(winnow_pb2_grpc.WinnowServicer):
    """Handlers of winnow.v1.Winnow. They raise winnow errors; the server's interceptor makes statuses of them."""

    def __init__(
        self,
        served: validation.Served,
        tokenizer: Tokenizer,
        admission: Admission,
        calls: Calls,
        methods: Methods,
        generator: Generator,
        ranker: RankRunner,
        sessions: Sessions,
        report: StatusReport,
        buffer_size: int,
    ) -> None:
        self._served = served
        self._tokenizer = tokenizer
        self._admission = admission
        self._calls = calls
        self._methods = methods
        self._generator = generator
        self._ranker = ranker
        self._sessions = sessions
        self._report = report
        self._buffer_size = buffer_size

    async def _admitted(self, request_id: str, work: Callable[[str, str, Ticket, Emit[T]], Awaitable[None]]) -> AsyncIterator[T]:
        """Take a place, run `work(request id, tenant, ticket, emit)`, yield what it emits."""
        tenant = current_principal().tenant
        if request_id:
            telemetry.rename_request(request_id)
        request_id = request_id or telemetry.current_request_id()
        self._calls.refuse_if_draining()
        with self._admission.enter() as ticket, self._calls.running(tenant, request_id) as call:

            async def run(emit: Emit[T]) -> None:
                await work(request_id, tenant, ticket, emit)

            async with aclosing(call.events(run, self._buffer_size)) as events:
                async for event in events:
                    yield event

    async def Generate(self, request: winnow_pb2.GenerateRequest, context: Context) -> AsyncIterator[winnow_pb2.GenerateEvent]:
        sampling = validation.check_generate(request, self._tokenizer.has_chat_template)
        validation.check_model(request.model, self._served)
        decode = self._methods.decode(request.decode)
        reducer = self._methods.reducer(request.reducer)
        prefill = None if request.session_id else self._methods.prefill(request.prefill)

        async def work(request_id: str, tenant: str, ticket: Ticket, emit: Emit[winnow_pb2.GenerateEvent]) -> None:
            events = Events(request_id, emit)
            with ExitStack() as stack:
                session: Session | None = None
                if request.session_id:
                    session = stack.enter_context(self._sessions.use(request.session_id, tenant))
                ids = await asyncio.to_thread(self._ids, request, session)
                if not ids:
                    raise InvalidRequest("prompt: no tokens are left of it; send some text")
                validation.check_context(len(ids), sampling.max_tokens, self._served.spec.max_context)
                if ticket.is_waiting:  # otherwise nothing is sent yet: a client may try a call again that got no event
                    await events.progress("queued", 0, len(ids))
                await ticket.turn()
                job = GenerateJob(
                    request_id=request_id,
                    tenant=tenant,
                    token_ids=ids,
                    sampling=sampling,
                    prefill=prefill or _of(session),
                    decode=decode,
                    reducer=reducer,
                    strict=request.strict,
                    no_cache=request.no_cache,
                    context_tokens=len(session.context.token_ids) if session else 0,
                    prefer=session.worker if session else None,
                )
                await self._generator.run(job, events, ticket.entered)

        async with aclosing(self._admitted(request.request_id, work)) as stream:
            async for event in stream:
                yield event

    def _ids(self, request: winnow_pb2.GenerateRequest, session: Session | None) -> list[int]:
        if session is None:
            return prompt_ids(self._tokenizer, request.prompt, validation.messages_of(request), request.answer_prefix)
        question = question_ids(self._tokenizer, session.context, request.question, request.answer_prefix)
        return [*session.context.token_ids, *question]

    async def Rank(self, request: winnow_pb2.RankRequest, context: Context) -> AsyncIterator[winnow_pb2.RankEvent]:
        documents = validation.check_rank(request)
        validation.check_model(request.model, self._served)
        ranker = self._methods.ranker(request.ranker)

        async def work(request_id: str, tenant: str, ticket: Ticket, emit: Emit[winnow_pb2.RankEvent]) -> None:
            await ticket.turn()
            await self._ranker.run(request, request_id, tenant, documents, ranker, emit)

        async with aclosing(self._admitted(request.request_id, work)) as stream:
            async for event in stream:
                yield event

    async def OpenSession(
        self, request: winnow_pb2.OpenSessionRequest, context: Context
    ) -> AsyncIterator[winnow_pb2.OpenSessionEvent]:
        if not request.text:
            raise InvalidRequest("text: is empty; a session needs some text")
        idle_timeout_s = validation.check_idle_timeout(request.idle_timeout_s)
        validation.check_model(request.model, self._served)
        prefill = self._methods.prefill(request.prefill)

        async def work(request_id: str, tenant: str, ticket: Ticket, emit: Emit[winnow_pb2.OpenSessionEvent]) -> None:
            prompt = await asyncio.to_thread(context_prompt, self._tokenizer, request.text)
            validation.check_context(len(prompt.token_ids), 2, self._served.spec.max_context)
            await ticket.turn()
            await self._sessions.open(request_id, tenant, prompt, prefill, idle_timeout_s, emit)

        async with aclosing(self._admitted("", work)) as stream:
            async for event in stream:
                yield event

    async def ListSessions(self, request: winnow_pb2.ListSessionsRequest, context: Context) -> winnow_pb2.ListSessionsReply:
        return winnow_pb2.ListSessionsReply(sessions=self._sessions.of(current_principal().tenant))

    async def CloseSession(self, request: winnow_pb2.CloseSessionRequest, context: Context) -> winnow_pb2.CloseSessionReply:
        _needed("session_id", request.session_id)
        self._sessions.close(request.session_id, current_principal().tenant)
        return winnow_pb2.CloseSessionReply()

    async def Cancel(self, request: winnow_pb2.CancelRequest, context: Context) -> winnow_pb2.CancelReply:
        _needed("request_id", request.request_id)
        validation.check_request_id(request.request_id)
        call = self._calls.find(current_principal().tenant, request.request_id)
        call.end(Cancelled("the request was cancelled by a Cancel call"))
        return winnow_pb2.CancelReply()

    async def GetCapabilities(self, request: winnow_pb2.GetCapabilitiesRequest, context: Context) -> winnow_pb2.Capabilities:
        return self._report.capabilities()

    async def ListMethods(self, request: winnow_pb2.ListMethodsRequest, context: Context) -> winnow_pb2.ListMethodsReply:
        return winnow_pb2.ListMethodsReply(methods=self._methods.listing(request.slot))

    async def ListModels(self, request: winnow_pb2.ListModelsRequest, context: Context) -> winnow_pb2.ListModelsReply:
        return winnow_pb2.ListModelsReply(models=[self._report.model()])

    async def GetStatus(self, request: winnow_pb2.GetStatusRequest, context: Context) -> winnow_pb2.Status:
        return self._report.status(self._sessions.of(current_principal().tenant))


def _of(session: Session | None) -> validation.Chosen:
    assert session is not None
    return session.prefill


def _needed(name: str, value: str) -> None:
    if not 1 <= len(value) <= validation.MAX_NAME_CHARS:
        raise InvalidRequest(f"{name} must be 1 to {validation.MAX_NAME_CHARS} characters, got {len(value)}")
