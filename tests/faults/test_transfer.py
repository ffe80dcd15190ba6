"""Segments over a real stream that damages, cuts, stalls or lies; and mapped files that were tampered with (R6, R14, R21)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from winnow.config import AuthConfig, KVConfig, WinnowConfig
from winnow.errors import (
    CorruptBlock,
    DeadlineExceeded,
    InvalidRequest,
    LeaseLost,
    Overloaded,
    UnknownName,
    Unsupported,
    WinnowError,
    WorkerLost,
)
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore
from winnow.index.transfer import CHUNK_BYTES
from winnow.proto.v1 import internal_pb2
from winnow.services.common.auth import INTERNAL
from winnow.services.common.links import Links
from winnow.services.common.server import build_server
from winnow.services.prefill.segments import SegmentsServicer
from winnow.services.transfer import SegmentReader, host_id
from winnow.services.worker import Gate
from winnow.types import SegmentHandle

N_TOKENS, TAIL = 3000, 40
LAYOUT = SegmentLayout(2, 2, 64, "fp32")  # 3000 tokens are 6 MiB: several chunks
Spoil = Callable[[Any], Any]


class SpoiledContext:
    """Stands between the servicer and the wire: may change each message, drop the rest, or stall."""

    def __init__(self, context: Any, spoil: Spoil) -> None:
        self._context = context
        self._spoil = spoil
        self._is_cut = False

    async def write(self, message: Any) -> None:
        changed = None if self._is_cut else await self._spoil(message)
        if changed is None:
            self._is_cut = True
        else:
            await self._context.write(changed)


class SpoiledSegments(SegmentsServicer):
    """The real servicer; its first `times` streams go through `spoil`."""

    spoil: Spoil | None = None
    times = 0
    fetches = 0

    async def Fetch(self, request: Any, context: Any) -> None:
        self.fetches += 1
        if self.spoil is not None and self.fetches <= self.times:
            context = SpoiledContext(context, self.spoil)
        await super().Fetch(request, context)


@dataclass
class Owner:
    """A store with one leased segment, behind a real server."""

    config: WinnowConfig
    store: SegmentStore
    segments: SpoiledSegments
    address: str
    links: Links
    handle: SegmentHandle
    readers: list[SegmentReader] = field(default_factory=list)

    def reader(self, transport: str = "stream", **changes: Any) -> SegmentReader:
        kv = self.config.kv.model_copy(update={"transport": transport, **changes})
        self.readers.append(SegmentReader(kv, host_id(kv), self.links))
        return self.readers[-1]

    async def read(self, reader: SegmentReader, handle: SegmentHandle | None = None) -> tuple[str, list[int], torch.Tensor]:
        async with reader.open(handle or self.handle, self.address, writable=True) as obtained:
            segment = obtained.segment
            assert segment.capacity == N_TOKENS + TAIL
            return obtained.how, segment.token_ids.tolist(), segment.kv[:, :, :, :N_TOKENS].clone()


@pytest_asyncio.fixture
async def owner(tmp_path: Path) -> AsyncIterator[Owner]:
    config = WinnowConfig(auth=AuthConfig(secret="s" * 40), kv=KVConfig(dir=str(tmp_path), budget_bytes=64 << 20))
    store = SegmentStore(LAYOUT, "model", config.kv, "prefill-0", 5, host_id(config.kv))
    lease = store.acquire(range(N_TOKENS), TAIL)
    generator = torch.Generator().manual_seed(3)
    for layer in range(LAYOUT.n_layers):
        k, v = torch.randn(2, 2, N_TOKENS, 64, generator=generator)
        lease.segment.write(layer, 0, k, v)
    lease.segment.advance(list(range(N_TOKENS)))
    handle = store.publish(lease)
    segments = SpoiledSegments(store, Gate())
    server = build_server({"Segments": segments}, config, audience=INTERNAL, port=0)
    made = Owner(config, store, segments, await server.start(), Links(config), handle)
    yield made
    assert [(r.n_open, r.held_bytes) for r in made.readers] == [(0, 0)] * len(made.readers)
    await made.links.close()
    await server.stop()
    store.close()


@pytest.mark.parametrize("transport", ["auto", "map", "stream"])
async def test_map_and_stream_give_the_owner_s_bytes(owner: Owner, transport: str) -> None:
    how, ids, kv = await owner.read(owner.reader(transport))

    assert how == ("stream" if transport == "stream" else "map")
    assert ids == list(range(N_TOKENS))
    assert torch.equal(kv, owner.store.get(owner.handle).kv[:, :, :, :N_TOKENS])
    assert owner.segments.fetches == (1 if transport == "stream" else 0)


async def flip(message: internal_pb2.SegmentChunk) -> internal_pb2.SegmentChunk:
    data = bytearray(message.data)
    data[len(data) // 2] ^= 1
    message.data = bytes(data)
    return message


async def cut(message: internal_pb2.SegmentChunk) -> internal_pb2.SegmentChunk | None:
    return message if message.offset < 2 * CHUNK_BYTES else None


async def skip(message: internal_pb2.SegmentChunk) -> internal_pb2.SegmentChunk:
    if message.offset >= CHUNK_BYTES:
        message.offset += CHUNK_BYTES
    return message


async def foreign(message: internal_pb2.SegmentChunk) -> internal_pb2.SegmentChunk:
    message.header = message.header.replace(b'"n_layers": 2', b'"n_layers": 1')
    return message


SPOILS = {"a flipped bit": flip, "a cut stream": cut, "a gap": skip, "another layout": foreign}


@pytest.mark.faults
@pytest.mark.promise("R21")
@pytest.mark.parametrize("fault", SPOILS)
async def test_a_stream_damaged_once_is_fetched_again(owner: Owner, fault: str) -> None:
    owner.segments.spoil, owner.segments.times = SPOILS[fault], 1

    _, ids, kv = await owner.read(owner.reader())

    assert owner.segments.fetches == 2
    assert ids == list(range(N_TOKENS))
    assert torch.equal(kv, owner.store.get(owner.handle).kv[:, :, :, :N_TOKENS])


@pytest.mark.faults
@pytest.mark.promise("R21")
@pytest.mark.parametrize("fault", SPOILS)
async def test_a_stream_damaged_twice_is_data_loss(owner: Owner, fault: str) -> None:
    owner.segments.spoil, owner.segments.times = SPOILS[fault], 2

    with pytest.raises(CorruptBlock):
        await owner.read(owner.reader())

    assert owner.segments.fetches == 2


@pytest.mark.faults
@pytest.mark.promise("R21")
@pytest.mark.parametrize("transport", ["map", "stream"])
async def test_bytes_damaged_in_the_owner_s_memory_are_never_used(owner: Owner, transport: str) -> None:
    owner.store.get(owner.handle).v(1)[1, 17, 5] += 1.0

    with pytest.raises(CorruptBlock, match="checksum"):
        await owner.read(owner.reader(transport))


@pytest.mark.faults
@pytest.mark.promise("R21")
async def test_a_shortened_file_is_refused(owner: Owner) -> None:
    segment = owner.store.get(owner.handle)
    assert segment.path is not None
    copy = segment.path.read_bytes()
    segment.path.unlink()  # the owner's mapping stays whole
    segment.path.write_bytes(copy[: len(copy) // 2])

    with pytest.raises(CorruptBlock, match="bytes"):
        await owner.read(owner.reader("map"))


@pytest.mark.faults
@pytest.mark.promise("R6")
async def test_cancel_in_the_middle_of_a_stream_frees_the_copy(owner: Owner) -> None:
    arrived, never = asyncio.Event(), asyncio.Event()

    async def stall(message: internal_pb2.SegmentChunk) -> internal_pb2.SegmentChunk:
        if message.offset >= CHUNK_BYTES:
            arrived.set()
            await never.wait()
        return message

    owner.segments.spoil, owner.segments.times = stall, 1
    reader = owner.reader()
    task = asyncio.create_task(owner.read(reader))
    await arrived.wait()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (reader.n_open, reader.held_bytes) == (0, 0)
    async with asyncio.timeout(5.0):
        await owner.segments._gate.wait_empty()  # the owner's side ended too


REFUSED: dict[str, tuple[dict[str, Any], type[WinnowError]]] = {
    "a path": ({"location": "../prefill-0.5.kv"}, InvalidRequest),
    "an absolute path": ({"location": "/etc/passwd"}, InvalidRequest),
    "a hidden file": ({"location": ".kv"}, InvalidRequest),
    "an older epoch": ({"owner_epoch": 4}, LeaseLost),
    "a newer epoch": ({"owner_epoch": 6}, LeaseLost),
    "another owner": ({"owner": "prefill-1"}, UnknownName),
    "a lease never granted": ({"fencing": 99}, UnknownName),
    "another segment": ({"segment_id": "prefill-0.5.x.7"}, UnknownName),
    "another checksum": ({"checksum": "0" * 32}, CorruptBlock),
    "another layout": ({"kv_layout": "f" * 32}, CorruptBlock),
}


@pytest.mark.promise("R14")
@pytest.mark.parametrize("transport", ["map", "stream"])
@pytest.mark.parametrize("case", REFUSED)
async def test_a_handle_that_does_not_hold_is_refused(owner: Owner, transport: str, case: str) -> None:
    changes, error = REFUSED[case]

    with pytest.raises(error):
        await owner.read(owner.reader(transport), dataclasses.replace(owner.handle, **changes))


async def test_a_released_lease_is_lost(owner: Owner) -> None:
    owner.store.release(owner.handle)

    for transport in ("map", "stream"):
        with pytest.raises(LeaseLost):
            await owner.read(owner.reader(transport))


async def test_copies_are_counted_against_the_budget(owner: Owner) -> None:
    reader = owner.reader(budget_bytes=8 << 20)

    async with reader.open(owner.handle, owner.address, writable=True) as first:
        assert reader.held_bytes == first.segment.size_bytes
        with pytest.raises(Overloaded, match="budget 8388608 bytes"):
            await owner.read(reader)
        assert reader.held_bytes == first.segment.size_bytes


async def test_forcing_the_map_across_hosts_names_the_setting(owner: Owner) -> None:
    far = dataclasses.replace(owner.handle, host_id="another host")

    with pytest.raises(Unsupported, match=r"kv\.transport"):
        await owner.read(owner.reader("map"), far)
    assert (await owner.read(owner.reader("auto"), far))[0] == "stream"


async def test_without_an_address_the_owner_cannot_be_asked(owner: Owner) -> None:
    with pytest.raises(InvalidRequest, match="owner_address"):
        async with owner.reader("auto").open(owner.handle, "", writable=True):
            pass


@pytest.mark.faults
async def test_an_owner_that_is_gone_is_a_lost_worker(owner: Owner) -> None:
    with pytest.raises((WorkerLost, DeadlineExceeded)):
        async with asyncio.timeout(20.0), owner.reader().open(owner.handle, "127.0.0.1:9", writable=True):
            pass


def test_host_id_tells_folders_apart_by_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    ids = [host_id(KVConfig(dir=str(tmp_path / name))) for name in ("a", "b", "link", "a")]

    assert ids[0] == ids[2] == ids[3]
    assert ids[0] != ids[1]
    assert np.unique(ids).size == 2
