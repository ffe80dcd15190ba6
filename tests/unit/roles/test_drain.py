"""Draining: no new work, running work finishes within the grace, the rest ends UNAVAILABLE (R18)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from winnow.errors import Draining
from winnow.services.common.links import error_of

from .conftest import SPLIT, Deployment, rest
from .test_warmup import NOT_SERVING, health

pytestmark = pytest.mark.slow

N_NEW = 600


async def start_decoding(deployment: Deployment, n: int) -> tuple[Any, Any]:
    await deployment.start(SPLIT)
    result = await deployment.prefill(tail_tokens=n)
    call = deployment.decode_call(result.segment, n=n)
    await call.read()
    return call, result.segment


@pytest.mark.promise("R18")
async def test_running_work_finishes_and_new_work_is_refused(deployment: Deployment) -> None:
    call, _ = await start_decoding(deployment, N_NEW)
    decode = deployment.of("decode")
    other = await deployment.prefill()

    draining = asyncio.create_task(decode.drain(60.0))
    while decode.gate.state != "draining":
        await asyncio.sleep(0)
    with pytest.raises(grpc.RpcError) as refused:
        await deployment.decode(other.segment)
    assert await health(deployment.address("decode")) == NOT_SERVING
    events = await rest(call)
    await draining

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error_of(refused.value), Draining)
    assert 1 + sum(len(e.token_ids) for e in events) >= N_NEW - 8  # the first event may have held several
    assert events[-1].finish_reason == "length"
    assert decode.ledgers()["open_segments"] == 0


@pytest.mark.promise("R18")
async def test_work_that_outlasts_the_grace_ends_unavailable(deployment: Deployment) -> None:
    call, _ = await start_decoding(deployment, 1800)

    await deployment.of("decode").drain(0.01)

    with pytest.raises(grpc.RpcError) as ended:
        await rest(call)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error_of(ended.value), Draining)
    assert deployment.of("decode").ledgers()["open_segments"] == 0


@pytest.mark.promise("R18")
async def test_a_prefill_worker_waits_for_those_who_hold_its_segments(deployment: Deployment) -> None:
    await deployment.start(SPLIT)
    result = await deployment.prefill()
    prefill = deployment.of("prefill")

    draining = asyncio.create_task(prefill.drain(60.0))
    while prefill.gate.state != "draining":
        await asyncio.sleep(0)
    with pytest.raises(grpc.RpcError) as refused:
        await deployment.prefill()
    tokens, _ = await deployment.decode(result.segment, n=8)
    assert not draining.done()
    await deployment.release(result.segment)
    await draining

    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(tokens) == 8
    assert prefill.ledgers()["leases"] == 0
