"""Retrieval service: builds an index over a segment and answers a decoding sequence's queries, one stream a sequence.

A search of a short context takes less time than two changes of thread, so it runs in the event loop; as soon as an
index's searches get long they move to that index's own thread, and the loop stays free for health and other streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import numpy as np
import torch

from winnow.errors import InvalidRequest
from winnow.proto.v1 import common_pb2, internal_pb2, internal_pb2_grpc
from winnow.services.bridge import IsCancelled, OnProgress, in_thread
from winnow.services.prefill.servicer import note_request
from winnow.services.retrieval.book import IndexBook, OpenIndex
from winnow.services.transfer import SegmentReader
from winnow.services.worker import Gate
from winnow.wire import handle_from_proto
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.local_retrieval import SegmentIndex
from winnow.workers.model.spec import ModelSpec

INLINE_S = 0.002  # a search longer than this leaves the event loop; a change of thread and back costs about 0.2 ms
_MEAN_WEIGHT = 0.1


class RetrievalServicer(internal_pb2_grpc.RetrievalServicer):
    """Indexes of one process.

    Args:
        spec: of the served model: says which layers have a window (they are never searched) and the query heads.
        threads: that build one index.
    """

    def __init__(self, spec: ModelSpec, reader: SegmentReader, book: IndexBook, gate: Gate, threads: int = 1) -> None:
        self._spec = spec
        self._reader = reader
        self._book = book
        self._gate = gate
        self._threads = threads
        self._builders = ThreadPoolExecutor(2, "winnow-index")

    async def Open(self, request: internal_pb2.OpenIndexRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """See internal.proto. Raises as `SegmentReader.open` and `SegmentIndex`; cancelling stops between two heads."""
        note_request(request.request_id)
        handle = handle_from_proto(request.segment)
        started = time.monotonic()
        searched = [layer.idx for layer in self._spec.layers if not layer.window]

        async def report(done: int, total: int) -> None:
            await context.write(internal_pb2.OpenIndexEvent(progress=common_pb2.Progress(stage="index", done=done, total=total)))

        with self._gate.work():
            async with AsyncExitStack() as stack:
                obtained = await stack.enter_async_context(self._reader.open(handle, request.owner_address, writable=False))

                def build(on_progress: OnProgress, is_cancelled: IsCancelled) -> SegmentIndex:
                    return SegmentIndex(
                        obtained.segment, request.index or "auto", request.sink_tokens, request.recent_tokens, on_progress,
                        layers=searched, threads=self._threads, is_cancelled=is_cancelled,
                    )  # fmt: skip

                index = await in_thread(self._builders, build, report)
                entry = self._book.add(index, handle, stack.pop_all())
            result = internal_pb2.OpenIndexResult(
                index_id=entry.index_id, index=index.spec, keys=index.n_keys, build_s=time.monotonic() - started
            )
            # Should the caller leave before it reads this, the index goes when nobody has used it for a while.
            await context.write(internal_pb2.OpenIndexEvent(result=result))

    async def Attend(
        self, requests: AsyncIterator[internal_pb2.AttendRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Answers in order. Raises UnknownName for an index that is not open, InvalidRequest for a field that does not fit."""
        with self._gate.work(is_new=False):
            first = await anext(aiter(requests), None)
            if first is None:
                return
            with self._book.attached(first.index_id) as entry:
                await context.write(await self._answer(entry, first))
                async for request in requests:
                    if request.index_id not in ("", entry.index_id):
                        raise InvalidRequest("index_id: one stream serves one index; open another stream for another one")
                    await context.write(await self._answer(entry, request))

    async def Close(
        self, request: internal_pb2.CloseIndexRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> internal_pb2.CloseIndexReply:
        await self._book.close(request.index_id)
        return internal_pb2.CloseIndexReply()

    def stop(self) -> None:
        self._builders.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, entry: OpenIndex, request: internal_pb2.AttendRequest) -> internal_pb2.AttendReply:
        layer, q = self._checked(request)
        if entry.mean_s > INLINE_S:
            return await asyncio.get_running_loop().run_in_executor(entry.pool, _search, entry, layer, q, request.top_k)
        return _search(entry, layer, q, request.top_k)

    def _checked(self, request: internal_pb2.AttendRequest) -> tuple[LayerSpec, torch.Tensor]:
        if not 0 <= request.layer < self._spec.n_layers:
            raise InvalidRequest(f"layer must be in [0, {self._spec.n_layers}), got {request.layer}")
        if not 0.0 <= request.softcap < float("inf") or not 0.0 < request.scale < float("inf"):
            raise InvalidRequest("scale must be a positive and softcap a non-negative finite number")
        spec = self._spec.layers[request.layer]
        shape = (spec.n_q_heads, spec.head_size)
        if len(request.q) != 4 * shape[0] * shape[1]:
            raise InvalidRequest(f"q must be {4 * shape[0] * shape[1]} bytes (float32 {list(shape)}), got {len(request.q)}")
        q = torch.frombuffer(bytearray(request.q), dtype=torch.float32).view(shape)
        layer = LayerSpec(spec.idx, *shape_of(spec), scale=request.scale, softcap=request.softcap, window=spec.window)
        return layer, q


def shape_of(layer: LayerSpec) -> tuple[int, int, int]:
    """(Hq, Hkv, D)."""
    return layer.n_q_heads, layer.n_kv_heads, layer.head_size


def _search(entry: OpenIndex, layer: LayerSpec, q: torch.Tensor, top_k: int) -> internal_pb2.AttendReply:
    started = time.perf_counter()
    found = entry.index.attend(layer, q, top_k)
    reply = internal_pb2.AttendReply(
        layer=layer.idx, out=_bytes(found.out), lse=_bytes(found.lse), keys_scanned=found.keys_scanned, keys_read=found.keys_read
    )
    entry.mean_s += _MEAN_WEIGHT * (time.perf_counter() - started - entry.mean_s)
    return reply


def _bytes(values: torch.Tensor) -> bytes:
    array = values.detach().cpu().contiguous().numpy()
    return array.astype(np.dtype("<f4"), copy=False).tobytes()
