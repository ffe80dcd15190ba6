"""The engines in one process without any service between them: the control that the pipeline is measured against,
and the way to use winnow's model, methods and cache from a script or a notebook."""

from __future__ import annotations

import queue
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from winnow.config import WinnowConfig
from winnow.index.segment import KVSegment, SegmentLayout
from winnow.index.store import SegmentStore
from winnow.registry import parse_spec
from winnow.types import MethodChoice, Sampling
from winnow.workers.decode import job as decoding
from winnow.workers.decode.base import DecodeMethod, RetrievalSession, decode_methods
from winnow.workers.decode.local_retrieval import LocalRetrieval, SegmentIndex
from winnow.workers.decode.worker import DecodeEngine
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill import job as prefilling
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.worker import PrefillEngine


@dataclass(eq=False)
class LocalEngine:
    """One model, one segment store, one prefill and one decode engine. Thread-safe; use as a context manager."""

    model: LoadedModel
    config: WinnowConfig = field(default_factory=WinnowConfig)

    def __post_init__(self) -> None:
        device = self.model.decoder.device
        self.store = make_store(self.model, self.config, owner="local", epoch=1, device=str(device))
        self.prefill = PrefillEngine(self.model, self.store, self.config.prefill)
        self.decode = DecodeEngine(self.model, self.config.decode)

    def __enter__(self) -> LocalEngine:
        self.prefill.start()
        self.decode.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.decode.stop()
        self.prefill.stop()
        self.store.close()

    def generate(
        self,
        token_ids: Sequence[int],
        sampling: Sampling | None = None,
        prefill_method: PrefillMethod | MethodChoice | None = None,
        decode_method: DecodeMethod | MethodChoice | None = None,
        *,
        no_cache: bool = False,
        context_tokens: int = 0,
        tenant: str = "",
        strict: bool = False,
    ) -> Iterator[prefilling.PrefillResult | decoding.Tokens]:
        """The prefill's result, then the tokens as they come. Closing the iterator cancels the work and frees its KV.

        Raises: whatever ends the request, at the iteration where it happens.
        """
        sampling = (sampling or Sampling()).validate()
        request_id = uuid.uuid4().hex
        prompt = prefilling.PrefillJob(
            request_id, token_ids, sampling.max_tokens, prefill_method, no_cache, context_tokens, tenant
        )
        events: queue.SimpleQueue[prefilling.Event | decoding.Event] = queue.SimpleQueue()
        handle: prefilling.Handle | decoding.Handle = self.prefill.submit(prompt, events.put)
        lease = None
        try:
            event = events.get()
            while isinstance(event, prefilling.Progress):
                event = events.get()
            if isinstance(event, prefilling.Failed):
                raise event.error
            assert isinstance(event, prefilling.PrefillResult)
            lease = event.lease
            yield event
            handle = self.decode.submit(
                self._decode_job(request_id, lease.segment, token_ids[-1], sampling, decode_method, strict), events.put
            )
            finish_reason = ""
            while not finish_reason:
                token = events.get()
                if isinstance(token, decoding.Failed):
                    raise token.error
                assert isinstance(token, decoding.Tokens)
                finish_reason = token.finish_reason
                yield token
        finally:
            handle.cancel()
            handle.finished.wait()
            while lease is None and not events.empty():  # closed while the result was on its way
                last = events.get()
                lease = last.lease if isinstance(last, prefilling.PrefillResult) else None
            if lease is not None:
                self.store.release(lease.handle)

    def _decode_job(
        self, request_id: str, segment: KVSegment, last_token_id: int, sampling: Sampling,
        wanted: DecodeMethod | MethodChoice | None, strict: bool,
    ) -> decoding.DecodeJob:  # fmt: skip
        if not isinstance(wanted, DecodeMethod):
            name, params = parse_spec(self.config.decode.method) if wanted is None else (wanted.name, dict(wanted.params))
            wanted = decode_methods.create(name, dict(params))
        retrieval: RetrievalSession | None = None
        if (asked := wanted.index_spec(segment.n_tokens)) is not None:
            full = [layer.idx for layer in self.model.spec.layers if not layer.window]
            retrieval = LocalRetrieval(SegmentIndex(segment, *asked, layers=full))
        eos = self.model.tokenizer.eos_ids
        return decoding.DecodeJob(request_id, segment, last_token_id, sampling, wanted, retrieval, strict, tuple(eos))


def make_store(
    model: LoadedModel, config: WinnowConfig, *, owner: str, epoch: int, host_id: str = "", device: str = "cpu"
) -> SegmentStore:
    """A segment store for this model's KV."""
    spec = model.spec
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, model.dtype_name)
    return SegmentStore(layout, model.fingerprint, config.kv, owner, epoch, host_id or socket.gethostname(), device)
