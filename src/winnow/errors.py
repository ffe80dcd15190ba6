"""Every error winnow raises on purpose, and the gRPC status each one becomes.

The core does not import gRPC: `StatusName` repeats the names of gRPC's status codes, and one server interceptor
(`winnow.services.common.errors`) turns an error into a status. The client turns a status back into the same error.

A message names the field, the value, the limit and the way out. It never contains prompts, tokens, secrets or paths.
"""

from __future__ import annotations

import enum


class StatusName(enum.StrEnum):
    """The gRPC status codes winnow uses, by name."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    UNAVAILABLE = "UNAVAILABLE"
    ABORTED = "ABORTED"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class WinnowError(Exception):
    """Base of every deliberate error. `code` is the status a caller sees."""

    code: StatusName = StatusName.INTERNAL


class InvalidRequest(WinnowError):
    """A field has a value it may not have. The message names the field."""

    code = StatusName.INVALID_ARGUMENT


class ContextTooLong(WinnowError):
    """Prompt plus new tokens do not fit the model."""

    code = StatusName.OUT_OF_RANGE


class UnknownName(WinnowError):
    """No such model, method, session, index or document. The message lists the known names."""

    code = StatusName.NOT_FOUND


class Unsupported(WinnowError):
    """Known names that cannot be combined, or a caller's `strict` that cannot be kept."""

    code = StatusName.FAILED_PRECONDITION


class Skewed(WinnowError):
    """Two parts that do not fit each other: protocol, model, KV layout, dtype or method version."""

    code = StatusName.FAILED_PRECONDITION


class Overloaded(WinnowError):
    """No room: queue, memory or quota. `retry_after_ms` says when to come back."""

    code = StatusName.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class Conflict(WinnowError):
    """The same key with other content."""

    code = StatusName.ALREADY_EXISTS


class WorkerLost(WinnowError):
    """The worker that held the work is gone; the work may be tried again."""

    code = StatusName.UNAVAILABLE


class Draining(WinnowError):
    """The server is shutting down and takes no new work."""

    code = StatusName.UNAVAILABLE


class LeaseLost(WinnowError):
    """The caller's fencing token is older than the one the owner last granted."""

    code = StatusName.ABORTED


class CorruptBlock(WinnowError):
    """Bytes do not match their checksum, or do not belong to this model and layout."""

    code = StatusName.DATA_LOSS


class Unauthenticated(WinnowError):
    """No token, or one that is malformed, expired or for another audience."""

    code = StatusName.UNAUTHENTICATED


class Forbidden(WinnowError):
    """A valid token without the scope this call needs."""

    code = StatusName.PERMISSION_DENIED


class Cancelled(WinnowError):
    """The caller, or the server on its behalf, gave the request up."""

    code = StatusName.CANCELLED


class DeadlineExceeded(WinnowError):
    """The request's time is over."""

    code = StatusName.DEADLINE_EXCEEDED


class ConfigError(InvalidRequest):
    """A configuration value is wrong. The message names the setting and the accepted values."""
