"""The decode engine: one thread, one batched forward pass a step, one token for every running sequence.

Sequences join and leave between steps (continuous batching). It knows slots and tokens; no gRPC, no text, no stop strings.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from dataclasses import dataclass, field

import structlog
import torch

from winnow.config import DecodeConfig
from winnow.errors import Cancelled, ContextTooLong, Draining, Overloaded, Skewed
from winnow.registry import parse_spec
from winnow.types import MethodChoice
from winnow.workers.decode.backend import DecodeBackend, Slot
from winnow.workers.decode.base import DecodeMethod, decode_methods
from winnow.workers.decode.job import DecodeJob, Event, Failed, Handle, OnEvent, Tokens
from winnow.workers.decode.sampling import Draw, draw, new_generator
from winnow.workers.model.loader import LoadedModel, make_current

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Load:
    """What the engine holds at this moment, and what became of all earlier sequences.

    Attributes:
        running: sequences in the batch; waiting: those not admitted yet.
        fallbacks: finished sequences of which another method stepped in.
        steps: batched forward passes so far.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    fallbacks: int = 0
    steps: int = 0


@dataclass(eq=False)
class _Waiting:
    handle: Handle
    job: DecodeJob
    method: DecodeMethod


@dataclass(eq=False)
class _Running:
    """A sequence in the batch. `slot.state` is open until `_close`."""

    handle: Handle
    job: DecodeJob
    slot: Slot
    generator: torch.Generator
    token_id: int  # fed in the next step
    n_events: int = 0


@dataclass
class _Counts:
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    fallbacks: int = 0
    steps: int = 0


@dataclass(eq=False)
class DecodeEngine:
    """Runs `model` in its own thread between `start` and `stop`.

    Use as a context manager, or call `start` and `stop`. Callbacks run in the engine's thread: they must return at once; one
    that raises ends its sequence.
    """

    model: LoadedModel
    config: DecodeConfig
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _running: list[_Running] = field(default_factory=list)
    _wake: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _is_stopping: bool = False
    _counts: _Counts = field(default_factory=_Counts)

    # -- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> DecodeEngine:
        self.model.decoder.prepare_decoding()
        self._thread = threading.Thread(target=self._run, name="winnow-decode", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End every sequence with `Draining` and wait for the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> DecodeEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, job: DecodeJob, on_event: OnEvent) -> Handle:
        """Queue a sequence.

        Returns:
            The handle; `on_event` gets `Tokens` events, the last with a finish reason, or `Failed` as the last.

        Raises (the job's retrieval session then stays the caller's to close):
            InvalidRequest: sampling out of range, or a wrong method parameter. UnknownName: no such method.
            Unsupported, CorruptBlock: the method is not calibrated for this model, or its calibration is damaged.
            Skewed: the segment's layout or device is not the model's. ContextTooLong: no room for a token.
            Overloaded: `max_waiting` sequences wait already. Draining: the engine is stopping.
        """
        job.sampling.validate()
        self._check_segment(job)
        method = self._method(job.method)
        handle = Handle(job.request_id, on_event, wake=self._notify)
        with self._wake:
            if self._is_stopping:
                raise Draining("this worker is shutting down; try another one")
            if len(self._waiting) >= self.config.max_waiting:
                raise Overloaded(
                    f"decode: {len(self._waiting)} sequences wait already (decode.max_waiting={self.config.max_waiting}); "
                    "retry later"
                )
            self._waiting.append(_Waiting(handle, job, method))
            self._wake.notify_all()
        return handle

    def load(self) -> Load:
        """A consistent snapshot."""
        with self._wake:
            c = self._counts
            return Load(len(self._running), len(self._waiting), c.finished, c.failed, c.cancelled, c.fallbacks, c.steps)

    def _check_segment(self, job: DecodeJob) -> None:
        spec, segment = self.model.spec, job.segment
        have, want = segment.layout, (spec.n_layers, spec.n_kv_heads, spec.head_size, self.model.dtype_name)
        if (have.n_layers, have.n_kv_heads, have.head_size, have.dtype) != want:
            raise Skewed(
                f"segment: layout {have.to_dict()} does not fit this model's (layers, KV heads, head size, dtype) {want}"
            )
        if segment.device.type != self.model.decoder.device.type:
            raise Skewed(f"segment: lies on {segment.device.type}, the model on {self.model.decoder.device.type}; copy it first")
        if segment.n_total >= min(segment.capacity, spec.max_context):
            raise ContextTooLong(
                f"segment: {segment.n_total} tokens leave no room for one more (capacity {segment.capacity}, "
                f"model {spec.max_context}); ask for a larger tail or shorten the prompt"
            )

    def _method(self, wanted: DecodeMethod | MethodChoice | None) -> DecodeMethod:
        if not isinstance(wanted, DecodeMethod):
            name, params = parse_spec(self.config.method) if wanted is None else (wanted.name, dict(wanted.params))
            wanted = decode_methods.create(name, dict(params))
        return wanted.bind(self.model)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    @torch.inference_mode()  # thread-local, so it must be set here
    def _run(self) -> None:
        make_current(self.model.decoder.device)
        while True:
            with self._wake:
                while not (self._is_stopping or self._running or self._waiting):
                    self._wake.wait()
                if self._is_stopping:
                    break
            self._end_cancelled()
            self._admit()
            if self._running:
                self._step()
        gone = "the worker shut down before this sequence was done; try another one"
        with self._wake:
            waiting = list(self._waiting)
        for entry in waiting:
            self._drop(entry, Draining(gone))
        for sequence in list(self._running):
            self._end(sequence, Failed(Draining(gone)))

    def _end_cancelled(self) -> None:
        with self._wake:
            waiting = [w for w in self._waiting if w.handle.is_cancelled]
        for entry in waiting:
            self._drop(entry, Cancelled("the request was cancelled"))
        for sequence in [s for s in self._running if s.handle.is_cancelled]:
            self._end(sequence, Failed(Cancelled("the request was cancelled")))

    def _admit(self) -> None:
        while len(self._running) < self.config.max_batch:
            with self._wake:
                if not self._waiting:
                    return
                entry = self._waiting[0]
            job = entry.job
            try:
                slot = Slot.open(entry.method, job.segment, job.retrieval, strict=job.strict)
            except BaseException as error:  # whatever it is, it must not end the thread
                self._drop(entry, error)
                continue
            with self._wake:
                self._waiting.popleft()
                self._running.append(_Running(entry.handle, job, slot, new_generator(job.sampling), job.last_token_id))

    def _step(self) -> None:
        """One token for every running sequence."""
        batch = list(self._running)
        slots = [s.slot for s in batch]
        try:
            for slot in slots:
                slot.position = slot.segment.n_total
            decoder = self.model.decoder
            tokens = torch.tensor([s.token_id for s in batch])
            positions = torch.tensor([slot.position for slot in slots])
            hidden = decoder.forward(tokens, positions, DecodeBackend(slots))
            draws = draw(decoder.logits(hidden), [s.job.sampling for s in batch], [s.generator for s in batch])
        except BaseException as error:  # not one sequence's doing (out of memory, a lost device): none of them can go on
            failure = error
            if isinstance(error, torch.OutOfMemoryError):
                failure = Overloaded("decode: the device has no memory left for this batch; retry later")
            for sequence in batch:
                self._end(sequence, Failed.of(failure))
            return
        self._counts.steps += 1
        for sequence, drawn in zip(batch, draws, strict=True):
            try:
                self._take(sequence, drawn)
            except BaseException as error:
                self._end(sequence, Failed.of(error))

    def _take(self, sequence: _Running, drawn: Draw) -> None:
        """Book one sequence's token and tell its receiver. Raises what ends the sequence."""
        slot, job, spec = sequence.slot, sequence.job, self.model.spec
        if slot.error is not None:
            raise slot.error
        slot.segment.advance([sequence.token_id])
        slot.count_dense_step(spec.n_layers, spec.n_q_heads)
        if not drawn.is_finite:
            raise ArithmeticError("the model's scores are not finite; its weights or this sequence's KV are damaged")
        n = sequence.n_events + 1
        if drawn.token_id in job.eos_token_ids and not job.sampling.ignore_eos:
            self._finish(sequence, Tokens(sequence.n_events, (), (), "eos", slot.keys_read_share))
            return
        logprobs = (drawn.logprobs,) if drawn.logprobs else ()
        room = min(slot.segment.capacity, spec.max_context) - slot.segment.n_total
        reason = "length" if n >= job.sampling.max_tokens or room < 1 else ""
        event = Tokens(sequence.n_events, (drawn.token_id,), logprobs, reason, slot.keys_read_share)
        sequence.n_events, sequence.token_id = n, drawn.token_id
        if event.finish_reason:
            self._finish(sequence, event)
        else:
            sequence.handle.on_event(event)

    def _finish(self, sequence: _Running, last: Tokens) -> None:
        self._end(sequence, dataclasses.replace(last, fallback_used=sequence.slot.state.fallback_used))

    def _end(self, sequence: _Running, last: Event) -> None:
        """Take the sequence out of the batch, free what it holds, then deliver its last event."""
        with self._wake:
            self._running.remove(sequence)
        try:
            sequence.slot.state.close()
        except Exception as error:  # a complete text is delivered whatever freeing does; a failure keeps its own cause
            log.warning("decode state did not close", request_id=sequence.handle.request_id, error=type(error).__name__)
        self._deliver(sequence.handle, last)

    def _drop(self, entry: _Waiting, error: BaseException) -> None:
        """End a sequence that was not admitted: nobody else will close its retrieval session."""
        with self._wake:
            self._waiting.remove(entry)
        try:
            if entry.job.retrieval is not None:
                entry.job.retrieval.close()
        except Exception as closing:
            log.warning("retrieval session did not close", request_id=entry.handle.request_id, error=type(closing).__name__)
        self._deliver(entry.handle, Failed.of(error))

    def _deliver(self, handle: Handle, last: Event) -> None:
        outcome = "finished"
        if isinstance(last, Failed):
            outcome = "cancelled" if isinstance(last.error, Cancelled) else "failed"
        try:
            handle.on_event(last)
        except Exception as error:
            log.warning("receiver of a last event failed", request_id=handle.request_id, error=type(error).__name__)
            outcome = "failed"
        with self._wake:
            setattr(self._counts, outcome, getattr(self._counts, outcome) + 1)
            if isinstance(last, Tokens) and last.fallback_used:
                self._counts.fallbacks += 1
        handle.finished.set()
