"""What every role answers, whatever its work: the handshake, its load, and whether it takes new work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc.aio

from winnow.errors import Draining, Skewed, WorkerLost
from winnow.index.base import indexes
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.types import Fingerprint, WorkerInfo
from winnow.wire import fingerprint_from_proto, worker_to_proto
from winnow.workers.decode.base import decode_methods
from winnow.workers.draft.base import draft_scorers
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.ranking.base import rankers


class Gate:
    """Counts work in flight, and refuses new work while the process is not ready or drains."""

    def __init__(self) -> None:
        self._state = "starting"
        self._empty = asyncio.Event()
        self._empty.set()
        self.inflight = 0

    @property
    def state(self) -> str:
        """ "starting", "open" or "draining"."""
        return self._state

    def open(self) -> None:
        self._state = "open"

    def close(self) -> None:
        self._state = "draining"

    def check(self) -> None:
        """Raises WorkerLost while starting (or after a wrong warm-up answer), Draining while shutting down."""
        if self._state == "starting":
            raise WorkerLost("this worker is not ready yet; try another one, or again in a moment")
        if self._state == "draining":
            raise Draining("this worker is shutting down and takes no new work; try another one")

    @contextlib.contextmanager
    def work(self, *, is_new: bool = True) -> Iterator[None]:
        """Count the block as work in flight. `is_new` False: it belongs to work already taken, and is let in while draining."""
        if is_new:
            self.check()
        self.inflight += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.inflight -= 1
            if not self.inflight:
                self._empty.set()

    async def wait_empty(self) -> None:
        await self._empty.wait()


class WorkerServicer(internal_pb2_grpc.WorkerServicer):
    """Hello and Load of one process. `load` is asked on each call."""

    def __init__(self, info: Callable[[], WorkerInfo], load: Callable[[], internal_pb2.LoadReply], gate: Gate) -> None:
        self._info = info
        self._load = load
        self._gate = gate

    async def Hello(
        self, request: internal_pb2.HelloRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> internal_pb2.HelloReply:
        """See internal.proto. Raises Skewed naming the first field that differs; Draining, WorkerLost from the gate."""
        self._gate.check()
        info = self._info()
        problem = first_difference(fingerprint_from_proto(request.expect), info.fingerprint)
        if problem:
            raise Skewed(f"{info.worker_id}: {problem}; start both sides from one version and one configuration")
        return internal_pb2.HelloReply(info=worker_to_proto(info))

    async def Load(
        self, request: internal_pb2.LoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> internal_pb2.LoadReply:
        return self._load()


def method_versions() -> tuple[str, ...]:
    """ "name@version" of every method this build can run, sorted, for a Fingerprint."""
    registries = (prefill_methods, decode_methods, draft_scorers, rankers, indexes)
    found = (entry for registry in registries for entry in registry)
    return tuple(sorted({f"{e.name}@{e.cls.caps.version}" for e in found if e.cls is not None}))


def first_difference(expect: Fingerprint, actual: Fingerprint) -> str:
    """The first field in which two parts differ, as text; "" = they fit.

    A field the caller leaves empty is not compared (a draft worker may hold another model), but the protocol always is.
    Methods are compared by version where both sides know the name: a method only one side has is refused at admission.
    """
    if expect.protocol != actual.protocol:
        return f"protocol differs: expected {expect.protocol}, this worker has {actual.protocol}"
    for name in ("model", "kv_layout", "dtype", "tensor_parallel"):
        wanted, ours = getattr(expect, name), getattr(actual, name)
        if wanted and wanted != ours:
            return f"{name} differs: expected {wanted}, this worker has {ours or 'none'}"
    ours_by_name = dict(m.partition("@")[::2] for m in actual.methods)
    for method in expect.methods:
        name, _, version = method.partition("@")
        if name in ours_by_name and ours_by_name[name] != version:
            return f"method {name} differs: expected version {version}, this worker has {ours_by_name[name]}"
    return ""
