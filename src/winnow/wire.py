"""Between winnow's types and its messages, and from a status back to the error it came from. No gRPC here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from winnow import errors
from winnow.errors import InvalidRequest, Overloaded, WinnowError
from winnow.proto.v1 import common_pb2, internal_pb2, winnow_pb2
from winnow.registry import parse_spec
from winnow.types import (
    Chunk,
    Document,
    Fingerprint,
    Message,
    MethodChoice,
    RankedDocument,
    Ranking,
    Sampling,
    SegmentHandle,
    TokenLogprob,
    Usage,
    WorkerInfo,
)

PROTOCOL = 1  # version of the internal protocol; parts with different ones refuse each other
ERROR_KEY = "winnow-error"  # trailing metadata: class of the error
PUSHBACK_KEY = "grpc-retry-pushback-ms"
CHANNEL_CLOSED = "Channel closed!"  # in the details of a call whose channel this side closed

_BY_NAME: dict[str, type[WinnowError]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, WinnowError)
}
_BY_STATUS: dict[str, type[WinnowError]] = {
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "OUT_OF_RANGE": errors.ContextTooLong,
    "NOT_FOUND": errors.UnknownName,
    "FAILED_PRECONDITION": errors.Unsupported,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "ALREADY_EXISTS": errors.Conflict,
    "UNAVAILABLE": errors.WorkerLost,
    "ABORTED": errors.LeaseLost,
    "DATA_LOSS": errors.CorruptBlock,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.Forbidden,
    "CANCELLED": errors.Cancelled,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "UNIMPLEMENTED": errors.Skewed,
}


def error_from_status(status: str, details: str, trailing: Mapping[str, str]) -> WinnowError:
    """The error a server raised, from what arrived.

    Args:
        status: name of the gRPC status code.
        details: its text.
        trailing: trailing metadata; `winnow-error` names the class where a winnow server ended the call.

    Returns:
        An error of the same class; by status alone where a proxy or gRPC itself ended the call. A class whose status
        differs from the one that arrived is not believed.

    A server that shuts down makes gRPC end calls that reach it in that moment with a bare CANCELLED, though nobody gave
    them up: that is a WorkerLost. Cancelled is what a winnow server names, or this side by closing the channel.
    """
    if status == "CANCELLED" and ERROR_KEY not in trailing and CHANNEL_CLOSED not in details:
        status, details = "UNAVAILABLE", "the server went away before it took the call"
    named = _BY_NAME.get(trailing.get(ERROR_KEY, ""))
    cls = named if named is not None and named.code.value == status else _BY_STATUS.get(status, WinnowError)
    text = details or status
    if cls is Overloaded:
        pushback = trailing.get(PUSHBACK_KEY, "")
        if ERROR_KEY not in trailing and "larger than max" in details:
            text = f"{details}; raise gateway.max_message_bytes on the server, or send a shorter text"
        return Overloaded(text, retry_after_ms=int(pushback) if pushback.isdecimal() else 1000)
    return cls(text)


def method_to_proto(method: str | MethodChoice | None) -> common_pb2.Method:
    """None or "" is the server's default; text is `name` or `name:key=value,...`."""
    if method is None:
        return common_pb2.Method()
    if isinstance(method, str):
        name, params = parse_spec(method)
        return common_pb2.Method(name=name, params=params)
    return common_pb2.Method(name=method.name, params=method.params)


def method_from_proto(message: common_pb2.Method) -> MethodChoice:
    return MethodChoice(message.name, dict(message.params))


def sampling_to_proto(sampling: Sampling) -> common_pb2.Sampling:
    """Raises InvalidRequest for a value the message cannot carry (another type, a whole number beyond 32 or 64 bits)."""
    message = common_pb2.Sampling()
    for name, value in vars(sampling).items():
        if name == "seed" and value == -1:
            continue
        try:
            if name == "stop":
                message.stop.extend(value)
            else:
                setattr(message, name, value)
        except (TypeError, ValueError):
            raise InvalidRequest(
                f"sampling.{name}: {value!r:.40} does not fit; see winnow.types.Sampling for its range"
            ) from None
    return message


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    """Checked sampling parameters with defaults filled in.

    Raises:
        InvalidRequest: a field out of its range; the message names it.
    """
    if message.HasField("seed") and message.seed < 0:
        raise InvalidRequest(f"sampling.seed must be in [0, 2^63), got {message.seed}; leave it out for a drawn one")
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else -1,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else 256,
        stop=tuple(message.stop),
        logprobs=message.logprobs,
        ignore_eos=message.ignore_eos,
    ).validate()


def messages_to_proto(messages: Iterable[Message]) -> list[winnow_pb2.Message]:
    return [winnow_pb2.Message(role=m.role, content=m.content) for m in messages]


def documents_to_proto(documents: Iterable[Document]) -> list[common_pb2.Document]:
    return [common_pb2.Document(doc_id=d.doc_id, text=d.text) for d in documents]


def documents_from_proto(documents: Iterable[common_pb2.Document]) -> list[Document]:
    return [Document(d.doc_id, d.text) for d in documents]


def ranking_to_proto(ranking: Ranking) -> common_pb2.Ranking:
    items = [common_pb2.RankedDocument(doc_id=i.doc_id, score=i.score, rank=i.rank, truncated=i.truncated) for i in ranking.items]
    return common_pb2.Ranking(items=items, method=ranking.method, seconds=ranking.seconds, fallback_used=ranking.fallback_used)


def ranking_from_proto(message: common_pb2.Ranking) -> Ranking:
    items = tuple(RankedDocument(i.doc_id, i.score, i.rank, i.truncated) for i in message.items)
    return Ranking(items, message.method, message.seconds, message.fallback_used)


def usage_from_proto(message: common_pb2.Usage) -> Usage:
    unset = {field.name for field in message.DESCRIPTOR.fields if field.has_presence and not message.HasField(field.name)}
    return Usage(**{f.name: getattr(message, f.name) for f in message.DESCRIPTOR.fields if f.name not in unset})


def usage_to_proto(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(**vars(usage))


def logprobs_from_proto(items: Sequence[winnow_pb2.TopLogprobs]) -> tuple[tuple[TokenLogprob, ...], ...]:
    return tuple(tuple(TokenLogprob(t.token_id, t.text, t.logprob) for t in top.items) for top in items)


def chunk_from_event(event: winnow_pb2.GenerateEvent) -> Chunk:
    """One streamed event as a user sees it."""
    kind = event.WhichOneof("event")
    if kind == "progress":
        return Chunk(stage=event.progress.stage, done=event.progress.done, total=event.progress.total)
    if kind == "finish":
        return Chunk(finish_reason=event.finish.reason, usage=usage_from_proto(event.finish.usage))
    return Chunk(event.piece.text, tuple(event.piece.token_ids), logprobs_from_proto(event.piece.logprobs))


def fingerprint_to_proto(fingerprint: Fingerprint) -> common_pb2.Fingerprint:
    return common_pb2.Fingerprint(**vars(fingerprint))


def fingerprint_from_proto(message: common_pb2.Fingerprint) -> Fingerprint:
    return Fingerprint(
        message.protocol, message.model, message.kv_layout, message.dtype, message.tensor_parallel, tuple(message.methods)
    )


def worker_to_proto(info: WorkerInfo) -> common_pb2.WorkerInfo:
    return common_pb2.WorkerInfo(**{**vars(info), "fingerprint": fingerprint_to_proto(info.fingerprint)})


def worker_from_proto(message: common_pb2.WorkerInfo) -> WorkerInfo:
    return WorkerInfo(
        message.worker_id,
        message.epoch,
        tuple(message.roles),
        message.address,
        message.host_id,
        fingerprint_from_proto(message.fingerprint),
        message.pid,
        message.metrics_address,
    )


def handle_to_proto(handle: SegmentHandle) -> internal_pb2.SegmentHandle:
    return internal_pb2.SegmentHandle(**vars(handle))


def handle_from_proto(message: internal_pb2.SegmentHandle) -> SegmentHandle:
    return SegmentHandle(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})
