"""A real gateway over real gRPC. `StandIn` plays the workers where a test must decide when and how they answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from winnow.client_async import AsyncClient
from winnow.config import AuthConfig, GatewayConfig, KVConfig, ModelConfig, PrefillConfig, WinnowConfig
from winnow.errors import WinnowError
from winnow.index.layout import SegmentLayout
from winnow.proto.v1 import common_pb2, internal_pb2
from winnow.services.common import deadlines
from winnow.services.common.auth import INTERNAL, mint
from winnow.services.common.server import RpcServer, build_server
from winnow.services.gateway.methods import versions
from winnow.services.gateway.server import Gateway
from winnow.types import Fingerprint, WorkerInfo
from winnow.wire import PROTOCOL, worker_to_proto
from winnow.workers.model.loader import load_tokenizer
from winnow.workers.model.tiny import make_tiny_model

SECRET = "a-signing-secret-for-tests-only-0123456789"
ALL_ROLES = ("prefill", "retrieval", "draft", "decode")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def bundle(tiny_folder: Path) -> Any:
    return load_tokenizer(str(tiny_folder))


@pytest.fixture
def config(tiny_folder: Path) -> WinnowConfig:
    return WinnowConfig(
        model=ModelConfig(source=str(tiny_folder), name="tiny", dtype="fp32", device="cpu"),
        gateway=GatewayConfig(port=0, max_inflight=2, max_queue=1, default_deadline_s=20.0, max_message_bytes=8 << 20),
        auth=AuthConfig(secret=SECRET),
        prefill=PrefillConfig(break_even=False),  # prompts here are too short to gain by a sparse method
        kv=KVConfig(lease_s=1.5),
    )


class StandIn:
    """Every internal service in one process. What it was asked is kept; what it answers is set by the test.

    Attributes:
        text: decoded by the "model", one token an event.
        hold: the stage that waits until `go` is set ("prefill", "decode" or "").
        fail: stage -> error raised when that stage starts.
    """

    def __init__(self, worker_id: str, bundle: Any, roles: tuple[str, ...] = ALL_ROLES) -> None:
        tokenizer, spec, model = bundle
        layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, "fp32").digest()
        self.tokenizer = tokenizer
        self.info = WorkerInfo(worker_id, 1, roles, "", "host", Fingerprint(PROTOCOL, model, layout, "fp32", 1, versions()))
        self.text = "hello world"
        self.finish = "eos"
        self.fallback = ""
        self.prefill: dict[str, Any] = {}  # more fields of the prefill's result
        self.hold = ""
        self.go = asyncio.Event()
        self.fail: dict[str, WinnowError | BaseException] = {}
        self.entered = {stage: asyncio.Event() for stage in ("prefill", "decode", "rank")}
        self.cancelled = {stage: asyncio.Event() for stage in ("prefill", "decode", "rank")}
        self.released = asyncio.Event()
        self.renewed = asyncio.Event()
        self.asked: list[tuple[str, Any, float]] = []
        self.leases = 0
        self.server: RpcServer | None = None

    async def start(self, config: WinnowConfig) -> str:
        services = {name: self for name in ("Worker", "Prefill", "Segments", "Retrieval", "Draft", "Decode")}
        self.server = build_server(services, config, audience=INTERNAL, port=0)
        address = await self.server.start()
        self.info = WorkerInfo(**{**vars(self.info), "address": address})
        return address

    async def _stage(self, stage: str, request: Any) -> None:
        self.asked.append((stage, request, deadlines.remaining() or 0.0))
        if stage in self.entered:
            self.entered[stage].set()
        if stage in self.fail:
            raise self.fail[stage]
        if self.hold == stage:
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled[stage].set()
                raise

    def requests(self, stage: str) -> list[Any]:
        return [request for name, request, _ in self.asked if name == stage]

    async def Hello(self, request: Any, context: Any) -> Any:
        if "hello" in self.fail:
            raise self.fail["hello"]
        return internal_pb2.HelloReply(info=worker_to_proto(self.info))

    async def Load(self, request: Any, context: Any) -> Any:
        return internal_pb2.LoadReply(running=self.leases)

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[Any]:
        total = len(request.token_ids)
        yield internal_pb2.PrefillEvent(progress=common_pb2.Progress(stage="prefill", done=0, total=total))
        await self._stage("prefill", request)
        self.leases += 1
        handle = internal_pb2.SegmentHandle(
            segment_id="s1", owner=self.info.worker_id, owner_epoch=1, host_id="host", location="s1", n_tokens=total - 1,
            capacity=total + request.tail_tokens, fencing=1,
        )  # fmt: skip
        yield internal_pb2.PrefillEvent(result=internal_pb2.PrefillResult(segment=handle, density=1.0, **self.prefill))

    async def Rank(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._stage("rank", request)
        items = [common_pb2.RankedDocument(doc_id=d.doc_id, score=-i, rank=i + 1) for i, d in enumerate(request.documents)]
        yield internal_pb2.RankTaskEvent(ranking=common_pb2.Ranking(items=items, method=request.ranker.name))

    async def Renew(self, request: Any, context: Any) -> Any:
        self.renewed.set()
        if "renew" in self.fail:
            raise self.fail["renew"]
        return internal_pb2.LeaseReply(ttl_s=request.ttl_s)

    async def Release(self, request: Any, context: Any) -> Any:
        self.asked.append(("release", request, 0.0))
        self.leases -= 1
        self.released.set()
        return internal_pb2.ReleaseReply()

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise AssertionError("nothing here fetches")
        yield

    async def Open(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._stage("open", request)
        yield internal_pb2.OpenIndexEvent(result=internal_pb2.OpenIndexResult(index_id="i1", index=request.index))

    async def Attend(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        raise AssertionError("the stand-in's decode reads nothing")
        yield

    async def Close(self, request: Any, context: Any) -> Any:
        self.asked.append(("close", request, 0.0))
        return internal_pb2.CloseIndexReply()

    async def Score(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._stage("score", request)
        kept = [*range(0, len(request.token_ids), 2)]
        yield internal_pb2.ScoreEvent(result=internal_pb2.ScoreResult(kept=sorted({*kept, len(request.token_ids) - 1})))

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        ids = self.tokenizer.encode(self.text)[: request.sampling.max_tokens]
        if not ids or self.hold == "decode" or "decode" in self.fail:
            await self._stage("decode", request)
        else:
            self.asked.append(("decode", request, deadlines.remaining() or 0.0))
        for sequence, token in enumerate(ids):
            last = sequence == len(ids) - 1
            yield internal_pb2.DecodeEvent(
                sequence=sequence,
                token_ids=[token],
                finish_reason=self.finish if last else "",
                keys_read_share=0.25,
                fallback_used=self.fallback if last else "",
            )


Start = Callable[..., Awaitable[tuple[Gateway, AsyncClient]]]


@pytest.fixture
async def stand_in(bundle: Any) -> StandIn:
    return StandIn("worker-0", bundle)


@pytest.fixture
async def start(config: WinnowConfig, bundle: Any) -> AsyncIterator[Start]:
    """Start a gateway over the given stand-ins; returns it with a client that holds a good token."""
    async with AsyncExitStack() as stack:

        async def go(*workers: StandIn, **changes: Any) -> tuple[Gateway, AsyncClient]:
            changed = config.model_copy(
                update={part: getattr(config, part).model_copy(update=value) for part, value in changes.items()}
            )
            addresses = []
            for worker in workers:
                addresses.append(await worker.start(changed))
                stack.push_async_callback(worker.server.stop, 0)
            gateway = Gateway(changed, None, bundle, workers=addresses, poll_s=0.1)
            address = await gateway.start()
            client = AsyncClient(address, mint(SECRET))
            stack.push_async_callback(gateway.stop)
            stack.push_async_callback(client.close)
            return gateway, client

        yield go
