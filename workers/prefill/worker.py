"""The prefill engine: one thread owns the model and turns prompts into KV, a step at a time.

A step is one layer of a chunk of a prompt; on an accelerator, one chunk.
Between two steps the scheduler may put another job in front, and cancellation is seen. Rankings run in the same thread;
at each of their forward passes shorter prompts may go first. It knows threads, jobs and leases; no gRPC, no asyncio.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field

import structlog
import torch

from winnow.config import PrefillConfig
from winnow.errors import Cancelled, ContextTooLong, Draining, Overloaded
from winnow.index.store import Lease, SegmentStore
from winnow.registry import parse_spec
from winnow.types import MethodChoice
from winnow.workers.model.loader import LoadedModel, make_current
from winnow.workers.prefill.backend import Tally
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.break_even import BreakEven
from winnow.workers.prefill.costs import costs_of
from winnow.workers.prefill.job import (
    Event,
    Failed,
    Handle,
    OnEvent,
    PrefillJob,
    PrefillResult,
    Progress,
    RankJob,
    RankResult,
)
from winnow.workers.prefill.prompt import cache_key, forward_steps, plan_passes, planned_tokens, sparse_chunk_tokens
from winnow.workers.prefill.scheduler import Scheduler
from winnow.workers.ranking.base import RankContext, Ranker, rankers

log = structlog.get_logger(__name__)


Steps = Generator[tuple[int, int], None, None]  # each step yields (work done, work left), token-layers


@dataclass(frozen=True)
class Load:
    """What the engine holds at this moment, and what became of all earlier jobs.

    Attributes:
        running: jobs that have begun (each prompt among them holds a segment); waiting: jobs that have not.
        approximate: finished prompts of which some attention was skipped (density below 1).
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    approximate: int = 0


@dataclass(eq=False)
class _Task:
    """One job in the engine. `lease` is held from the first step until the result is handed over."""

    handle: Handle
    job: PrefillJob | RankJob
    work: int
    submitted_at: float
    started_at: float = 0.0
    steps: Steps | None = None
    lease: Lease | None = None


@dataclass
class _Counts:
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    approximate: int = 0


@dataclass(eq=False)
class PrefillEngine:
    """Owns `model` in its own thread between `start` and `stop`. The store is shared with whoever releases segments.

    Use as a context manager, or call `start` and `stop`. Callbacks run in the engine's thread: they must return at once; one
    that raises ends its job as failed.
    """

    model: LoadedModel
    store: SegmentStore
    config: PrefillConfig
    _scheduler: Scheduler[_Task] = field(default_factory=Scheduler)
    _wake: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _is_stopping: bool = False
    _counts: _Counts = field(default_factory=_Counts)

    # -- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> PrefillEngine:
        self._thread = threading.Thread(target=self._run, name="winnow-prefill", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End every job with `Draining` and wait for the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> PrefillEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, job: PrefillJob, on_event: OnEvent) -> Handle:
        """Queue a prompt.

        Returns:
            The handle; `on_event` gets `Progress` events and then exactly one `PrefillResult` or `Failed`.

        Raises:
            InvalidRequest: a field out of range. ContextTooLong: more tokens than the model takes.
            Overloaded: `max_waiting` jobs wait already. Draining: the engine is stopping.
        """
        job.validate()
        total, limit = len(job.token_ids) + job.tail_tokens, self.model.spec.max_context
        if total > limit:
            raise ContextTooLong(
                f"token_ids and tail_tokens: {len(job.token_ids)} + {job.tail_tokens} tokens exceed the model's {limit}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        return self._add(job, on_event, max(1, len(job.token_ids) - 1) * self.model.spec.n_layers)

    def submit_rank(self, job: RankJob, on_event: OnEvent) -> Handle:
        """Queue a ranking: `Progress` events in documents, then exactly one `RankResult` or `Failed`. Raises as `submit`."""
        # A guess of 4 characters a token orders it among prompts; documents whose KV is cached make it shorter.
        tokens = sum(len(d.text) + len(job.query) for d in job.documents) // 4
        return self._add(job, on_event, max(1, tokens) * self.model.spec.n_layers)

    def load(self) -> Load:
        """A consistent snapshot."""
        with self._wake:
            tasks = self._scheduler.items()
            waiting = sum(task.steps is None for task in tasks)
            c = self._counts
            return Load(len(tasks) - waiting, waiting, c.finished, c.failed, c.cancelled, c.approximate)

    def _add(self, job: PrefillJob | RankJob, on_event: OnEvent, work: int) -> Handle:
        handle = Handle(job.request_id, on_event, wake=self._notify)
        with self._wake:
            if self._is_stopping:
                raise Draining("this worker is shutting down; try another one")
            waiting = sum(task.steps is None for task in self._scheduler.items())
            if waiting >= self.config.max_waiting:
                raise Overloaded(
                    f"prefill: {waiting} jobs wait already (prefill.max_waiting={self.config.max_waiting}); retry later"
                )
            self._scheduler.add(_Task(handle, job, work, time.monotonic()), work)
            self._wake.notify_all()
        return handle

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    @torch.inference_mode()  # thread-local, so it must be set here
    def _run(self) -> None:
        make_current(self.model.decoder.device)
        while True:
            with self._wake:
                while not self._is_stopping and not len(self._scheduler):
                    self._wake.wait()
                if self._is_stopping:
                    break
            self._end_cancelled()
            with self._wake:
                task = self._scheduler.pick()
            if task is not None:
                self._step(task)
        for task in self._scheduler.items():
            self._end(task, Failed(Draining("the worker shut down before this job was done; try another one")))

    def _step(self, task: _Task) -> None:
        """Run one step of a job and book it; the job's end, good or bad, is dealt with here."""
        try:
            if task.steps is None:
                task.started_at = time.monotonic()
                job = task.job
                with self._wake:
                    task.steps = self._prefill(task, job) if isinstance(job, PrefillJob) else self._rank(task, job)
            work, left = next(task.steps)
        except StopIteration:
            return  # it delivered its result
        except torch.OutOfMemoryError:
            self._end(
                task, Failed(Overloaded("prefill: the device has no memory left for this prompt; shorten it or retry later"))
            )
        except BaseException as error:  # whatever it is, it must not end the thread
            self._end(task, Failed.of(error))
        else:
            with self._wake:
                if task in self._scheduler:
                    self._scheduler.ran(task, work, left)

    def _prefill(self, task: _Task, job: PrefillJob) -> Steps:
        method = self._method(job.method)
        spec, ids = self.model.spec, list(job.token_ids[:-1])
        n = len(ids)
        context, tail = min(job.context_tokens, n), self.config.dense_tail_tokens
        sample = (spec.n_q_heads, job.query_sample) if job.query_sample else None
        chunk = self.config.chunk_tokens if method.caps.exact else sparse_chunk_tokens(self.config, self.model.decoder.device)
        lease = task.lease = self.store.acquire(
            ids, job.tail_tokens + 1, tenant=job.tenant, method=cache_key(method),
            context_tokens=planned_tokens(method, n, context, tail), chunk_tokens=chunk, is_apart=context > 0,
            use_cache=not job.no_cache, query_sample=sample,
        )  # fmt: skip
        method = method.for_prompt(lease.segment.key_tiles)
        cached = lease.cached_tokens
        tally, break_even = Tally(), self._break_even(method)
        told = cached
        self._emit(task, Progress(told, n))
        passes = plan_passes(method, n, cached, context, chunk, tail)
        left = (n - cached) * spec.n_layers
        steps = forward_steps(
            self.model.decoder, lease.segment, ids, passes, job.query_sample, tally, self.config.recall_rows, break_even,
            by_layer=not chunk or self.model.decoder.device.type == "cpu",
        )  # fmt: skip
        for work in steps:
            left -= work
            self._settle()
            # No token is finished before its last layer: layers count as their share. A hundred events are enough for a bar.
            done = n - -(-left // spec.n_layers)
            if done - told >= n / 100 or not left:
                told = done
                self._emit(task, Progress(told, n))
            yield work, left
        self.store.publish(lease)
        now = time.monotonic()
        queue_s, work_s = task.started_at - task.submitted_at, now - task.started_at
        reasons = dict(break_even.counts) if break_even is not None else {}
        self._finish(
            task,
            PrefillResult(lease.handle, lease, cached, tally.density, queue_s, work_s, recall=tally.recall, passes=reasons),
        )

    def _rank(self, task: _Task, job: RankJob) -> Steps:
        left = task.work

        def on_progress(done: int, total: int) -> None:
            nonlocal left
            left = task.work - task.work * done // max(1, total)
            self._emit(task, Progress(done, total))

        booked = left

        def check_cancelled() -> None:
            nonlocal booked
            with self._wake:
                self._scheduler.ran(task, booked - left, left)
            booked = left
            self._let_others_run(task)

        ranker = job.ranker if isinstance(job.ranker, Ranker) else rankers.create(job.ranker.name, dict(job.ranker.params))
        context = RankContext(self.model, self.store, job.tenant, on_progress, check_cancelled)
        ranking = ranker.rank(job.query, job.documents, context)
        now = time.monotonic()
        self._finish(task, RankResult(ranking, task.started_at - task.submitted_at, now - task.started_at))
        yield from ()

    def _let_others_run(self, ranking: _Task) -> None:
        """Called between a ranking's forward passes: steps of prompts that the scheduler would run first.

        Other rankings stay out: each would run to its end on top of this one.
        """
        while True:
            self._end_cancelled(but=ranking)
            ranking.handle.raise_if_cancelled()
            with self._wake:
                if self._is_stopping:
                    raise Draining("the worker shut down before this job was done; try another one")
                others = [t for t in self._scheduler.items() if isinstance(t.job, RankJob) and t is not ranking]
                task = self._scheduler.pick(without=others)
            if task is None or task is ranking:
                return
            self._step(task)

    def _settle(self) -> None:
        """Wait for an accelerator after each step: a step that is only queued can neither be cancelled nor overtaken, and the
        result's times would be those of queueing."""
        device = self.model.decoder.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _method(self, wanted: PrefillMethod | MethodChoice | None) -> PrefillMethod:
        if not isinstance(wanted, PrefillMethod):
            name, params = parse_spec(self.config.method) if wanted is None else (wanted.name, dict(wanted.params))
            wanted = prefill_methods.create(name, dict(params))
        return wanted.bind(self.model)

    def _break_even(self, method: PrefillMethod) -> BreakEven | None:
        """For one prompt; None where there is nothing to choose."""
        if method.caps.exact or not self.config.break_even:
            return None
        return BreakEven(costs_of(self.model.decoder.device, self.model.decoder.dtype), method.spec)

    def _end_cancelled(self, but: _Task | None = None) -> None:
        for task in self._scheduler.items():
            if task.handle.is_cancelled and task is not but:
                self._end(task, Failed(Cancelled("the request was cancelled")))

    def _emit(self, task: _Task, event: Event) -> None:
        task.handle.on_event(event)

    def _finish(self, task: _Task, result: PrefillResult | RankResult) -> None:
        """Deliver a result; with it the lease passes to the receiver."""
        with self._wake:
            self._scheduler.remove(task)
        lease, task.lease = task.lease, None
        try:
            self._emit(task, result)
        except BaseException:
            task.lease = lease  # nobody took it over
            raise
        if isinstance(result, PrefillResult) and result.density < 1.0:
            self._count("approximate")
        self._count("finished")
        task.handle.finished.set()

    def _end(self, task: _Task, failure: Failed) -> None:
        """Free what the job holds, then say why it ended."""
        with self._wake:
            self._scheduler.remove(task)
        try:
            if task.steps is not None:
                task.steps.close()
            if task.lease is not None:
                lease, task.lease = task.lease, None
                self.store.release(lease.handle)
        except Exception as error:
            log.warning("segment was not freed", request_id=task.handle.request_id, error=type(error).__name__)
        self._count("cancelled" if isinstance(failure.error, Cancelled) else "failed")
        try:
            self._emit(task, failure)
        except Exception as error:
            log.warning("receiver of a last event failed", request_id=task.handle.request_id, error=type(error).__name__)
        task.handle.finished.set()

    def _count(self, outcome: str) -> None:
        with self._wake:
            setattr(self._counts, outcome, getattr(self._counts, outcome) + 1)
