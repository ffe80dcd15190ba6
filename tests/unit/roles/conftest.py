"""Roles over real gRPC on loopback, on a tiny model: each RoleProcess has its own store, server and channels."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
import torch

from winnow.config import AuthConfig, KVConfig, ModelConfig, PrefillConfig, TelemetryConfig, WinnowConfig
from winnow.proto.v1 import common_pb2, internal_pb2, internal_pb2_grpc
from winnow.services.common.links import Links
from winnow.services.roles import RoleProcess
from winnow.workers.model.tiny import make_tiny_model

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
SPLIT = {"prefill": ("prefill",), "decode": ("decode",), "retrieval": ("retrieval",)}
SINGLE = {"all": ("prefill", "decode", "retrieval", "draft")}
WIDE = {"sink_tokens": "4", "recent_tokens": "16", "top_k": "4096"}  # finds every key, so that the answer is the dense one
PROMPT = [(i * 37) % 300 + 3 for i in range(150)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model_dir: Path, tmp_path: Path) -> WinnowConfig:
    return WinnowConfig(
        model=ModelConfig(source=str(model_dir), dtype="fp32", device="cpu", threads=1),
        auth=AuthConfig(secret="s" * 40),
        prefill=PrefillConfig(chunk_tokens=64),
        kv=KVConfig(dir=str(tmp_path), budget_bytes=64 << 20),
        telemetry=TelemetryConfig(metrics=False),
    )


def with_kv(config: WinnowConfig, **changes: Any) -> WinnowConfig:
    return config.model_copy(update={"kv": config.kv.model_copy(update=changes)})


@dataclass
class Deployment:
    """Started processes, and the calls a gateway makes to them."""

    config: WinnowConfig
    links: Links
    processes: dict[str, RoleProcess] = field(default_factory=dict)

    async def start(self, processes: dict[str, tuple[str, ...]], config: WinnowConfig | None = None) -> Deployment:
        for name, roles in processes.items():
            process = self.processes[name] = RoleProcess(f"{name}-0", roles, config or self.config, None)
            await process.start()
        return self

    def of(self, role: str) -> RoleProcess:
        return next(p for p in self.processes.values() if role in p.roles)

    def address(self, role: str) -> str:
        info = self.of(role).info
        assert info is not None
        return info.address

    def stub(self, kind: Callable[[Any], Any], role: str) -> Any:
        return kind(self.links.channel(self.address(role)))

    def prefill_call(self, token_ids: list[int] = PROMPT, tail_tokens: int = 40, **fields: Any) -> Any:
        request = internal_pb2.PrefillRequest(request_id="r", token_ids=token_ids, tail_tokens=tail_tokens, **fields)
        return self.stub(internal_pb2_grpc.PrefillStub, "prefill").Prefill(request, **self.links.options())

    async def prefill(self, token_ids: list[int] = PROMPT, tail_tokens: int = 40, **fields: Any) -> internal_pb2.PrefillResult:
        events = [event async for event in self.prefill_call(token_ids, tail_tokens, **fields)]
        assert [e.WhichOneof("event") for e in events].count("result") == 1
        return events[-1].result

    async def open_index(self, segment: internal_pb2.SegmentHandle, index: str = "flat", **fields: Any) -> str:
        request = internal_pb2.OpenIndexRequest(
            request_id="r", segment=segment, owner_address=self.address("prefill"), index=index,
            **{"sink_tokens": 4, "recent_tokens": 16, **fields},
        )  # fmt: skip
        events = [e async for e in self.stub(internal_pb2_grpc.RetrievalStub, "retrieval").Open(request, **self.links.options())]
        return str(events[-1].result.index_id)

    async def close_index(self, index_id: str) -> None:
        request = internal_pb2.CloseIndexRequest(index_id=index_id)
        await self.stub(internal_pb2_grpc.RetrievalStub, "retrieval").Close(request, **self.links.options())

    def decode_call(self, segment: internal_pb2.SegmentHandle, last: int = PROMPT[-1], n: int = 24, **fields: Any) -> Any:
        request = internal_pb2.DecodeRequest(
            request_id="r", segment=segment, owner_address=self.address("prefill"), last_token_id=last,
            sampling=common_pb2.Sampling(max_tokens=n, ignore_eos=True), **{"method": common_pb2.Method(name="dense"), **fields},
        )  # fmt: skip
        return self.stub(internal_pb2_grpc.DecodeStub, "decode").Decode(request, **self.links.options())

    async def decode(
        self, segment: internal_pb2.SegmentHandle, last: int = PROMPT[-1], n: int = 24, **fields: Any
    ) -> tuple[list[int], internal_pb2.DecodeEvent]:
        """(token ids, last event)."""
        events = [event async for event in self.decode_call(segment, last, n, **fields)]
        assert [e.sequence for e in events] == list(range(len(events)))
        return [t for e in events for t in e.token_ids], events[-1]

    def retrieval_fields(self, index_id: str, **params: str) -> dict[str, Any]:
        method = common_pb2.Method(name="retrieval-attention", params={**WIDE, **params})
        return {"method": method, "retrieval_address": self.address("retrieval"), "index_id": index_id}

    async def release(self, segment: internal_pb2.SegmentHandle, tail: tuple[int, ...] = ()) -> None:
        request = internal_pb2.ReleaseRequest(segment=segment, tail_token_ids=tail)
        await self.stub(internal_pb2_grpc.SegmentsStub, "prefill").Release(request, **self.links.options())

    async def idle(self) -> dict[str, int]:
        """Ledgers of all processes added up, once no call runs."""
        total: dict[str, int] = {}
        for process in self.processes.values():
            await process.gate.wait_empty()
            for name, n in process.ledgers().items():
                total[name] = total.get(name, 0) + n
            if process._parts is not None and process._parts.store is not None:
                process._parts.store.check()
        return total


@pytest_asyncio.fixture
async def deployment(config: WinnowConfig, tmp_path: Path) -> AsyncIterator[Deployment]:
    """Nothing is started yet. After the test everything is stopped, and no segment file may be left."""
    made = Deployment(config, Links(config))
    yield made
    for process in made.processes.values():
        await process.stop()
    await made.links.close()
    assert list(tmp_path.rglob("*.kv")) == []


async def rest(call: Any) -> list[Any]:
    """The messages left in a call of which some were read. Raises its RpcError."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


def nothing(**but: int) -> dict[str, int]:
    names = ("inflight", "jobs", "leases", "open_segments", "copied_bytes", "indexes")
    return {**dict.fromkeys(names, 0), **but}
