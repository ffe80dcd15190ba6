"""What surrounds every call: statuses, access, deadlines, decoding, ids. Real servers, real channels."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import REGISTRY

from winnow import errors, telemetry
from winnow.config import TelemetryConfig
from winnow.proto.v1 import internal_pb2 as ipb
from winnow.proto.v1 import internal_pb2_grpc as igrpc
from winnow.services.common import deadlines
from winnow.services.common.auth import INTERNAL, INTERNAL_SCOPE, current_principal, mint
from winnow.services.common.links import Links, translated

pytestmark = pytest.mark.slow

CANARY = "canary-7f3a-prompt-text"


class Worker(igrpc.WorkerServicer):
    """Hello does what the test says; Load reports the time it was given."""

    def __init__(self) -> None:
        self.raises: BaseException | None = None
        self.calls = 0
        self.seen: dict[str, Any] = {}
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def Hello(self, request: ipb.HelloRequest, context: grpc.aio.ServicerContext) -> ipb.HelloReply:
        self.calls += 1
        if self.raises is not None:
            raise self.raises
        return ipb.HelloReply()

    async def Load(self, request: ipb.LoadRequest, context: grpc.aio.ServicerContext) -> ipb.LoadReply:
        self.seen = {
            "left": deadlines.remaining(),
            "request_id": telemetry.current_request_id(),
            "trace": telemetry.current_trace(),
            "tenant": current_principal().tenant,
        }
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return ipb.LoadReply()


class Retrieval(igrpc.RetrievalServicer):
    async def Attend(
        self, requests: AsyncIterator[ipb.AttendRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[ipb.AttendReply]:
        async for request in requests:
            yield ipb.AttendReply(layer=request.layer)


def bearer(secret: str, **claims: Any) -> tuple[tuple[str, str], ...]:
    claims = {"audience": INTERNAL, "scopes": (INTERNAL_SCOPE,), **claims}
    return (("authorization", f"Bearer {mint(secret, **claims)}"),)


ALL_ERRORS = sorted(
    (
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, errors.WinnowError) and c is not errors.WinnowError
    ),
    key=lambda c: c.__name__,
)


@pytest.mark.promise("R24")
@pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda c: c.__name__)
async def test_every_error_arrives_as_its_status_and_as_the_same_class(cls: type[errors.WinnowError], serve, config) -> None:
    worker = Worker()
    worker.raises = cls("field: value is not within limit; do this")
    server = await serve({"Worker": worker})
    links = Links(config)
    try:
        with pytest.raises(cls) as caught, translated():
            await igrpc.WorkerStub(links.channel(server.address)).Hello(ipb.HelloRequest(), **links.options())
        assert type(caught.value) is cls
        assert str(caught.value) == "field: value is not within limit; do this"
    finally:
        await links.close()


async def test_an_overload_says_when_to_come_back(serve, config, secret) -> None:
    worker = Worker()
    worker.raises = errors.Overloaded("queue is full", retry_after_ms=1234)
    server = await serve({"Worker": worker})
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await igrpc.WorkerStub(channel).Hello(ipb.HelloRequest(), metadata=bearer(secret))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1234"


@pytest.mark.promise("R25")
async def test_an_unexpected_exception_is_internal_with_the_request_id_and_none_of_its_text(serve, secret) -> None:
    logged = io.StringIO()
    telemetry.configure_logging(TelemetryConfig(), "test", logged)
    worker = Worker()
    worker.raises = ValueError(CANARY)
    server = await serve({"Worker": worker})
    metadata = (*bearer(secret), ("winnow-request-id", "my-request"))
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await igrpc.WorkerStub(channel).Hello(ipb.HelloRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error, request id my-request"
    assert CANARY not in logged.getvalue()
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert any(line["event"] == "internal error" and "ValueError at" in line["where"] for line in lines)


async def test_a_deliberate_error_inside_a_task_group_keeps_its_status(serve, secret) -> None:
    worker = Worker()
    worker.raises = ExceptionGroup("group", [ValueError("x"), ExceptionGroup("inner", [errors.LeaseLost("late")])])
    server = await serve({"Worker": worker})
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await igrpc.WorkerStub(channel).Hello(ipb.HelloRequest(), metadata=bearer(secret))
    assert caught.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.promise("R24")
async def test_undecodable_bytes_are_invalid_argument_on_unary_and_on_streams(serve, secret) -> None:
    worker = Worker()
    server = await serve({"Worker": worker, "Retrieval": Retrieval()})
    async with grpc.aio.insecure_channel(server.address) as channel:
        unary = channel.unary_unary("/winnow.v1.Worker/Hello")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(b"\xff\xff\xff", metadata=bearer(secret))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream = channel.stream_stream("/winnow.v1.Retrieval/Attend")(metadata=bearer(secret))
        await stream.write(b"\xff\xff\xff")
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert worker.calls == 0


async def test_a_two_way_stream_works_through_the_interceptor(serve, secret) -> None:
    server = await serve({"Retrieval": Retrieval()})
    async with grpc.aio.insecure_channel(server.address) as channel:
        stream = igrpc.RetrievalStub(channel).Attend(metadata=bearer(secret))
        for layer in range(3):
            await stream.write(ipb.AttendRequest(layer=layer))
            assert (await stream.read()).layer == layer
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK


@pytest.mark.promise("R24")
async def test_an_unknown_call_is_unimplemented_and_a_message_over_the_limit_is_resource_exhausted(serve, secret) -> None:
    server = await serve({"Worker": Worker()})
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/winnow.v1.Worker/Nothing")(b"", metadata=bearer(secret))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/winnow.v1.Worker/Hello")(b"x" * (65 << 10), metadata=bearer(secret))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.promise("R5")
async def test_a_call_without_deadline_ends_at_the_default_and_its_handler_is_cancelled(serve, secret) -> None:
    worker = Worker()
    server = await serve({"Worker": worker})
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await igrpc.WorkerStub(channel).Load(ipb.LoadRequest(), metadata=bearer(secret))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 1.5 < worker.seen["left"] <= 2.0
    await asyncio.wait_for(worker.cancelled.wait(), 5)


@pytest.mark.promise("R5")
@pytest.mark.parametrize(("given_s", "low", "high"), [(2.0, 1.0, 2.05), (600.0, 3.0, 4.0)])
async def test_a_deadline_is_taken_over_and_capped_at_the_maximum(given_s: float, low: float, high: float, serve, secret) -> None:
    worker = Worker()
    server = await serve({"Worker": worker})
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = igrpc.WorkerStub(channel).Load(ipb.LoadRequest(), metadata=bearer(secret), timeout=given_s)
        await asyncio.wait_for(worker.entered.wait(), 5)
        call.cancel()
    assert low < worker.seen["left"] <= high
    await asyncio.wait_for(worker.cancelled.wait(), 5)


@pytest.mark.promise("R5")
async def test_each_hop_gets_less_time_the_same_trace_and_the_same_request_id(serve, config, secret) -> None:
    last = Worker()
    server_b = await serve({"Worker": last})
    links = Links(config)

    class Middle(Worker):
        async def Load(self, request: ipb.LoadRequest, context: grpc.aio.ServicerContext) -> ipb.LoadReply:
            self.seen = {"left": deadlines.remaining(), "trace": telemetry.current_trace()}
            with translated("b"):
                return await igrpc.WorkerStub(links.channel(server_b.address)).Load(request, **links.options())

    middle = Middle()
    server_a = await serve({"Worker": middle})
    metadata = (*bearer(secret), ("winnow-request-id", "hop-test"), ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"))
    try:
        async with grpc.aio.insecure_channel(server_a.address) as channel:
            call = igrpc.WorkerStub(channel).Load(ipb.LoadRequest(), metadata=metadata, timeout=3.0)
            await asyncio.wait_for(last.entered.wait(), 5)
            call.cancel()
            await asyncio.wait_for(last.cancelled.wait(), 5)
    finally:
        await links.close()
    assert last.seen["left"] <= middle.seen["left"] - config.gateway.hop_margin_s
    assert last.seen["request_id"] == "hop-test"
    assert last.seen["trace"].trace_id == middle.seen["trace"].trace_id == "ab" * 16
    assert last.seen["trace"].span_id != middle.seen["trace"].span_id


async def test_a_hop_without_time_left_is_not_made(config) -> None:
    links = Links(config)
    async with deadlines.limit(0.01):
        with pytest.raises(errors.DeadlineExceeded):
            links.options()


async def test_a_vanished_peer_is_worker_lost_and_its_address_stays_inside(serve, config) -> None:
    server = await serve({"Worker": Worker()})
    await server.stop(0)
    links = Links(config)
    try:
        with pytest.raises(errors.WorkerLost) as caught, translated("prefill-0"):
            await igrpc.WorkerStub(links.channel(server.address)).Hello(ipb.HelloRequest(), **links.options())
    finally:
        await links.close()
    assert str(caught.value) == "prefill-0 is lost; the request may be tried again"


async def test_every_call_is_counted_with_its_code(serve, secret) -> None:
    def count() -> float:
        labels = {"rpc": "/winnow.v1.Worker/Hello", "code": "NOT_FOUND"}
        return REGISTRY.get_sample_value("winnow_rpc_requests_total", labels) or 0.0

    worker = Worker()
    worker.raises = errors.UnknownName("nobody")
    server = await serve({"Worker": worker})
    before = count()
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await igrpc.WorkerStub(channel).Hello(ipb.HelloRequest(), metadata=bearer(secret))
    assert count() == before + 1


def test_log_lines_withhold_text_and_secrets_and_carry_the_ids() -> None:
    stream = io.StringIO()
    telemetry.configure_logging(TelemetryConfig(), "test", stream)
    with telemetry.request_scope({"winnow-request-id": "bad id\n", "traceparent": "nonsense"}) as request_id:
        telemetry.get_logger("x").info("event", prompt=CANARY, secret=CANARY, n=3)
    line = json.loads(stream.getvalue())
    assert CANARY not in stream.getvalue()
    assert (line["n"], line["request_id"], len(line["trace_id"])) == (3, request_id, 32)
    assert telemetry.is_request_id(request_id)


def test_log_lines_follow_stderr_after_the_one_they_began_on_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", first)
    telemetry.configure_logging(TelemetryConfig(), "test")
    log = telemetry.get_logger("x")
    log.info("one")
    monkeypatch.setattr("sys.stderr", second)
    first.close()
    log.info("two")
    assert json.loads(second.getvalue())["event"] == "two"


async def test_with_a_collector_every_hop_is_a_span_of_one_trace(serve, config, secret) -> None:
    """A real OTLP collector on loopback; two servers, the first calls the second."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    got: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:
            got.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    links = Links(config)
    last = await serve({"Worker": Worker()})

    class Middle(Worker):
        async def Hello(self, request: ipb.HelloRequest, context: grpc.aio.ServicerContext) -> ipb.HelloReply:
            return await igrpc.WorkerStub(links.channel(last.address)).Hello(request, **links.options())

    first = await serve({"Worker": Middle()})
    telemetry.configure_tracing(TelemetryConfig(otlp_endpoint=f"127.0.0.1:{port}"), "test")
    try:
        metadata = (*bearer(secret), ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"))
        async with grpc.aio.insecure_channel(first.address) as channel:
            await igrpc.WorkerStub(channel).Hello(ipb.HelloRequest(), metadata=metadata)
        await asyncio.to_thread(telemetry.stop_tracing)
    finally:
        telemetry.stop_tracing()
        await links.close()
        await collector.stop(0)
    assert [s.name for s in got] == ["/winnow.v1.Worker/Hello"] * 2
    assert {s.trace_id.hex() for s in got} == {"ab" * 16}
    assert len({s.span_id for s in got}) == 2
