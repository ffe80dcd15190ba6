"""Segments service of the process that owns the bytes: stream, renew, release, and the sweep of expired leases."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from winnow.index.store import SegmentStore
from winnow.index.transfer import iter_chunks
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.worker import Gate
from winnow.wire import handle_from_proto


class SegmentsServicer(internal_pb2_grpc.SegmentsServicer):
    """Answers for one store. Nothing here is new work: holders must be able to finish while the process drains."""

    def __init__(self, store: SegmentStore, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    async def Fetch(self, request: internal_pb2.FetchRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """The sealed bytes, verified first, then a chunk at a time: `write` waits for the reader, so one chunk is held.

        Raises:
            LeaseLost, UnknownName: see `SegmentStore.get`. CorruptBlock: the bytes here are damaged.
        """
        with self._gate.work(is_new=False):
            segment = self._store.get(handle_from_proto(request.segment))
            await asyncio.to_thread(segment.verify)
            chunks = iter_chunks(segment)
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                await context.write(
                    internal_pb2.SegmentChunk(
                        header=chunk.header, offset=chunk.offset, data=chunk.data, checksum=chunk.checksum, last=chunk.last
                    )
                )

    async def Renew(
        self, request: internal_pb2.LeaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> internal_pb2.LeaseReply:
        """Raises LeaseLost, UnknownName, InvalidRequest: see `SegmentStore.renew`."""
        return internal_pb2.LeaseReply(ttl_s=self._store.renew(handle_from_proto(request.segment), request.ttl_s))

    async def Release(
        self, request: internal_pb2.ReleaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> internal_pb2.ReleaseReply:
        """Raises LeaseLost, UnknownName: see `SegmentStore.release`. In a thread: a tail that is kept is hashed."""
        await asyncio.to_thread(self._store.release, handle_from_proto(request.segment), list(request.tail_token_ids))
        return internal_pb2.ReleaseReply()


async def sweep_forever(store: SegmentStore) -> None:
    """Free what expired leases held, until cancelled. Orphans go within a lease time and a quarter (R13)."""
    while True:
        await asyncio.sleep(min(store.config.lease_s / 4, 5.0))
        await asyncio.to_thread(store.sweep)
