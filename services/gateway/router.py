"""Which workers there are, which of them fit, and which one gets the next piece of work.

The metadata store only hints at workers; a worker's own answers decide. A worker is asked `Hello` once per epoch and
refused there if it does not fit (promise R17); its epoch and load are asked for ever after. With the store away the gateway goes
on with the workers it knows (R11).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import grpc
import xxhash

from winnow import telemetry
from winnow.errors import DeadlineExceeded, Draining, Overloaded, Skewed, WinnowError, WorkerLost
from winnow.metadata import MetadataStore, MetadataUnavailable
from winnow.proto.v1 import internal_pb2, internal_pb2_grpc
from winnow.services.common.links import Links, error_of, from_winnow
from winnow.types import Fingerprint, WorkerInfo
from winnow.wire import fingerprint_to_proto, worker_from_proto

ASK_TIMEOUT_S = 2.0
SILENT_POLLS = 3  # a worker that is alive but answers nothing (stopped, wedged) is lost after so many polls
FORGET_AFTER_S = 60.0
AFFINITY_SLACK = 2  # requests a cache-warm worker may have more than the idlest one
HOLDER_TTL_S = 600.0  # KV that nobody asked for so long may well be evicted
log = telemetry.get_logger("router")


@dataclass(eq=False)
class Worker:
    """A worker as this gateway sees it. `state`: "starting", "serving", "draining", "lost" or "refused"."""

    info: WorkerInfo
    state: str = "starting"
    reason: str = ""
    load: internal_pb2.LoadReply = field(default_factory=internal_pb2.LoadReply)
    assigned: int = 0
    silent: int = 0
    last_seen: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.info.worker_id or self.info.address

    @property
    def busy(self) -> int:
        return max(self.assigned, self.load.running + self.load.waiting)


class Router:
    """Keeps the table of workers fresh in the background and picks from it. One event loop."""

    def __init__(
        self,
        links: Links,
        expect: Fingerprint,
        metadata: MetadataStore | None = None,
        static: Sequence[WorkerInfo | str] = (),
        poll_s: float = 1.0,
    ) -> None:
        self._links = links
        self._expect = expect
        self._metadata = metadata
        self._static = [w if isinstance(w, WorkerInfo) else _at(w) for w in static]
        self._poll_s = poll_s
        self._table: dict[str, Worker] = {}
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.metadata_ok = metadata is not None

    @property
    def workers(self) -> list[Worker]:
        return sorted(self._table.values(), key=lambda w: w.name)

    async def start(self) -> None:
        """Ask every known worker once, then keep asking in the background."""
        await self.refresh()
        self._task = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except Exception as error:  # the table must outlive any single bad answer; the reason is in the log
                log.error("worker poll failed", where=telemetry.places(error))

    async def refresh(self) -> None:
        """One round: ask the store who is there, then each worker how it is."""
        for info in await self._announced():
            key, known = self._known(info)
            if known is None or info.epoch > known.info.epoch or (known.info.address != info.address and known.state == "lost"):
                if known is not None:
                    await self._links.forget(known.info.address)
                    del self._table[key]
                self._table[_key(info)] = Worker(info)
        await asyncio.gather(*(self._ask(worker) for worker in list(self._table.values())))
        for key, worker in list(self._table.items()):
            if worker.state == "lost" and time.monotonic() - worker.last_seen > FORGET_AFTER_S and not self._is_static(key):
                del self._table[key]
        for state in ("starting", "serving", "draining", "lost", "refused"):
            telemetry.WORKERS.labels(state=state).set(sum(w.state == state for w in self._table.values()))
        async with self._changed:
            self._changed.notify_all()

    async def _announced(self) -> list[WorkerInfo]:
        found = list(self._static)
        if self._metadata is not None:
            try:
                found += await self._metadata.workers()
                self.metadata_ok = True
            except MetadataUnavailable:
                self._note_away()
        return found

    def _note_away(self) -> None:
        """Until the next poll hears from the store nobody asks it: requests do not wait for it one by one."""
        if self.metadata_ok:
            log.warning("metadata store is away, going on with the workers known", workers=len(self._table))
        self.metadata_ok = False

    async def find_holder(self, role: str, prefix: str) -> Worker | None:
        """A serving worker of which the store says that it holds a prefix's KV, in its present epoch.

        None where nobody is known, all known ones are much busier than the idlest, there is no choice, or the store is away.
        """
        able = self.serving(role)
        if self._metadata is None or not self.metadata_ok or len(able) < 2:
            return None
        try:
            held = (await self._metadata.holders([prefix])).get(prefix, {})
        except MetadataUnavailable:
            self._note_away()
            return None
        most = min(w.busy for w in able) + AFFINITY_SLACK
        found = [w for w in able if held.get(w.info.worker_id) == w.info.epoch and w.busy <= most]
        return min(found, key=lambda w: (w.busy, w.name), default=None)

    async def note_holder(self, worker: Worker, prefix: str, n_tokens: int) -> None:
        """Tell the store, and so other gateways, where a prefix's KV is now."""
        if self._metadata is None or not self.metadata_ok:
            return
        try:
            await self._metadata.add_holder(prefix, worker.info.worker_id, worker.info.epoch, n_tokens, HOLDER_TTL_S)
        except MetadataUnavailable:
            self._note_away()

    def _known(self, info: WorkerInfo) -> tuple[str, Worker | None]:
        """The table's entry for an announced worker: by its id, or by its address where only that is known."""
        for key, worker in self._table.items():
            known = worker.info
            nameless = not (known.worker_id and info.worker_id)
            if (known.worker_id and known.worker_id == info.worker_id) or (nameless and known.address == info.address):
                return key, worker
        return _key(info), None

    def _is_static(self, key: str) -> bool:
        return any(_key(info) == key for info in self._static)

    async def _ask(self, worker: Worker) -> None:
        stub = internal_pb2_grpc.WorkerStub(self._links.channel(worker.info.address))
        try:
            # asked every time and not only once: a worker that restarted on its old port is then known by its new epoch
            request = internal_pb2.HelloRequest(expect=fingerprint_to_proto(self._expected_of(worker)))
            reply = await stub.Hello(request, **self._links.options(ASK_TIMEOUT_S))
            self._accept(worker, worker_from_proto(reply.info))
            worker.load = await stub.Load(internal_pb2.LoadRequest(), **self._links.options(ASK_TIMEOUT_S))
            worker.silent, worker.last_seen = 0, time.monotonic()
        except grpc.RpcError as error:
            await self._note_failure(worker, error_of(error), error)
        except WinnowError as error:
            await self._note_failure(worker, error, None)
        except asyncio.CancelledError:
            # A request found the worker gone and closed the channel under this call: that ends the question, not the polling.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            worker.silent += 1

    def _expected_of(self, worker: Worker) -> Fingerprint:
        """A draft worker may hold another model, so only protocol and methods have to agree."""
        if tuple(worker.info.roles) == ("draft",):
            return replace(self._expect, model="", kv_layout="", dtype="", tensor_parallel=0)
        return self._expect

    def _accept(self, worker: Worker, info: WorkerInfo) -> None:
        """Raises Skewed when the worker's own answer does not fit."""
        if worker.info.worker_id and info.epoch < worker.info.epoch:
            raise Skewed(f"{worker.name} answers as epoch {info.epoch}, announced was {worker.info.epoch}")
        changed = worker.state != "serving" or info.epoch != worker.info.epoch
        worker.info = info
        problem = mismatch(self._expected_of(worker), info.fingerprint)
        if problem:
            raise Skewed(f"{info.worker_id}: {problem}")
        if changed:
            log.info("worker serves", worker_id=info.worker_id, epoch=info.epoch, roles=list(info.roles))
        worker.state, worker.reason = "serving", ""

    async def _note_failure(self, worker: Worker, error: WinnowError, rpc: grpc.RpcError | None) -> None:
        if isinstance(error, Draining):
            worker.state, worker.reason = "draining", "it is shutting down"
        elif isinstance(error, WorkerLost) and rpc is not None and from_winnow(rpc):
            worker.state, worker.reason, worker.last_seen = "starting", str(error), time.monotonic()
        elif isinstance(error, WorkerLost):
            await self.mark_lost(worker, "it does not answer")
        elif isinstance(error, DeadlineExceeded):
            worker.silent += 1
            if worker.silent >= SILENT_POLLS:
                await self.mark_lost(worker, f"silent for {worker.silent} polls")
        elif isinstance(error, Overloaded):
            worker.reason = "it is overloaded"
        else:
            if worker.state != "refused":
                log.warning("worker refused", worker_id=worker.name, reason=str(error))
            worker.state, worker.reason = "refused", str(error)

    async def mark_lost(self, worker: Worker, reason: str) -> None:
        """Stop using a worker; its running calls end now. It comes back when it answers Hello again."""
        if worker.state != "lost":
            log.warning("worker lost", worker_id=worker.name, epoch=worker.info.epoch, reason=reason)
        worker.state, worker.reason = "lost", reason
        await self._links.forget(worker.info.address)

    def serving(self, role: str) -> list[Worker]:
        return [w for w in self.workers if w.state == "serving" and role in w.info.roles]

    def pick(self, role: str, *, near: WorkerInfo | None = None, affinity: str = "", skip: Collection[Worker] = ()) -> Worker:
        """The best worker of a role: nearest first, then least loaded.

        Args:
            near: the owner of the segment to work on; its own process, then its host, come first.
            affinity: equal texts prefer one worker, whose cache then has them, unless it is much busier than others.
            skip: workers not to use.

        Raises:
            WorkerLost: none serves.
        """
        able = [w for w in self.serving(role) if w not in skip]
        if not able:
            raise WorkerLost(f"no {role} worker is serving; `winnow status` says why; try again later")
        if near is not None:
            return min(able, key=lambda w: (w.info.worker_id != near.worker_id, w.info.host_id != near.host_id, w.busy, w.name))
        idlest = min(w.busy for w in able)
        if affinity:
            able = [w for w in able if w.busy <= idlest + AFFINITY_SLACK]
            return max(able, key=lambda w: xxhash.xxh3_64_intdigest(f"{affinity}/{w.name}".encode()))
        return min(able, key=lambda w: (w.busy, w.assigned, w.name))

    async def wait_for(self, role: str, timeout_s: float, **options: object) -> Worker:
        """As `pick`, waiting for a worker to come back. Raises WorkerLost when none did in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.serving(role))
        return self.pick(role, **options)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def assigned(self, worker: Worker) -> Iterator[Worker]:
        """Count a piece of work on a worker while the block runs."""
        worker.assigned += 1
        try:
            yield worker
        finally:
            worker.assigned -= 1


def mismatch(expect: Fingerprint, actual: Fingerprint) -> str:
    """The first field in which two parts differ; "" = they fit. Empty expectations are not compared."""
    for name in ("protocol", "model", "kv_layout", "dtype", "tensor_parallel"):
        ours, theirs = getattr(expect, name), getattr(actual, name)
        if ours and theirs and ours != theirs:
            return (
                f"{name} differs: the gateway has {ours}, the worker has {theirs}; start both from one version and configuration"
            )
    versions = dict(m.partition("@")[::2] for m in expect.methods)
    for method in actual.methods:
        name, _, version = method.partition("@")
        if name in versions and versions[name] != version:
            return f"method {name} differs: the gateway has version {versions[name]}, the worker has {version}; update one"
    return ""


def _key(info: WorkerInfo) -> str:
    return info.worker_id or info.address


def _at(address: str) -> WorkerInfo:
    return WorkerInfo("", 0, (), address, "", Fingerprint(0, "", "", ""))
