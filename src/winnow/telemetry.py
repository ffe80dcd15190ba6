"""Logs, metrics and trace ids of every part.

Each request has one request id and one W3C trace id that travel in metadata over every hop. Logs are structured, go to
stderr and never hold prompts, tokens or secrets: keys that could are withheld, and an unexpected exception is logged by
its type and places, not by its text (which may quote a caller's bytes). OpenTelemetry is imported only when it is on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TextIO

import structlog
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from winnow.config import TelemetryConfig
from winnow.errors import ConfigError

REQUEST_ID_KEY = "winnow-request-id"
TRACEPARENT_KEY = "traceparent"

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_WITHHELD = frozenset(
    {"prompt", "text", "messages", "content", "question", "query", "documents", "answer_prefix", "stop", "token", "tokens",
     "token_ids", "secret", "authorization", "password"}
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """Where we are in a trace: 32 hex digits of the trace, 16 of the span."""

    trace_id: str
    span_id: str

    @classmethod
    def new(cls) -> Trace:
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    def child(self) -> Trace:
        """The same trace, a new span."""
        return Trace(self.trace_id, secrets.token_hex(8))

    def header(self) -> str:
        """Value of the W3C `traceparent` header."""
        return f"00-{self.trace_id}-{self.span_id}-01"


_request_id: ContextVar[str] = ContextVar("winnow_request_id", default="")
_trace: ContextVar[Trace | None] = ContextVar("winnow_trace", default=None)


def new_request_id() -> str:
    return secrets.token_hex(12)


def is_request_id(text: str) -> bool:
    """1 to 64 of [A-Za-z0-9_.-]."""
    return _REQUEST_ID.fullmatch(text) is not None


def current_request_id() -> str:
    """The request being worked on, "" outside of one."""
    return _request_id.get()


def current_trace() -> Trace | None:
    return _trace.get()


def rename_request(request_id: str) -> None:
    """Go on under another id (the one the caller chose in the message) in logs, errors and later hops."""
    _request_id.set(request_id)
    structlog.contextvars.bind_contextvars(request_id=request_id)


@contextlib.contextmanager
def request_scope(metadata: Mapping[str, str]) -> Iterator[str]:
    """Take request id and trace from a call's metadata, or start new ones; yields the request id.

    Ids that do not have the documented form are replaced, so that a caller cannot write into the logs.
    """
    given = metadata.get(REQUEST_ID_KEY, "")
    request_id = given if is_request_id(given) else new_request_id()
    match = _TRACEPARENT.fullmatch(metadata.get(TRACEPARENT_KEY, ""))
    trace = Trace(match[1], match[2]).child() if match else Trace.new()
    id_token, trace_token = _request_id.set(request_id), _trace.set(trace)
    bound = structlog.contextvars.bind_contextvars(request_id=request_id, trace_id=trace.trace_id)
    try:
        yield request_id
    finally:
        structlog.contextvars.reset_contextvars(**bound)
        _trace.reset(trace_token)
        _request_id.reset(id_token)


def hop_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that carries request id and trace to the next hop; empty outside of a request."""
    request_id, trace = _request_id.get(), _trace.get()
    items = [(REQUEST_ID_KEY, request_id)] if request_id else []
    if trace is not None:
        items.append((TRACEPARENT_KEY, trace.child().header()))
    return tuple(items)


def _withhold(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in event:
        if key in _WITHHELD:
            event[key] = "[withheld]"
    return event


def configure_logging(config: TelemetryConfig, part: str, stream: TextIO | None = None) -> None:
    """Set structlog up for this process, once, in `main`. `stream`: None = what `sys.stderr` is when a line is written."""
    renderer: Any = structlog.processors.JSONRenderer() if config.log_format == "json" else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _withhold,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.log_level.upper())),
        logger_factory=lambda *_: structlog.WriteLogger(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(part=part)


def get_logger(part: str) -> Any:
    """A structured logger: `log.info("worker lost", worker_id=...)`. Never pass it a caller's text."""
    return structlog.get_logger(part=part)


def places(error: BaseException) -> str:
    """Type of an exception and where it passed, innermost last, without its text and without folders."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    trail = " > ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in frames)
    return f"{type(error).__name__} at {trail or 'unknown place'}"


RPC_REQUESTS = Counter("winnow_rpc_requests_total", "Calls ended", ["rpc", "code"])
RPC_SECONDS = Histogram(
    "winnow_rpc_duration_seconds", "Time of a call", ["rpc"], buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300)
)
RPC_INFLIGHT = Gauge("winnow_rpc_inflight_calls", "Calls being served", ["rpc"])
INFLIGHT = Gauge("winnow_gateway_inflight_requests", "Admitted requests being worked on")
QUEUED = Gauge("winnow_gateway_queued_requests", "Admitted requests waiting")
TTFT = Histogram(
    "winnow_gateway_ttft_seconds", "Admission to first token", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
)
PREFILL_RECALL = Histogram(
    "winnow_prefill_recall",
    "Attention mass that a sparse prefill kept in the rows it computed, 0 to 1, from sampled ones; a prompt is one observation",
    ["method"],
    buckets=(0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
)
PREFILL_PASSES = Counter(  # reason: pays, trial, unmeasured (sparse); too_short, no_gain, too_dense, method (dense)
    "winnow_prefill_passes_total",
    "Passes of sparse prefills through a layer, by the reason for running them so",
    ["method", "reason"],
)
TOKENS = Counter("winnow_gateway_tokens_total", "Tokens", ["kind"])  # kind: prompt, cached, completion
FALLBACKS = Counter("winnow_gateway_fallbacks_total", "Exact path in place of a method", ["slot"])
REJECTS = Counter("winnow_gateway_rejects_total", "Requests refused before work", ["code"])
RETRIES = Counter("winnow_gateway_retries_total", "Work given to another worker", ["role"])
LEASE_LOSSES = Counter("winnow_kv_lease_losses_total", "Leases lost by expiry or to a newer grant")
WORKERS = Gauge("winnow_gateway_known_workers", "Workers by state", ["state"])


class StoreStats(Protocol):
    """What is shown of a segment store; see `winnow.index.store.StoreStats`."""

    bytes: int
    segments: int
    leases: int
    hits: int
    misses: int
    hit_tokens: int
    evictions: int
    lease_losses: int
    corrupt: int


class _StoreMetrics(Collector):
    """The segment stores of this process, read when somebody asks."""

    GAUGES: ClassVar[dict[str, str]] = {
        "bytes": "KV bytes held, by capacity",
        "segments": "Live KV segments",
        "leases": "Leases that are held",
    }
    COUNTERS: ClassVar[dict[str, str]] = {
        "hits": "Prompts that began with cached KV",
        "misses": "Prompts that did not",
        "hit_tokens": "Tokens taken from the prefix cache",
        "evictions": "Cache entries dropped to make room",
        "lease_losses": "Leases that expired before they were released",
        "corrupt": "Cache entries found damaged",
    }

    def __init__(self) -> None:
        self.stores: list[Callable[[], StoreStats]] = []

    def collect(self) -> Iterator[Metric]:
        if not self.stores:
            return
        stats = [store() for store in tuple(self.stores)]
        for name, text in self.GAUGES.items():
            yield GaugeMetricFamily(f"winnow_kv_{name}", text, value=sum(getattr(one, name) for one in stats))
        for name, text in self.COUNTERS.items():
            yield CounterMetricFamily(f"winnow_kv_{name}", text, value=sum(getattr(one, name) for one in stats))


_store_metrics = _StoreMetrics()
REGISTRY.register(_store_metrics)


def watch_store(stats: Callable[[], StoreStats]) -> Callable[[], None]:
    """Show a segment store in the metrics; call what is returned when the store closes."""
    _store_metrics.stores.append(stats)
    return lambda: _store_metrics.stores.remove(stats)


class MetricsServer:
    """Prometheus endpoint of this process."""

    def __init__(self, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=REGISTRY)
        except OSError:
            raise ConfigError(f"telemetry.metrics_port: {port} is in use; set it to 0 for any free port") from None
        self.address = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def serve_metrics(port: int = 0) -> MetricsServer:
    """Serve Prometheus metrics on a loopback port (0 = any free one).

    Raises:
        ConfigError: the port is in use.
    """
    return MetricsServer(port)


_provider: Any = None
_tracer: Any = None


def configure_tracing(config: TelemetryConfig, part: str) -> None:
    """Send spans to `config.otlp_endpoint`; nothing is imported when it is empty.

    Raises:
        ConfigError: tracing is asked for and the otel extra is not installed.
    """
    global _provider, _tracer
    if not config.otlp_endpoint:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("telemetry.otlp_endpoint: tracing needs the otel extra: pip install 'winnow-llm[otel]'") from None
    _provider = TracerProvider(resource=Resource.create({"service.name": f"winnow-{part}"}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.otlp_endpoint, insecure=True)))
    _tracer = _provider.get_tracer("winnow")


def stop_tracing() -> None:
    """Send the spans still waiting and stop tracing; nothing when it is off. Waits for the collector, at most seconds."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        provider.shutdown()


@contextlib.contextmanager
def span(name: str, **attributes: str | int | float | bool) -> Iterator[None]:
    """A span of the current trace around a block; nothing when tracing is off. Attributes are numbers and names only."""
    trace = _trace.get()
    if _tracer is None or trace is None:
        yield
        return
    from opentelemetry.propagate import extract

    parent = extract({TRACEPARENT_KEY: trace.header()})
    with _tracer.start_as_current_span(name, context=parent, attributes=attributes, record_exception=False) as current:
        ids = current.get_span_context()
        token = _trace.set(Trace(f"{ids.trace_id:032x}", f"{ids.span_id:016x}"))
        try:
            yield
        finally:
            _trace.reset(token)
