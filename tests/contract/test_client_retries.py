"""What both clients do when the gateway says UNAVAILABLE, and when it goes away in that moment."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

from winnow import AsyncClient, Client, errors
from winnow.proto.v1 import common_pb2, winnow_pb2, winnow_pb2_grpc

TEXT = winnow_pb2.GenerateEvent(piece=winnow_pb2.Piece(text="hello"))
PROGRESS = winnow_pb2.GenerateEvent(progress=common_pb2.Progress(stage="prefill"))


class Flaky(winnow_pb2_grpc.WinnowServicer):
    """Unavailable for the first `failures` calls; with `begun`, only after the first event. `code`: the status it says."""

    def __init__(self, failures: int, begun: bool = False, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.failures, self.begun, self.code, self.calls = failures, begun, code, 0

    async def _answer(self, context: grpc.aio.ServicerContext) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            await context.abort(self.code, "not now")

    async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if self.begun:
            yield PROGRESS
        await self._answer(context)
        yield TEXT

    async def GetStatus(self, request: Any, context: grpc.aio.ServicerContext) -> winnow_pb2.Status:
        await self._answer(context)
        return winnow_pb2.Status(state="serving")


async def served(flaky: Flaky, ask: Callable[[str], Any]) -> Any:
    """What `ask(address)` returns, in a thread or as a coroutine."""
    server = grpc.aio.server()
    winnow_pb2_grpc.add_WinnowServicer_to_server(flaky, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        if asyncio.iscoroutinefunction(ask):
            return await ask(f"127.0.0.1:{port}")
        return await asyncio.to_thread(ask, f"127.0.0.1:{port}")
    finally:
        await server.stop(0)


def complete(address: str) -> str:
    with Client(address, "", deadline_s=10) as client:
        return client.complete("x").text


async def acomplete(address: str) -> str:
    async with AsyncClient(address, "", deadline_s=10) as client:
        return (await client.complete("x")).text


def status(address: str) -> str:
    with Client(address, "", deadline_s=10) as client:
        return client.status().state


async def astatus(address: str) -> str:
    async with AsyncClient(address, "", deadline_s=10) as client:
        return (await client.status()).state


# A server that shuts down makes gRPC say CANCELLED to calls that come in that moment, without naming an error of winnow's.
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
@pytest.mark.parametrize(
    ("ask", "answer"), [(complete, "hello"), (acomplete, "hello"), (status, "serving"), (astatus, "serving")]
)
async def test_a_gateway_that_is_unavailable_twice_is_asked_a_third_time(
    ask: Callable[[str], Any], answer: str, code: grpc.StatusCode
) -> None:
    flaky = Flaky(failures=2, code=code)
    assert await served(flaky, ask) == answer
    assert flaky.calls == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
@pytest.mark.parametrize("ask", [complete, acomplete, status, astatus])
async def test_the_fourth_refusal_is_the_answer(ask: Callable[[str], Any], code: grpc.StatusCode) -> None:
    flaky = Flaky(failures=9, code=code)
    with pytest.raises(errors.WorkerLost):
        await served(flaky, ask)
    assert flaky.calls == 4


@pytest.mark.parametrize("ask", [complete, acomplete])
async def test_a_stream_that_has_begun_is_not_asked_again(ask: Callable[[str], Any]) -> None:
    flaky = Flaky(failures=9, begun=True)
    with pytest.raises(errors.WorkerLost):
        await served(flaky, ask)
    assert flaky.calls == 1


async def test_a_client_closed_under_a_running_stream_ends_it_as_cancelled_and_asks_no_more() -> None:
    class Slow(Flaky):
        async def Generate(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            self.calls += 1
            await asyncio.sleep(30)
            yield TEXT

    slow = Slow(failures=0)

    def ask(address: str) -> None:
        with Client(address, "", deadline_s=10) as client:
            threading.Timer(0.3, client.close).start()
            with pytest.raises(errors.Cancelled):
                client.complete("x")

    await served(slow, ask)
    assert slow.calls == 1


def test_retries_stay_within_the_deadline() -> None:
    with socket.socket() as taken:  # bound and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with Client(f"127.0.0.1:{taken.getsockname()[1]}", "") as client, pytest.raises(errors.WinnowError):
            client.complete("x", deadline_s=0.5)
    assert time.monotonic() - began < 1.5


LEAVING = """
import asyncio, grpc, sys
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        async def refuse(request, context):
            print("asked", flush=True)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
            yield b""
        return grpc.unary_stream_rpc_method_handler(refuse)
async def main():
    server = grpc.aio.server(handlers=[Handler()])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop(0)
asyncio.run(main())
"""


@pytest.fixture
def leaving() -> Iterator[subprocess.Popen[str]]:
    """A gateway in a process of its own that refuses everything and ends when told to."""
    process = subprocess.Popen([sys.executable, "-c", LEAVING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate(timeout=10)


@pytest.mark.promise("R7")
def test_a_gateway_that_goes_away_between_two_tries_ends_the_call(leaving: subprocess.Popen[str]) -> None:
    """With gRPC's own retries this stream never ended: not by its deadline, not when cancelled."""
    assert leaving.stdin is not None and leaving.stdout is not None
    address = f"127.0.0.1:{leaving.stdout.readline().strip()}"

    def leave() -> None:
        leaving.stdout.readline()  # the first try has come
        leaving.stdin.write("leave\n")
        leaving.stdin.flush()

    leaver = threading.Thread(target=leave)
    leaver.start()
    began = time.monotonic()
    with Client(address, "") as client, pytest.raises(errors.WorkerLost):
        client.complete("x", deadline_s=5)
    assert time.monotonic() - began < 6
    leaver.join(timeout=5)
    assert leaving.wait(timeout=5) == 0
