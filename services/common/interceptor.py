"""What happens around every call of every server, in this order: request id and logs, metrics, access, deadline, decoding.

Access is checked before a request's bytes are decoded. Left alone, grpcio answers undecodable bytes and uncaught
exceptions with UNKNOWN and leaks their text; here they become INVALID_ARGUMENT and INTERNAL without text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from winnow import telemetry
from winnow.errors import InvalidRequest
from winnow.services.common import deadlines, errors
from winnow.services.common.auth import Authenticator, acting_as

Work = Callable[[], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler of a server. An unknown RPC keeps its UNIMPLEMENTED."""

    def __init__(self, auth: Authenticator, rule: deadlines.DeadlineRule) -> None:
        self._auth = auth
        self._rule = rule

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(handler, handler_call_details.method)

    async def _around(self, method: str, context: grpc.aio.ServicerContext, work: Work) -> Any:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        started, code = time.perf_counter(), "OK"
        telemetry.RPC_INFLIGHT.labels(rpc=method).inc()
        with telemetry.request_scope(metadata):
            try:
                principal = self._auth.check(method, metadata)
                budget = self._rule.budget(context.time_remaining(), metadata.get(deadlines.TIMEOUT_KEY, ""))
                with acting_as(principal), telemetry.span(method):
                    async with deadlines.limit(budget):
                        return await work()
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    code = "CANCELLED"
                    raise
                if errors.passes_through(error) or not isinstance(error, Exception | BaseExceptionGroup):
                    code = "ABORTED_BY_HANDLER"
                    raise
                request_id = telemetry.current_request_id()
                code = errors.outcome_of(error, request_id).code.name
                await errors.end_with(context, error, request_id, method)
            finally:
                telemetry.RPC_INFLIGHT.labels(rpc=method).dec()
                telemetry.RPC_REQUESTS.labels(rpc=method, code=code).inc()
                telemetry.RPC_SECONDS.labels(rpc=method).observe(time.perf_counter() - started)

    def _wrap(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        decode = _decoder(handler.request_deserializer)
        encode = handler.response_serializer

        if handler.request_streaming:
            # Decoded while the handler reads, so an undecodable message surfaces inside it as InvalidRequest.
            if handler.response_streaming:

                async def stream_stream(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
                    await self._around(method, context, lambda: _pump(handler.stream_stream(requests, context), context))

                return grpc.stream_stream_rpc_method_handler(stream_stream, decode, encode)

            async def stream_unary(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
                return await self._around(method, context, lambda: handler.stream_unary(requests, context))

            return grpc.stream_unary_rpc_method_handler(stream_unary, decode, encode)

        # Decoded here and not by grpcio, which would do it before any of this runs.
        if handler.response_streaming:

            async def unary_stream(raw: bytes, context: grpc.aio.ServicerContext) -> None:
                await self._around(method, context, lambda: _pump(handler.unary_stream(decode(raw), context), context))

            return grpc.unary_stream_rpc_method_handler(unary_stream, None, encode)

        async def unary_unary(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
            return await self._around(method, context, lambda: handler.unary_unary(decode(raw), context))

        return grpc.unary_unary_rpc_method_handler(unary_unary, None, encode)


async def _pump(produced: Any, context: grpc.aio.ServicerContext) -> None:
    """Send what a handler yields; a handler that writes by itself is only awaited."""
    if not hasattr(produced, "__aiter__"):
        await produced
        return
    try:
        async for message in produced:
            await context.write(message)
    finally:
        close = getattr(produced, "aclose", None)
        if close is not None:
            await close()  # the handler's cleanup runs now, in this call, not when the garbage collector comes by


def _decoder(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def decode(raw: bytes) -> Any:
        if deserialise is None:
            return raw
        try:
            return deserialise(raw)
        except Exception:
            raise InvalidRequest("the message cannot be decoded; are both sides on the same version of the protocol?") from None

    return decode
