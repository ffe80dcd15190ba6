"""What one role process consists of: made from the weights and the roles, questioned, put to the canary, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.index.folder import candidate_folders
from winnow.index.store import SegmentStore
from winnow.proto.v1 import internal_pb2
from winnow.services import warmup
from winnow.services.common.links import Links
from winnow.services.decode.servicer import DecodeServicer
from winnow.services.prefill.segments import SegmentsServicer
from winnow.services.prefill.servicer import PrefillServicer
from winnow.services.retrieval.book import IndexBook
from winnow.services.retrieval.servicer import RetrievalServicer
from winnow.services.retrieval.session import SessionOpener
from winnow.services.scoring.servicer import DraftServicer
from winnow.services.transfer import SegmentReader
from winnow.services.weights import Weights
from winnow.services.worker import Gate
from winnow.workers.decode.worker import DecodeEngine
from winnow.workers.prefill.worker import PrefillEngine


@dataclass(eq=False)
class Parts:
    """Everything of one process; None where no role needs it. `create` it inside the event loop, then `build` it."""

    config: WinnowConfig
    gate: Gate
    weights: Weights
    links: Links
    book: IndexBook
    sessions: SessionOpener
    store: SegmentStore | None = None
    reader: SegmentReader | None = None
    prefill: PrefillEngine | None = None
    decode: DecodeEngine | None = None
    retrieval: RetrievalServicer | None = None
    draft: DraftServicer | None = None
    _unwatch: Callable[[], None] | None = None

    @classmethod
    def create(cls, config: WinnowConfig, gate: Gate, weights: Weights, roles: tuple[str, ...]) -> Parts:
        links = Links(config)
        book = IndexBook(idle_s=config.kv.lease_s)
        return cls(
            config, gate, weights, links, book, SessionOpener(links, config.gateway, book if "retrieval" in roles else None)
        )

    def build(self, roles: tuple[str, ...], worker_id: str, epoch: int, host: str) -> dict[str, Any]:
        """Make store, engines and servicers (by service name). Blocks."""
        config, weights = self.config, self.weights
        servicers: dict[str, Any] = {}
        if "prefill" in roles:
            model = weights.require_model()
            for folder in candidate_folders(config.kv):  # before the store measures how much room there is
                SegmentStore.remove_orphans(folder, worker_id, epoch)
            self.store = SegmentStore(
                weights.layout, model.fingerprint, config.kv, worker_id, epoch, host, model.decoder.device.type
            )
            self._unwatch = telemetry.watch_store(self.store.stats)
            self.prefill = PrefillEngine(model, self.store, config.prefill).start()
            servicers["Prefill"] = PrefillServicer(self.prefill, self.store, self.gate, config.prefill, config.rank)
            servicers["Segments"] = SegmentsServicer(self.store, self.gate)
        device = str(weights.model.decoder.device) if weights.model else "cpu"
        self.reader = SegmentReader(config.kv, host, self.links, self.store, device)
        if "decode" in roles:
            self.decode = DecodeEngine(weights.require_model(), config.decode).start()
            servicers["Decode"] = DecodeServicer(self.decode, self.reader, self.sessions, self.gate, config.decode)
        if "retrieval" in roles:
            self.retrieval = RetrievalServicer(weights.spec, self.reader, self.book, self.gate, weights.threads)
            servicers["Retrieval"] = self.retrieval
        if "draft" in roles:
            self.draft = DraftServicer(weights.require_draft(), self.gate, config.prefill.max_waiting)
            servicers["Draft"] = self.draft
        return servicers

    def warm_up(self) -> None:
        """Put the canary to every role. Blocks. Raises WrongAnswer."""
        model = self.weights.model
        if model is not None:
            expected = warmup.expect(model)
            if self.prefill is not None and self.store is not None:
                warmup.check_prefill(self.prefill, self.store, expected)
            if self.decode is not None:
                warmup.check_decode(self.decode, model, expected)
            warmup.check_weights(model, self.weights.digest)
        if self.retrieval is not None:
            warmup.check_retrieval(self.weights.spec.layers[0])
        if self.weights.draft is not None:
            warmup.check_draft(self.weights.draft)

    def load(self) -> internal_pb2.LoadReply:
        """What the Worker service answers to Load."""
        loads = [engine.load() for engine in (self.prefill, self.decode) if engine is not None]
        drafts = self.draft.n_jobs if self.draft is not None else 0
        stats = self.store.stats() if self.store is not None else None
        copies = self.reader.held_bytes if self.reader is not None else 0
        return internal_pb2.LoadReply(
            running=sum(load.running for load in loads) + min(1, drafts),
            waiting=sum(load.waiting for load in loads) + max(0, drafts - 1),
            kv_bytes=(stats.bytes if stats else 0) + copies,
            kv_budget_bytes=stats.budget if stats else self.config.kv.budget_bytes,
            segments=stats.segments if stats else 0,
        )

    def ledgers(self) -> dict[str, int]:
        """What is held for requests at this moment; all zero when none runs (promises R3, R6)."""
        stats = self.store.stats() if self.store is not None else None
        loads = [engine.load() for engine in (self.prefill, self.decode) if engine is not None]
        return {
            "inflight": self.gate.inflight,
            "jobs": sum(load.running + load.waiting for load in loads) + (self.draft.n_jobs if self.draft else 0),
            "leases": stats.leases if stats else 0,
            "open_segments": self.reader.n_open if self.reader else 0,
            "copied_bytes": self.reader.held_bytes if self.reader else 0,
            "indexes": len(self.book),
        }

    async def stop_engines(self) -> None:
        """End what still runs, each job with Draining."""
        for engine in (self.prefill, self.decode):
            if engine is not None:
                await asyncio.to_thread(engine.stop)  # the loop must go on: the jobs' last events come through it
        for servicer in (self.retrieval, self.draft):
            if servicer is not None:
                servicer.stop()

    async def close(self) -> None:
        """Free everything, files too; the engines must have stopped."""
        await self.book.close_all()
        await asyncio.to_thread(self.sessions.close)
        if self._unwatch is not None:
            self._unwatch()
        if self.store is not None:
            self.store.close()
        await self.links.close()
