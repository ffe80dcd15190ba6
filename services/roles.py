"""One process with one or several roles: what it loads, serves, announces, and how it ends.

Start: new epoch, weights (one copy for all roles of the process), segment store, engines, server with health NOT_SERVING,
canary, SERVING, registration with heartbeats. A wrong canary leaves it NOT_SERVING with `reason` set (promise R14).
Drain (R18): health NOT_SERVING, no new work, unregister, running work finishes within the grace, the rest ends UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine
from typing import Any

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.errors import Draining, InvalidRequest, WinnowError
from winnow.metadata import MetadataStore, MetadataUnavailable
from winnow.services.common.auth import INTERNAL
from winnow.services.common.server import RpcServer, build_server
from winnow.services.parts import Parts
from winnow.services.prefill.segments import sweep_forever
from winnow.services.retrieval.book import IndexBook
from winnow.services.transfer import host_id
from winnow.services.weights import Weights, load_weights
from winnow.services.worker import Gate, WorkerServicer, method_versions
from winnow.types import Fingerprint, WorkerInfo
from winnow.wire import PROTOCOL

ROLES = ("prefill", "retrieval", "draft", "decode")
LAST_WORDS_S = 2.0  # for statuses of ended calls to reach their callers
log = telemetry.get_logger("worker")


class RoleProcess:
    """Hosts `roles` behind one gRPC server. Use it inside one event loop; `start`, then `drain` and `stop`, or only `stop`.

    Args:
        worker_id: stable name of the place, e.g. "prefill-0"; a restarted one keeps it and takes a larger epoch.
        roles: any of "prefill", "retrieval", "draft", "decode".
        metadata: where to announce; None or unavailable: epochs come from the clock, and only static addresses find it.

    Attributes:
        info: after `start`.
        reason: why it does not serve, "" = it does or has not been started.
    """

    def __init__(
        self, worker_id: str, roles: tuple[str, ...], config: WinnowConfig, metadata: MetadataStore | None,
        host: str = "127.0.0.1",
    ) -> None:  # fmt: skip
        unknown = sorted(set(roles) - set(ROLES))
        if unknown or not roles:
            raise InvalidRequest(f"roles: {', '.join(unknown) or 'none given'}; known: {', '.join(ROLES)}")
        self.worker_id = worker_id
        self.roles = tuple(r for r in ROLES if r in roles)
        self.gate = Gate()
        self.reason = ""
        self.info: WorkerInfo | None = None
        self._config = config
        self._metadata = metadata
        self._host = host
        self._parts: Parts | None = None
        self._server: RpcServer | None = None
        self._metrics: telemetry.MetricsServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> WorkerInfo:
        """Load, warm up, serve, announce.

        Raises:
            WinnowError: the model, a setting or the canary is wrong. `reason` keeps it, and health stays NOT_SERVING until
                `stop`, which must be called after a failure too.
        """
        try:
            return await self._start()
        except BaseException as error:
            self.reason = str(error) if isinstance(error, WinnowError) else telemetry.places(error)
            log.error("does not serve", worker_id=self.worker_id, reason=self.reason)
            raise

    async def _start(self) -> WorkerInfo:
        config = self._config
        epoch = await self._next_epoch()
        weights = await asyncio.to_thread(load_weights, config, self.roles)
        parts = self._parts = Parts.create(config, self.gate, weights, self.roles)
        host = await asyncio.to_thread(host_id, config.kv)
        servicers = await asyncio.to_thread(parts.build, self.roles, self.worker_id, epoch, host)
        if config.telemetry.metrics:
            self._metrics = telemetry.serve_metrics()
        info = WorkerInfo(
            self.worker_id, epoch, self.roles, "", host, self.fingerprint(weights), os.getpid(),
            self._metrics.address if self._metrics else "",
        )  # fmt: skip
        servicers["Worker"] = WorkerServicer(lambda: self.info or info, parts.load, self.gate)
        self._server = build_server(servicers, config, audience=INTERNAL, host=self._host, port=0)
        address = await self._server.start()
        info = WorkerInfo(**{**vars(info), "address": address})
        await asyncio.to_thread(parts.warm_up)
        self.info = info
        self.gate.open()
        await self._server.set_serving(True)
        await self._announce(info)
        self._spawn("heartbeat", self._heartbeat(info))
        self._spawn("sweep", self._sweep())
        log.info("serving", worker_id=self.worker_id, epoch=epoch, roles=list(self.roles))
        return info

    def fingerprint(self, weights: Weights) -> Fingerprint:
        return Fingerprint(PROTOCOL, weights.fingerprint, weights.layout.digest(), weights.layout.dtype, 1, method_versions())

    def ledgers(self) -> dict[str, int]:
        """See `Parts.ledgers`."""
        return self._started().ledgers()

    # -- ending ------------------------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Take no new work and let running work finish for grace_s seconds; what is left ends with UNAVAILABLE."""
        self.gate.close()
        if self._server is not None:
            await self._server.leave()
        self._cancel_tasks(but_sweep=True)
        if self._metadata is not None and self.info is not None:
            with contextlib.suppress(MetadataUnavailable):  # the entry then runs out by itself
                await self._metadata.unregister(self.worker_id, self.info.epoch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._finished()
        if self._parts is not None:
            await self._parts.stop_engines()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self.gate.wait_empty()

    async def _finished(self) -> None:
        """Wait until no call runs and nobody else holds a segment of ours (its reader may not have mapped it yet)."""
        while True:
            await self.gate.wait_empty()
            store = self._parts.store if self._parts is not None else None
            if store is None or not store.stats().leases:
                return
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End everything now and remove every file. May be called after `drain`, after a failed start, and twice."""
        self.gate.close()
        self._cancel_tasks()
        if self._parts is not None:
            await self._parts.stop_engines()
        parts, self._parts = self._parts, None
        server, self._server = self._server, None
        if server is not None:
            await server.stop(LAST_WORDS_S if self.gate.inflight else 0.0)
        if parts is not None:
            await parts.close()
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            await asyncio.to_thread(metrics.close)

    # -- announcing --------------------------------------------------------------------------------------------------

    async def _next_epoch(self) -> int:
        if self._metadata is not None:
            try:
                return await self._metadata.next_epoch(self.worker_id)
            except MetadataUnavailable:
                log.warning("metadata store is away, the epoch comes from the clock", worker_id=self.worker_id)
        return time.time_ns() // 1000

    async def _announce(self, info: WorkerInfo) -> None:
        if self._metadata is None:
            return
        try:
            await self._metadata.register(info, self._config.metadata.worker_ttl_s)
        except MetadataUnavailable:
            log.warning("metadata store is away, announcing again later", worker_id=self.worker_id)

    async def _heartbeat(self, info: WorkerInfo) -> None:
        while True:
            await asyncio.sleep(self._config.metadata.worker_ttl_s / 3)
            await self._announce(info)

    async def _sweep(self) -> None:
        parts = self._started()
        async with asyncio.TaskGroup() as group:
            if parts.store is not None:
                group.create_task(sweep_forever(parts.store))
            group.create_task(self._sweep_indexes(parts.book))

    async def _sweep_indexes(self, book: IndexBook) -> None:
        while True:
            await asyncio.sleep(min(self._config.kv.lease_s / 4, 5.0))
            await book.sweep()

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("background task ended", task=task.get_name(), where=telemetry.places(task.exception() or Draining("")))

    def _cancel_tasks(self, *, but_sweep: bool = False) -> None:
        for task in self._tasks:
            if not (but_sweep and task.get_name() == "sweep"):
                task.cancel()

    def _started(self) -> Parts:
        if self._parts is None:
            raise Draining(f"{self.worker_id} is not started")
        return self._parts
