"""Retrieval lost in the middle: exact attention steps in and says so, or a strict caller is refused (R10)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import torch

from winnow.config import WinnowConfig
from winnow.errors import Unsupported, WorkerLost
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common.auth import INTERNAL
from winnow.services.common.links import Links, error_of
from winnow.services.common.server import build_server
from winnow.services.retrieval.session import SessionOpener
from winnow.workers.attention.backend import LayerSpec

from .conftest import SPLIT, Deployment, nothing, rest

pytestmark = pytest.mark.slow

N_NEW = 1200
LOST = "decode: dense (retrieval lost)"
LAYER = LayerSpec(0, 4, 2, 16, 0.25)


async def start_decoding(deployment: Deployment, *, strict: bool) -> tuple[Any, internal_pb2.SegmentHandle, list[int]]:
    await deployment.start(SPLIT)
    result = await deployment.prefill(tail_tokens=N_NEW)
    index_id = await deployment.open_index(result.segment)
    call = deployment.decode_call(result.segment, n=N_NEW, strict=strict, **deployment.retrieval_fields(index_id))
    first = await call.read()
    return call, result.segment, list(first.token_ids)


@pytest.mark.promise("R10")
async def test_retrieval_stopped_in_the_middle_falls_back_to_dense(deployment: Deployment) -> None:
    call, segment, tokens = await start_decoding(deployment, strict=False)

    await deployment.of("retrieval").stop()
    events = await rest(call)

    tokens += [t for e in events for t in e.token_ids]
    assert (events[-1].finish_reason, events[-1].fallback_used) == ("length", LOST)
    del deployment.processes["retrieval"]
    dense, _ = await deployment.decode(segment, n=N_NEW)
    assert tokens == dense
    await deployment.release(segment)
    assert await deployment.idle() == nothing()


@pytest.mark.promise("R10")
async def test_retrieval_stopped_in_the_middle_ends_a_strict_call(deployment: Deployment) -> None:
    call, segment, _ = await start_decoding(deployment, strict=True)

    await deployment.of("retrieval").stop()
    with pytest.raises(grpc.RpcError) as ended:
        await rest(call)

    assert ended.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert isinstance(error_of(ended.value), Unsupported)
    await deployment.release(segment)


@pytest.mark.promise("R10")
async def test_an_index_that_is_gone_is_as_good_as_lost(deployment: Deployment) -> None:
    await deployment.start(SPLIT)
    result = await deployment.prefill()

    tokens, last = await deployment.decode(result.segment, n=8, **deployment.retrieval_fields("no-such-index"))

    assert last.fallback_used == LOST
    assert tokens == (await deployment.decode(result.segment, n=8))[0]


class Silent(internal_pb2_grpc.RetrievalServicer):
    """Takes queries and never answers; or closes the stream at once."""

    def __init__(self, *, closes: bool) -> None:
        self.closes = closes
        self.ended = asyncio.Event()

    async def Attend(self, requests: AsyncIterator[Any], context: Any) -> None:
        try:
            async for _ in requests:
                if self.closes:
                    return
        finally:
            self.ended.set()


@pytest.mark.parametrize("closes", [False, True], ids=["silent", "closed"])
async def test_an_answer_that_does_not_come_is_a_lost_worker(config: WinnowConfig, closes: bool) -> None:
    silent = Silent(closes=closes)
    server = build_server({"Retrieval": silent}, config, audience=INTERNAL, port=0)
    address = await server.start()
    links = Links(config)
    opener = SessionOpener(links, config.gateway, answer_timeout_s=0.3)
    session = opener.open(address, "x", 0, 0)
    started = time.monotonic()

    def ask() -> None:
        session.submit(LAYER, torch.zeros(4, 16), 4)
        session.collect(LAYER)

    with pytest.raises(WorkerLost, match="exact attention"):
        await asyncio.to_thread(ask)

    assert time.monotonic() - started < 3.0
    async with asyncio.timeout(5.0):
        await silent.ended.wait()
    session.close()
    session.close()
    with pytest.raises(WorkerLost):
        session.submit(LAYER, torch.zeros(4, 16), 4)
    opener.close()
    assert not [t for t in threading.enumerate() if t.name == "winnow-attend-watchdog"]
    await links.close()
    await server.stop()
