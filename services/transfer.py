"""How a role gets hold of a segment that another process owns: by reference, by mapping the file, or as a stream.

    same process          the store's own object ("reference")
    same host             the file, mapped ("map"): nothing is copied, the tail is written behind the sealed tokens
    another host or GPU   Segments.Fetch into a copy of our own ("stream"): checksummed chunks, one in memory at a time

The owner is asked first whichever way it is (Segments.Renew): it alone knows whether epoch, lease and fencing token are
still good, so a handle of a restarted owner is refused before a byte is read (promises R12, R14). Sealed bytes are hashed
before they are used (R21); a stream that arrives damaged or cut is fetched once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Counter

from winnow import telemetry
from winnow.config import KVConfig
from winnow.errors import ConfigError, CorruptBlock, InvalidRequest, Overloaded, Unsupported
from winnow.index.folder import candidate_folders, make_private, open_handle
from winnow.index.segment import KVSegment
from winnow.index.store import SegmentStore
from winnow.index.transfer import Chunk, SegmentReceiver
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common.links import Links, translated
from winnow.types import SegmentHandle
from winnow.wire import handle_to_proto

FETCH_ATTEMPTS = 2  # a damaged stream is tried once more: the owner's bytes are verified there, the link may have been at fault
TRANSFERS = Counter("winnow_kv_transfers_total", "Segments obtained from their owner", ["how"])
CORRUPT_STREAMS = Counter("winnow_kv_corrupt_streams_total", "Segment streams that arrived damaged or cut")
log = telemetry.get_logger("transfer")


def host_id(config: KVConfig) -> str:
    """Equal for processes that can map each other's segment files, and only for those.

    Digest of boot id, user, and device and inode of each folder a segment may lie in: two processes agree exactly when the
    same running kernel shows both the same folders. So containers with a /dev/shm of their own differ, containers that share
    one agree, whatever the folder is called in each.
    """
    parts = [_boot_id(), str(os.getuid())]
    for folder in candidate_folders(config):
        try:
            found = make_private(folder).stat()
        except ConfigError:
            parts.append("none")
            continue
        parts.append(f"{found.st_dev}:{found.st_ino}")
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename  # not Linux: one kernel per machine name


@dataclass(frozen=True)
class Obtained:
    """A segment at hand. `how`: "reference", "map" or "stream"; `handle` names the original, not the copy."""

    segment: KVSegment
    handle: SegmentHandle
    how: str


class SegmentReader:
    """Obtains segments for one process, and counts what it holds.

    Args:
        store: of this process, if it has the prefill role.
        device: where streamed copies go.
        budget_bytes: most bytes of streamed copies at once; mapped segments cost their owner's budget.
    """

    def __init__(self, config: KVConfig, host: str, links: Links, store: SegmentStore | None = None, device: str = "cpu") -> None:
        self._config = config
        self._host = host
        self._links = links
        self._store = store
        self._device = device
        self.budget_bytes = config.budget_bytes
        self.held_bytes = 0  # of streamed copies
        self.n_open = 0

    @contextlib.asynccontextmanager
    async def open(self, handle: SegmentHandle, owner_address: str, *, writable: bool) -> AsyncIterator[Obtained]:
        """The segment of a live lease, which is renewed once; the copy or mapping is let go after the block.

        Who asked for the work keeps the lease (the gateway renews it while a request runs). Should it be lost all the same, the
        work may end in peace: the bytes at hand stay what they are, and nobody reads the tail of a lost lease.

        Args:
            owner_address: host:port of the owner's Segments service; not needed in the owner's process.
            writable: the tail will be written; otherwise a mapping is copy-on-write.

        Raises:
            LeaseLost, UnknownName: the owner does not know the lease (any more), or is of another epoch.
            InvalidRequest: a location that is not a bare file name, or no owner_address where one is needed.
            CorruptBlock: the bytes are not those that were sealed.
            Overloaded: no room for a copy. WorkerLost: the owner is gone.
            Unsupported: kv.transport demands a way that is not possible here.
        """
        _check_location(handle.location)
        obtained = await self._obtain(handle, owner_address, writable=writable)
        TRANSFERS.labels(how=obtained.how).inc()
        self.n_open += 1
        try:
            yield obtained
        finally:
            self.n_open -= 1
            if obtained.how != "reference":  # the store's own object is the store's to close
                obtained.segment.close()
            if obtained.how == "stream":
                self.held_bytes -= obtained.segment.size_bytes

    async def _obtain(self, handle: SegmentHandle, owner_address: str, *, writable: bool) -> Obtained:
        transport = self._config.transport
        if self._is_own(handle) and transport != "stream":
            assert self._store is not None
            self._store.renew(handle)
            return Obtained(self._store.get(handle), handle, "reference")
        if not owner_address:
            raise InvalidRequest("owner_address: needed to reach the owner of the segment, got none")
        await self._renew(handle, owner_address)
        can_map = handle.host_id == self._host and bool(handle.location) and self._device == "cpu"
        if transport == "map" and not can_map:
            raise Unsupported(
                f"segment {handle.segment_id}: kv.transport=map, but its owner is on another host or keeps it on a device; "
                "set kv.transport=auto"
            )
        if transport != "stream" and can_map:
            segment = await asyncio.to_thread(self._map, handle, writable)
            return Obtained(segment, handle, "map")
        return Obtained(await self._fetch(handle, owner_address), handle, "stream")

    def _is_own(self, handle: SegmentHandle) -> bool:
        return self._store is not None and handle.owner == self._store.owner

    def _map(self, handle: SegmentHandle, writable: bool) -> KVSegment:
        segment = open_handle(handle, self._config, writable=writable)
        try:
            segment.verify()
        except CorruptBlock:
            segment.close()
            raise
        return segment

    async def _fetch(self, handle: SegmentHandle, owner_address: str) -> KVSegment:
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                return await self._fetch_once(handle, owner_address)
            except CorruptBlock:
                CORRUPT_STREAMS.inc()
                if attempt == FETCH_ATTEMPTS:
                    raise
                log.warning("segment stream damaged, fetching again", segment_id=handle.segment_id, owner=handle.owner)
        raise AssertionError("the loop above returns or raises")

    async def _fetch_once(self, handle: SegmentHandle, owner_address: str) -> KVSegment:
        receiver = SegmentReceiver(expect=handle, tail_tokens=handle.capacity - handle.n_tokens, device=self._device)
        stub = internal_pb2_grpc.SegmentsStub(self._links.channel(owner_address))
        booked = 0
        try:
            with translated(handle.owner):
                call = stub.Fetch(internal_pb2.FetchRequest(segment=handle_to_proto(handle)), **self._links.options())
                try:
                    async for message in call:  # reading one at a time: the sender waits for us, so one chunk is held
                        chunk = Chunk(message.header, message.offset, message.data, message.checksum, message.last)
                        await asyncio.to_thread(receiver.push, chunk)
                        if not booked:
                            booked = self._book(receiver)
                finally:
                    call.cancel()
            return await asyncio.to_thread(receiver.finish)
        except BaseException:
            receiver.abort()
            self.held_bytes -= booked
            raise

    def _book(self, receiver: SegmentReceiver) -> int:
        """Count a copy's bytes against the budget as soon as its first chunk says how many they are."""
        size = receiver.size_bytes
        if self.held_bytes + size > self.budget_bytes:
            raise Overloaded(
                f"KV: {size} bytes needed for a copy of the segment, budget {self.budget_bytes} bytes, {self.held_bytes} of them "
                "in use; wait, or raise kv.budget_bytes"
            )
        self.held_bytes += size
        return size

    async def _renew(self, handle: SegmentHandle, owner_address: str) -> None:
        request = internal_pb2.LeaseRequest(segment=handle_to_proto(handle))
        with translated(handle.owner):
            stub = internal_pb2_grpc.SegmentsStub(self._links.channel(owner_address))
            await stub.Renew(request, **self._links.options())


def _check_location(location: str) -> None:
    if location and (location != os.path.basename(location) or location.startswith(".")):
        raise InvalidRequest("segment.location must be a bare file name, without folders")
