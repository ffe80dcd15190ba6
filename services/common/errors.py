"""Errors to gRPC statuses: the only place that ends a call with a status.

A winnow error becomes its documented status with its message; everything else becomes INTERNAL with the request id and
no text, because an unexpected exception may quote a caller's bytes. The class's name travels in trailing metadata so
that the client raises the same class (`winnow.wire.error_from_status`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
import grpc.aio

from winnow import telemetry
from winnow.errors import Overloaded, WinnowError
from winnow.wire import ERROR_KEY, PUSHBACK_KEY

MAX_DETAIL_CHARS = 1000  # trailing metadata is limited to 8 KiB on the wire
log = telemetry.get_logger("rpc")


@dataclass(frozen=True)
class Outcome:
    """How a call ends."""

    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str], ...]


def find_winnow_error(error: BaseException) -> WinnowError | None:
    """The first deliberate error in `error`, looking into exception groups (task groups raise those)."""
    if isinstance(error, WinnowError):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            found = find_winnow_error(inner)
            if found is not None:
                return found
    return None


def outcome_of(error: BaseException, request_id: str) -> Outcome:
    """Status, text and trailing metadata for an exception that left a handler."""
    known = find_winnow_error(error)
    trailing = [(telemetry.REQUEST_ID_KEY, request_id)]
    if known is None:
        return Outcome(grpc.StatusCode.INTERNAL, f"internal error, request id {request_id}", tuple(trailing))
    trailing.append((ERROR_KEY, type(known).__name__))
    if isinstance(known, Overloaded):
        trailing.append((PUSHBACK_KEY, str(max(0, int(known.retry_after_ms)))))
    return Outcome(grpc.StatusCode[known.code.value], str(known)[:MAX_DETAIL_CHARS], tuple(trailing))


def passes_through(error: BaseException) -> bool:
    """Cancellation and a status already set are not ours to change."""
    return isinstance(error, asyncio.CancelledError | grpc.aio.AbortError)


async def end_with(context: grpc.aio.ServicerContext, error: BaseException, request_id: str, method: str) -> None:
    """End the call with the status of `error`. Raises `grpc.aio.AbortError` always."""
    outcome = outcome_of(error, request_id)
    if outcome.code is grpc.StatusCode.INTERNAL:
        log.error("internal error", rpc=method, where=telemetry.places(error), request_id=request_id)
    if outcome.code in _REJECTS:
        telemetry.REJECTS.labels(code=outcome.code.name).inc()
    await context.abort(outcome.code, outcome.details, outcome.trailing)


_REJECTS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
