"""The asyncio client, twin of `winnow.Client`: the same calls, arguments, results and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from winnow.client import OnProgress
from winnow.client_calls import (
    DEFAULT_MAX_MESSAGE_BYTES,
    Attempts,
    Endpoint,
    Method,
    channel_options,
    collect,
    generate_request,
    present,
    rank_request,
    tls_credentials,
    typed_errors,
    with_recall,
)
from winnow.proto.v1 import winnow_pb2, winnow_pb2_grpc
from winnow.types import Chunk, Document, Generation, Message, Ranking, Sampling
from winnow.wire import chunk_from_event, method_to_proto, ranking_from_proto


class AsyncClient:
    """A connection to a winnow gateway for one event loop. Make it inside the loop; `async with`, or call `close`.

    Arguments and errors as in `winnow.Client`.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        *,
        deadline_s: float | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> None:
        self._endpoint = Endpoint.find(address, token)
        self._deadline_s = deadline_s
        credentials = tls_credentials(tls_ca, tls_cert, tls_key)
        options = channel_options(max_message_bytes)
        self._channel = (
            grpc.aio.insecure_channel(self.address, options)
            if credentials is None
            else grpc.aio.secure_channel(self.address, credentials, options)
        )
        self._stub: Any = winnow_pb2_grpc.WinnowStub(self._channel)  # type: ignore[no-untyped-call]  # generated code has no types

    @property
    def address(self) -> str:
        return self._endpoint.address

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running calls end."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        session: str = "",
        question: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | str | None = None,
        prefill: Method = None,
        recall: float | None = None,
        decode: Method = None,
        reducer: Method = None,
        strict: bool = False,
        answer_prefix: str = "",
        no_cache: bool = False,
        model: str = "",
        request_id: str = "",
        deadline_s: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """Generate text, piece by piece; see `Client.generate`. Closing the iterator cancels the request."""
        overrides = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}
        request = generate_request(
            prompt, messages, question, session, sampling, overrides, with_recall(prefill, recall, session), decode, reducer,
            strict=strict, answer_prefix=answer_prefix, no_cache=no_cache, model=model, request_id=request_id,
        )  # fmt: skip
        async for event in self._stream(self._stub.Generate, request, deadline_s):
            yield chunk_from_event(event)

    async def complete(self, prompt: str | None = None, **options: Any) -> Generation:
        """As `generate`, returning everything at once."""
        return collect([chunk async for chunk in self.generate(prompt, **options)])

    def ask(self, session: str, question: str, **options: Any) -> AsyncIterator[Chunk]:
        """Ask about an open session's text; options as in `generate`."""
        return self.generate(session=session, question=question, **options)

    async def rank(
        self,
        query: str,
        documents: Iterable[Document | str],
        *,
        method: Method = None,
        top_n: int = 0,
        strict: bool = False,
        model: str = "",
        request_id: str = "",
        deadline_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Ranking:
        """Order documents by relevance to a query, best first; see `Client.rank`."""
        request = rank_request(query, documents, method, top_n=top_n, strict=strict, model=model, request_id=request_id)
        ranking: Ranking | None = None
        async for event in self._stream(self._stub.Rank, request, deadline_s):
            if event.WhichOneof("event") == "ranking":
                ranking = ranking_from_proto(event.ranking)
            elif on_progress is not None:
                on_progress(event.progress.done, event.progress.total)
        return present(ranking)

    async def open_session(
        self,
        text: str,
        *,
        prefill: Method = None,
        recall: float | None = None,
        idle_timeout_s: float = 0.0,
        model: str = "",
        deadline_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> winnow_pb2.Session:
        """Read a long text once; see `Client.open_session`."""
        request = winnow_pb2.OpenSessionRequest(
            model=model, text=text, prefill=method_to_proto(with_recall(prefill, recall)), idle_timeout_s=idle_timeout_s
        )
        session: winnow_pb2.Session | None = None
        async for event in self._stream(self._stub.OpenSession, request, deadline_s):
            if event.WhichOneof("event") == "session":
                session = event.session
            elif on_progress is not None:
                on_progress(event.progress.done, event.progress.total)
        return present(session)

    async def sessions(self) -> list[winnow_pb2.Session]:
        """Open sessions of this tenant."""
        return list((await self._call(self._stub.ListSessions, winnow_pb2.ListSessionsRequest())).sessions)

    async def close_session(self, session: str) -> None:
        """Let a session's KV go. Raises UnknownName for one that is not open."""
        await self._call(self._stub.CloseSession, winnow_pb2.CloseSessionRequest(session_id=session))

    async def cancel(self, request_id: str) -> None:
        """End a running request. Raises UnknownName when it is not running."""
        await self._call(self._stub.Cancel, winnow_pb2.CancelRequest(request_id=request_id))

    async def methods(self, slot: str = "") -> list[winnow_pb2.MethodInfo]:
        """Methods of a slot with their capabilities; "" = all slots."""
        return list((await self._call(self._stub.ListMethods, winnow_pb2.ListMethodsRequest(slot=slot))).methods)

    async def models(self) -> list[winnow_pb2.ModelInfo]:
        """Models the server serves."""
        return list((await self._call(self._stub.ListModels, winnow_pb2.ListModelsRequest())).models)

    async def capabilities(self) -> winnow_pb2.Capabilities:
        """What the server can do, and its limits."""
        reply: winnow_pb2.Capabilities = await self._call(self._stub.GetCapabilities, winnow_pb2.GetCapabilitiesRequest())
        return reply

    async def status(self) -> winnow_pb2.Status:
        """Workers, queues and caches."""
        reply: winnow_pb2.Status = await self._call(self._stub.GetStatus, winnow_pb2.GetStatusRequest())
        return reply

    async def _call(self, method: Any, request: Any) -> Any:
        attempts = Attempts(self._deadline_s)

        async def once() -> Any:
            return await method(request, metadata=self._endpoint.metadata(), timeout=attempts.timeout())

        with typed_errors(self.address):
            return await attempts.asynchronous()(once)

    async def _stream(self, method: Any, request: Any, deadline_s: float | None) -> AsyncIterator[Any]:
        attempts = Attempts(deadline_s or self._deadline_s)
        call: Any = None
        try:
            with typed_errors(self.address):
                async for attempt in attempts.asynchronous():
                    with attempt:
                        call = method(request, metadata=self._endpoint.metadata(), timeout=attempts.timeout())
                        first = await anext(aiter(call), None)
                if first is not None:
                    yield first
                    async for event in call:
                        yield event
        finally:
            if call is not None:
                call.cancel()
