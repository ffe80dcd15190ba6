"""Work given to workers: streams that end with a typed error, retries on another worker, leases kept alive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import xxhash

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.errors import DeadlineExceeded, Draining, LeaseLost, Overloaded, UnknownName, WinnowError, WorkerLost
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common import deadlines
from winnow.services.common.links import Links, error_of, from_winnow
from winnow.services.gateway.router import Router, Worker

MAX_LOSSES = 2  # work that lost two workers is not given to a third: it may be what kills them
RESTART_WAIT_S = 30.0
CLEANUP_TIMEOUT_S = 5.0
log = telemetry.get_logger("gateway")
T = TypeVar("T")
OnProgress = Callable[[int, int], Awaitable[None]]


class Lease:
    """A segment held on a prefill worker. `error` is set when the lease was lost."""

    def __init__(self, worker: Worker, handle: internal_pb2.SegmentHandle) -> None:
        self.worker = worker
        self.handle = handle
        self.tail: Sequence[int] = ()  # tokens after the sealed part whose KV the owner may keep
        self.error: WinnowError | None = None
        self.on_lost: Callable[[], object] = lambda: None

    def lose(self, error: WinnowError) -> None:
        self.error = error
        self.on_lost()


class Hops:
    """The gateway's side of every internal call."""

    def __init__(self, links: Links, router: Router, config: WinnowConfig) -> None:
        self._links = links
        self._router = router
        self._lease_s = config.kv.lease_s
        self._cleanups: set[asyncio.Task[None]] = set()

    async def stream(self, worker: Worker, call: Any, lease: Lease | None = None) -> AsyncIterator[Any]:
        """Events of a streaming call. Leaving the iteration on any way cancels the call on the worker.

        Raises:
            WorkerLost: the worker or the way to it is gone; it is marked so.
            LeaseLost: the segment's lease went while the call ran.
            WinnowError: what the worker answered; anything unexpected without its text.
        """
        if lease is not None:
            lease.on_lost = call.cancel
        try:
            async for event in call:
                yield event
        except grpc.RpcError as error:
            raise await self._failure(worker, error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if lease is not None and lease.error is not None:
                raise lease.error from None
            raise WorkerLost(f"{worker.name} was lost while it worked; the request may be tried again") from None
        finally:
            call.cancel()

    async def _failure(self, worker: Worker, error: grpc.RpcError) -> WinnowError:
        found = error_of(error)
        ours = from_winnow(error)
        if isinstance(found, Draining):
            worker.state, worker.reason = "draining", "it is shutting down"
        elif isinstance(found, WorkerLost) and not ours:
            await self._router.mark_lost(worker, "its connection broke")
            return WorkerLost(f"{worker.name} was lost while it worked; the request may be tried again")
        elif isinstance(found, DeadlineExceeded):
            return DeadlineExceeded("deadline: the request's time is over; allow more time")
        elif type(found) is WinnowError:
            return WinnowError(f"internal error, request id {telemetry.current_request_id()}")
        return found

    async def retried(
        self, role: str, work: Callable[[Worker], Awaitable[T]], *, affinity: str = "", prefer: Worker | None = None
    ) -> T:
        """Run idempotent work on a worker of `role`, and again on another or restarted one when it is lost (promise R8).

        Raises:
            WorkerLost: no worker, or two were lost with this work.
            WinnowError: what the work raised.
        """
        losses, full = 0, set[Worker]()
        worker = prefer if prefer is not None and prefer.state == "serving" else self._router.pick(role, affinity=affinity)
        while True:
            try:
                with self._router.assigned(worker):
                    return await work(worker)
            except WorkerLost:
                losses += 1
                if losses >= MAX_LOSSES:
                    raise
            except Draining:
                full.add(worker)
            except Overloaded:
                full.add(worker)
                if not [w for w in self._router.serving(role) if w not in full]:
                    raise
            telemetry.RETRIES.labels(role=role).inc()
            log.warning("work goes to another worker", role=role, from_worker=worker.name)
            patience = min(RESTART_WAIT_S, deadlines.remaining() or RESTART_WAIT_S)
            worker = await self._router.wait_for(role, patience, skip=full)

    async def prefill(
        self,
        request: internal_pb2.PrefillRequest,
        on_progress: OnProgress,
        *,
        affinity: str = "",
        prefer: Worker | None = None,
    ) -> tuple[Lease, internal_pb2.PrefillResult]:
        """Read a prompt into a segment. The caller holds the lease at once and must pass it to `leased`.

        Args:
            affinity: what prompts that may share KV have in common; such a prompt goes where the store says that KV is.
            prefer: the worker to go to whatever the store says.
        """
        prefix = xxhash.xxh3_128_hexdigest(affinity.encode()) if affinity and not request.no_cache else ""

        async def on(worker: Worker) -> tuple[Lease, internal_pb2.PrefillResult]:
            stub = internal_pb2_grpc.PrefillStub(self._links.channel(worker.info.address))
            async with aclosing(self.stream(worker, stub.Prefill(request, **self._links.options()))) as events:
                async for event in events:
                    if event.WhichOneof("event") == "result":
                        return Lease(worker, event.result.segment), event.result
                    await on_progress(event.progress.done, event.progress.total)
            raise RuntimeError("the prefill stream ended without a result")

        with telemetry.span("prefill", tokens=len(request.token_ids)):
            if prefix and prefer is None:
                prefer = await self._router.find_holder("prefill", prefix)
            lease, result = await self.retried("prefill", on, affinity=affinity, prefer=prefer)
        if prefix:
            self.later(self._router.note_holder(lease.worker, prefix, len(request.token_ids)))
        return lease, result

    @contextlib.asynccontextmanager
    async def leased(self, lease: Lease) -> AsyncIterator[Lease]:
        """Renew the lease while the block runs and give it back after it, on every way out."""
        keeper = asyncio.create_task(self.keep(lease))
        try:
            yield lease
        finally:
            keeper.cancel()
            self.later(self._release(lease))

    async def keep(self, lease: Lease) -> None:
        """Renew until cancelled, or until the lease or its worker is lost."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                stub = internal_pb2_grpc.SegmentsStub(self._links.channel(lease.worker.info.address))
                request = internal_pb2.LeaseRequest(segment=lease.handle, ttl_s=self._lease_s)
                await stub.Renew(request, metadata=self._links.metadata(), timeout=min(CLEANUP_TIMEOUT_S, self._lease_s / 3))
            except grpc.RpcError as error:
                found = error_of(error)
                if isinstance(found, LeaseLost | UnknownName):  # a restarted owner knows nothing of it
                    telemetry.LEASE_LOSSES.inc()
                    lease.lose(LeaseLost(str(found)))
                    return
                # a reader that mapped the bytes can go on without their owner; another renewal is tried
                log.warning("lease not renewed", worker_id=lease.worker.name, status=error.code().name)

    async def _release(self, lease: Lease) -> None:
        stub = internal_pb2_grpc.SegmentsStub(self._links.channel(lease.worker.info.address))
        request = internal_pb2.ReleaseRequest(segment=lease.handle, tail_token_ids=lease.tail)
        await stub.Release(request, metadata=self._links.metadata(), timeout=CLEANUP_TIMEOUT_S)

    def release(self, lease: Lease) -> None:
        """Give a lease back in the background."""
        self.later(self._release(lease))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a clean-up that must happen even though the request is over; what it cannot do the lease's end will."""

        async def run() -> None:
            try:
                await work
            except grpc.RpcError as error:
                log.warning("clean-up failed, the lease will end it", status=error.code().name)

        task = asyncio.create_task(run())
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)

    async def settle(self) -> None:
        """Wait for running clean-ups."""
        while self._cleanups:
            await asyncio.wait(list(self._cleanups))
