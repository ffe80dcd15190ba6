"""What this gateway serves and how it is: Capabilities, ModelInfo and Status."""

from __future__ import annotations

import time
from collections.abc import Iterable

import winnow
from winnow.config import WinnowConfig
from winnow.proto.v1 import winnow_pb2
from winnow.services.gateway.admission import Admission
from winnow.services.gateway.calls import Calls
from winnow.services.gateway.router import Router, Worker
from winnow.services.gateway.validation import Served
from winnow.wire import PROTOCOL, worker_to_proto
from winnow.workers.model.spec import ModelSpec


class StatusReport:
    """Answers from live objects."""

    def __init__(
        self, config: WinnowConfig, served: Served, router: Router, admission: Admission, calls: Calls, has_metadata: bool
    ) -> None:
        self._config = config
        self._served = served
        self._router = router
        self._admission = admission
        self._calls = calls
        self._has_metadata = has_metadata
        self._started = time.monotonic()

    def capabilities(self) -> winnow_pb2.Capabilities:
        gateway = self._config.gateway
        return winnow_pb2.Capabilities(
            version=winnow.__version__,
            protocol=PROTOCOL,
            model=self._served.name,
            family=self._served.spec.family,
            dtype=self._served.dtype,
            max_context_tokens=self._served.spec.max_context,
            max_inflight=gateway.max_inflight,
            max_queue=gateway.max_queue,
            max_message_bytes=gateway.max_message_bytes,
            default_deadline_s=gateway.default_deadline_s,
            max_deadline_s=gateway.max_deadline_s,
            default_prefill=self._config.prefill.method,
            default_decode=self._config.decode.method,
            default_ranker=self._config.rank.method,
        )

    def model(self) -> winnow_pb2.ModelInfo:
        return winnow_pb2.ModelInfo(
            name=self._served.name,
            family=self._served.spec.family,
            dtype=self._served.dtype,
            parameters=count_parameters(self._served.spec),
            max_context_tokens=self._served.spec.max_context,
            fingerprint=self._served.fingerprint,
        )

    def status(self, sessions: Iterable[winnow_pb2.Session]) -> winnow_pb2.Status:
        return winnow_pb2.Status(
            version=winnow.__version__,
            state="draining" if self._calls.is_draining else "serving",
            uptime_s=time.monotonic() - self._started,
            inflight=self._admission.inflight,
            queued=self._admission.queued,
            metadata=self._metadata(),
            workers=[_worker(w) for w in self._router.workers],
            sessions=sessions,
        )

    def _metadata(self) -> str:
        if not self._has_metadata:
            return ""
        if not self._router.metadata_ok:
            return "unreachable"
        return "redis" if self._config.metadata.redis_url else "embedded"


def _worker(worker: Worker) -> winnow_pb2.WorkerStatus:
    load = worker.load
    return winnow_pb2.WorkerStatus(
        info=worker_to_proto(worker.info),
        state=worker.state,
        reason=worker.reason,
        running=load.running,
        waiting=load.waiting,
        kv_bytes=load.kv_bytes,
        kv_budget_bytes=load.kv_budget_bytes,
        segments=load.segments,
    )


def count_parameters(spec: ModelSpec) -> int:
    """Weights of the model, from its shape: no weight file is opened for this."""
    d, heads, kv = spec.hidden_size, spec.n_q_heads * spec.head_size, spec.n_kv_heads * spec.head_size
    attention = d * heads + 2 * d * kv + heads * d
    biases = (heads + 2 * kv) * spec.qkv_bias + d * spec.o_bias + (2 * spec.mlp_size + d) * spec.mlp_bias
    norms = d * (4 if spec.post_norms else 2) + 2 * spec.head_size * spec.qk_norm
    layer = attention + 3 * d * spec.mlp_size + biases + norms
    return spec.n_layers * layer + d * spec.vocab_size * (1 if spec.tied else 2) + d
