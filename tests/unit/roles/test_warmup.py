"""A process whose answer is wrong never serves; a restarted one is a new one (R14)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from winnow.config import WinnowConfig
from winnow.errors import WinnowError
from winnow.metadata import MetadataUnavailable
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services import parts, roles
from winnow.services.roles import RoleProcess
from winnow.services.warmup import WrongAnswer
from winnow.services.weights import Weights, load_weights
from winnow.types import WorkerInfo
from winnow.wire import fingerprint_to_proto
from winnow.workers.model.loader import LoadedModel

from .conftest import SPLIT, Deployment

pytestmark = pytest.mark.slow

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(address: str) -> Any:
    async with grpc.aio.insecure_channel(address) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)).status


def damaged(model: LoadedModel, *, with_nan: bool = False) -> LoadedModel:
    """The same model but for one weight tensor, in memory of its own."""
    decoder = copy.copy(model.decoder)
    first, *rest = model.decoder.layers
    qkv = first.qkv.clone()
    if with_nan:
        qkv[0, 0] = float("nan")
    else:
        qkv[: qkv.shape[0] // 2] *= -1
    decoder.layers = [dataclasses.replace(first, qkv=qkv), *rest]
    decoder.mixers = [decoder.softmax_attention] * len(decoder.layers)
    return dataclasses.replace(model, decoder=decoder)


def break_engine(monkeypatch: pytest.MonkeyPatch, name: str, **how: bool) -> None:
    real = getattr(parts, name)
    monkeypatch.setattr(parts, name, lambda model, *rest: real(damaged(model, **how), *rest))


def break_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: WinnowConfig, wanted: tuple[str, ...]) -> Weights:
        weights = load_weights(config, wanted)
        weights.require_model().decoder.layers[1].down[0, 0] += 1.0  # every path sees it, so no comparison of answers can
        return weights

    monkeypatch.setattr(roles, "load_weights", load)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "prefill engine": lambda m: break_engine(m, "PrefillEngine"),
    "decode engine": lambda m: break_engine(m, "DecodeEngine"),
    "not a number": lambda m: break_engine(m, "DecodeEngine", with_nan=True),
    "weights after loading": break_weights,
}


@pytest.mark.promise("R14")
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_wrong_answer_keeps_it_not_serving(config: WinnowConfig, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    FAULTS[fault](monkeypatch)
    process = RoleProcess("all-0", ("prefill", "decode"), config, None)

    with pytest.raises(WrongAnswer, match="warm-up"):
        await process.start()

    try:
        assert process._server is not None
        assert process.reason.startswith("warm-up: ")
        assert await health(process._server.address) == NOT_SERVING
        assert process.info is None
        from winnow.services.common.links import Links

        links = Links(config)
        stub = internal_pb2_grpc.WorkerStub(links.channel(process._server.address))
        with pytest.raises(grpc.RpcError) as refused:
            await stub.Hello(internal_pb2.HelloRequest(), **links.options())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await links.close()
    finally:
        await process.stop()


async def test_a_right_answer_serves(deployment: Deployment) -> None:
    await deployment.start(SPLIT)

    assert [await health(deployment.address(role)) for role in SPLIT] == [SERVING] * 3


async def test_a_model_that_does_not_exist_is_the_reason(config: WinnowConfig) -> None:
    missing = config.model_copy(update={"model": config.model.model_copy(update={"source": "no/such/model/here"})})
    process = RoleProcess("p-0", ("prefill",), missing, None)

    with pytest.raises(WinnowError):
        await process.start()

    assert "model" in process.reason
    await process.stop()
    await process.stop()


@pytest.mark.promise("R14")
async def test_handles_of_an_older_epoch_are_refused(deployment: Deployment) -> None:
    await deployment.start(SPLIT)
    result = await deployment.prefill()
    before = deployment.of("prefill").info
    await deployment.of("prefill").stop()
    await deployment.start({"prefill": ("prefill",)})
    after = deployment.of("prefill").info
    assert before is not None and after is not None
    assert after.epoch > before.epoch

    for call in (deployment.decode(result.segment), deployment.release(result.segment), deployment.open_index(result.segment)):
        with pytest.raises(grpc.RpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.ABORTED
    # A handle that claims the new epoch names a lease that was never granted.
    forged = internal_pb2.SegmentHandle()
    forged.CopyFrom(result.segment)
    forged.owner_epoch = after.epoch
    with pytest.raises(grpc.RpcError) as refused:
        await deployment.decode(forged)
    assert refused.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED)


class AwayStore:
    """A metadata store that is away until `is_back`; keeps what is announced to it."""

    def __init__(self) -> None:
        self.is_back = False
        self.registered: list[WorkerInfo] = []
        self.unregistered: list[tuple[str, int]] = []

    def _check(self) -> None:
        if not self.is_back:
            raise MetadataUnavailable("away")

    async def next_epoch(self, worker_id: str) -> int:
        self._check()
        return 7

    async def register(self, info: WorkerInfo, ttl_s: float) -> None:
        self._check()
        self.registered.append(info)

    async def unregister(self, worker_id: str, epoch: int) -> None:
        self._check()
        self.unregistered.append((worker_id, epoch))


@pytest.mark.promise("R11")
async def test_it_serves_without_the_metadata_store_and_announces_itself_when_it_is_back(config: WinnowConfig) -> None:
    quick = config.model_copy(update={"metadata": config.metadata.model_copy(update={"worker_ttl_s": 0.03})})
    store: Any = AwayStore()
    process = RoleProcess("r-0", ("retrieval",), quick, store)

    info = await process.start()

    try:
        assert info.epoch > 1_600_000_000_000_000
        assert await health(info.address) == SERVING
        from winnow.services.common.links import Links

        links = Links(quick)
        stub = internal_pb2_grpc.WorkerStub(links.channel(info.address))
        store.is_back = True
        while not store.registered:
            await stub.Hello(internal_pb2.HelloRequest(expect=fingerprint_to_proto(info.fingerprint)), **links.options())
        assert store.registered[0] == info
        await process.drain(1.0)
        assert store.unregistered == [("r-0", info.epoch)]
        await links.close()
    finally:
        await process.stop()
