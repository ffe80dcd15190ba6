"""The synchronous client. `Client` talks to a running gateway; `winnow.AsyncClient` is its twin for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

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

OnProgress = Callable[[int, int], None]


class Client:
    """A connection to a winnow gateway. Thread-safe; use it as a context manager or call `close`.

    Args:
        address: host:port; None = WINNOW_ADDRESS, else the pipeline started on this machine.
        token: bearer token; None = WINNOW_TOKEN, else that pipeline's.
        deadline_s: time of a call in seconds unless the call says otherwise; None = the server's default.
        max_message_bytes: largest message in either direction.
        tls_ca, tls_cert, tls_key: PEM files; tls_ca turns TLS on, the other two present a client certificate.

    Raises:
        ConfigError: no address is known, or a file cannot be read.

    Every call raises the error the server raised, as the same class (`winnow.errors`).
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
            grpc.insecure_channel(self.address, options)
            if credentials is None
            else grpc.secure_channel(self.address, credentials, options)
        )
        self._stub: Any = winnow_pb2_grpc.WinnowStub(self._channel)  # type: ignore[no-untyped-call]  # generated code has no types

    @property
    def address(self) -> str:
        return self._endpoint.address

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls end."""
        self._channel.close()

    def generate(
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
    ) -> Iterator[Chunk]:
        """Generate text, piece by piece. The call starts when the iteration does; leaving it cancels the request.

        Args:
            prompt, messages: raw text, or a chat to which the model's template is applied; exactly one of them, or
                `session` (from `open_session`) with a `question`.
            sampling: how tokens are chosen; max_tokens, temperature, seed and stop override its fields.
            prefill, decode, reducer: methods, `name` or `name:key=value,...`; None = the server's default.
            recall: share of attention mass that the prefill shall keep, in (0, 1]: short for the prefill method
                `recall:recall=...`, which finds out how much each head must read for it. What was achieved is in the usage.
            strict: fail instead of falling back to exact attention.
            answer_prefix: text the answer begins with (with messages or question).
            no_cache: neither read nor write the prefix cache.
            request_id: own id, for `cancel` and the server's logs.
            deadline_s: seconds until the request is given up.

        Yields:
            Chunks: progress first, then text; the last has `finish_reason` and `usage`.
        """
        overrides = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop}
        request = generate_request(
            prompt, messages, question, session, sampling, overrides, with_recall(prefill, recall, session), decode, reducer,
            strict=strict, answer_prefix=answer_prefix, no_cache=no_cache, model=model, request_id=request_id,
        )  # fmt: skip
        return (chunk_from_event(event) for event in self._stream(self._stub.Generate, request, deadline_s))

    def complete(self, prompt: str | None = None, **options: Any) -> Generation:
        """As `generate`, returning everything at once."""
        return collect(self.generate(prompt, **options))

    def ask(self, session: str, question: str, **options: Any) -> Iterator[Chunk]:
        """Ask about an open session's text; options as in `generate`."""
        return self.generate(session=session, question=question, **options)

    def rank(
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
        """Order documents by relevance to a query, best first.

        Args:
            documents: documents, or plain strings (their position, from 0, becomes their id).
            method: ranker; None = the server's default.
            top_n: return only the best n; 0 = all.
            on_progress: called with (documents done, documents).
        """
        request = rank_request(query, documents, method, top_n=top_n, strict=strict, model=model, request_id=request_id)
        ranking: Ranking | None = None
        for event in self._stream(self._stub.Rank, request, deadline_s):
            if event.WhichOneof("event") == "ranking":
                ranking = ranking_from_proto(event.ranking)
            elif on_progress is not None:
                on_progress(event.progress.done, event.progress.total)
        return present(ranking)

    def open_session(
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
        """Read a long text once, so that several questions can be asked about it.

        Args:
            prefill, recall: as in `generate`; questions about the session take them over.
            idle_timeout_s: seconds without use after which it is closed; 0 = the server's default.
            on_progress: called with (tokens done, tokens).

        Returns:
            The session; its `session_id` goes into `ask` and `close_session`.
        """
        request = winnow_pb2.OpenSessionRequest(
            model=model, text=text, prefill=method_to_proto(with_recall(prefill, recall)), idle_timeout_s=idle_timeout_s
        )
        session: winnow_pb2.Session | None = None
        for event in self._stream(self._stub.OpenSession, request, deadline_s):
            if event.WhichOneof("event") == "session":
                session = event.session
            elif on_progress is not None:
                on_progress(event.progress.done, event.progress.total)
        return present(session)

    def sessions(self) -> list[winnow_pb2.Session]:
        """Open sessions of this tenant."""
        return list(self._call(self._stub.ListSessions, winnow_pb2.ListSessionsRequest()).sessions)

    def close_session(self, session: str) -> None:
        """Let a session's KV go. Raises UnknownName for one that is not open."""
        self._call(self._stub.CloseSession, winnow_pb2.CloseSessionRequest(session_id=session))

    def cancel(self, request_id: str) -> None:
        """End a running request. Raises UnknownName when it is not running."""
        self._call(self._stub.Cancel, winnow_pb2.CancelRequest(request_id=request_id))

    def methods(self, slot: str = "") -> list[winnow_pb2.MethodInfo]:
        """Methods of a slot ("prefill", "decode", "draft", "ranker", "index"; "" = all) with their capabilities."""
        return list(self._call(self._stub.ListMethods, winnow_pb2.ListMethodsRequest(slot=slot)).methods)

    def models(self) -> list[winnow_pb2.ModelInfo]:
        """Models the server serves."""
        return list(self._call(self._stub.ListModels, winnow_pb2.ListModelsRequest()).models)

    def capabilities(self) -> winnow_pb2.Capabilities:
        """What the server can do, and its limits."""
        reply: winnow_pb2.Capabilities = self._call(self._stub.GetCapabilities, winnow_pb2.GetCapabilitiesRequest())
        return reply

    def status(self) -> winnow_pb2.Status:
        """Workers, queues and caches."""
        reply: winnow_pb2.Status = self._call(self._stub.GetStatus, winnow_pb2.GetStatusRequest())
        return reply

    def _call(self, method: Any, request: Any) -> Any:
        attempts = Attempts(self._deadline_s)
        with typed_errors(self.address):
            return attempts.sync()(lambda: method(request, metadata=self._endpoint.metadata(), timeout=attempts.timeout()))

    def _stream(self, method: Any, request: Any, deadline_s: float | None) -> Iterator[Any]:
        attempts = Attempts(deadline_s or self._deadline_s)
        call: Any = None
        try:
            with typed_errors(self.address):
                for attempt in attempts.sync():
                    with attempt:
                        call = method(request, metadata=self._endpoint.metadata(), timeout=attempts.timeout())
                        first = next(call, None)
                if first is not None:
                    yield first
                    yield from call
        finally:
            if call is not None:
                call.cancel()
