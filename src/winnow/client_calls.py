"""What both clients share: where to connect, channel options, messages from arguments, errors from statuses."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import tenacity

from winnow.config import home
from winnow.errors import ConfigError, InvalidRequest, StatusName, WinnowError, WorkerLost
from winnow.proto.v1 import winnow_pb2
from winnow.registry import parse_spec
from winnow.telemetry import hop_metadata
from winnow.types import Chunk, Document, Generation, Message, MethodChoice, Sampling, Usage
from winnow.wire import (
    ERROR_KEY,
    documents_to_proto,
    error_from_status,
    messages_to_proto,
    method_to_proto,
    sampling_to_proto,
)

T = TypeVar("T")
Method = str | MethodChoice | None
DEFAULT_MAX_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class Endpoint:
    """Where and as whom to connect."""

    address: str
    token: str

    @classmethod
    def find(cls, address: str | None, token: str | None) -> Endpoint:
        """Arguments win over WINNOW_ADDRESS / WINNOW_TOKEN, and these over the state file of a pipeline started here.

        Raises:
            ConfigError: no address is known.
        """
        state = _run_state()
        found = address or os.environ.get("WINNOW_ADDRESS") or state.get("address", "")
        if not found:
            raise ConfigError("address: none given and no pipeline runs here; start one with `winnow up`, or set WINNOW_ADDRESS")
        if token is None:
            token = os.environ.get("WINNOW_TOKEN")
        if token is None:
            # a token from the state file is only for the server that the file is about
            token = state.get("token", "") if found == state.get("address") else ""
        return cls(found, token)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        bearer = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return (*bearer, *hop_metadata())


def _run_state() -> dict[str, str]:
    try:
        state = json.loads((home() / "run" / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in state.items() if isinstance(v, str)} if isinstance(state, dict) else {}


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # gRPC's own retries lose a stream whose server goes away while they wait: neither its deadline nor cancelling it
        # ends the call then (seen with grpcio 1.80 to 1.85). `attempts` retries instead.
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def tls_credentials(tls_ca: str | Path | None, tls_cert: str | Path | None, tls_key: str | Path | None) -> Any:
    """Channel credentials, or None for a plain connection. Raises ConfigError for a file that cannot be read."""
    if tls_ca is None and tls_cert is None and tls_key is None:
        return None
    parts = {}
    for name, path in (("tls_ca", tls_ca), ("tls_key", tls_key), ("tls_cert", tls_cert)):
        try:
            parts[name] = Path(path).read_bytes() if path is not None else None
        except OSError as error:
            raise ConfigError(f"{name}: the file cannot be read ({error.strerror})") from None
    return grpc.ssl_channel_credentials(parts["tls_ca"], parts["tls_key"], parts["tls_cert"])


def _received(error: Any) -> tuple[WinnowError, dict[str, str]]:
    trailing = {str(k): v for k, v in error.trailing_metadata() or () if isinstance(v, str)}
    return error_from_status(error.code().name, error.details() or "", trailing), trailing


def error_of(error: Any, address: str) -> WinnowError:
    """The winnow error behind a failed call, with gRPC's own words for a lost connection replaced by readable ones."""
    found, trailing = _received(error)
    if type(found) is WorkerLost and ERROR_KEY not in trailing:
        return WorkerLost(f"no answer from {address}: nothing listens there, it went away, or TLS or its certificates do not fit")
    return found


def with_recall(prefill: Method, recall: float | None, session_id: str = "", *, label: str = "recall") -> Method:
    """The prefill method of a call that may name a recall instead: `recall`, or `recall:...` with other parameters.

    Args:
        label: what the caller calls it; errors begin with it.

    Raises:
        InvalidRequest: not a number in (0, 1], beside another method, or for a session, whose text was read already.
    """
    if recall is None:
        return prefill
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0.0 < recall <= 1.0:
        raise InvalidRequest(
            f"{label}: must be a number in (0, 1], got {recall!r:.40}; 1 keeps all attention mass, 0.99 is a good start"
        )
    if session_id:
        raise InvalidRequest(f"{label}: the session's text was read when it was opened; give it there, and leave it out here")
    choice = MethodChoice(*parse_spec(prefill)) if isinstance(prefill, str) else prefill
    if choice is not None and choice.name not in ("", "recall"):
        raise InvalidRequest(
            f"{label}: sets the target of the prefill method recall, but prefill names {choice.name!r:.40}; leave one of them out"
        )
    params = {} if choice is None else choice.params
    if "recall" in params:
        raise InvalidRequest(f"{label}: given twice, here and as prefill's parameter recall; leave one of them out")
    return MethodChoice("recall", {**params, "recall": repr(float(recall))})


def generate_request(
    prompt: str | None,
    messages: Iterable[Message] | None,
    question: str | None,
    session_id: str,
    sampling: Sampling | None,
    overrides: dict[str, Any],
    prefill: Method,
    decode: Method,
    reducer: Method,
    **fields: Any,
) -> winnow_pb2.GenerateRequest:
    """The message of a generation. `overrides`: sampling fields given by name, None = not given."""
    try:
        chosen = replace(sampling or Sampling(), **{k: v for k, v in overrides.items() if v is not None})
        chosen = replace(chosen, stop=(chosen.stop,) if isinstance(chosen.stop, str) else tuple(chosen.stop))
        return winnow_pb2.GenerateRequest(
            prompt=prompt or "",
            messages=messages_to_proto(messages or ()),
            question=question or "",
            session_id=session_id,
            sampling=sampling_to_proto(chosen),
            prefill=method_to_proto(prefill),
            decode=method_to_proto(decode),
            reducer=method_to_proto(reducer),
            **fields,
        )
    except (TypeError, ValueError) as error:  # protobuf's words name the field; a value it quotes is the caller's own
        raise InvalidRequest(f"request: {error}") from None


def rank_request(query: str, documents: Iterable[Document | str], method: Method, **fields: Any) -> winnow_pb2.RankRequest:
    """The message of a ranking. Plain strings get their position, from 0, as id."""
    docs = [d if isinstance(d, Document) else Document(str(i), d) for i, d in enumerate(documents)]
    try:
        return winnow_pb2.RankRequest(query=query, documents=documents_to_proto(docs), ranker=method_to_proto(method), **fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"request: {error}") from None


def collect(chunks: Iterable[Chunk]) -> Generation:
    """All chunks of one generation as one result."""
    seen = list(chunks)
    last = seen[-1] if seen else Chunk()
    return Generation(
        text="".join(c.text for c in seen),
        finish_reason=last.finish_reason,
        usage=last.usage or Usage(),
        token_ids=tuple(i for c in seen for i in c.token_ids),
        logprobs=tuple(top for c in seen for top in c.logprobs),
    )


class Attempts:
    """Up to four tries at starting a call while the server is unavailable, 0.2 to 3 s apart, within one deadline.

    Only the start is retried: once a stream has delivered an event, work was done, and its end is the call's end.
    `for attempt in attempts.sync(): with attempt: ...` and `async for attempt in attempts.asynchronous(): ...`; the last
    error is raised as it came.
    """

    def __init__(self, deadline_s: float | None) -> None:
        self._ends_at = None if deadline_s is None else time.monotonic() + deadline_s
        self._policy: dict[str, Any] = {
            "retry": tenacity.retry_if_exception(_is_unavailable),
            "wait": tenacity.wait_exponential(multiplier=0.2, exp_base=2.5, max=3.0) + tenacity.wait_random(0, 0.1),
            "stop": tenacity.stop_any(
                tenacity.stop_after_attempt(4), *([tenacity.stop_before_delay(deadline_s)] if deadline_s is not None else [])
            ),
            "reraise": True,
        }

    def timeout(self) -> float | None:
        """Seconds left of the deadline, for one attempt; None = no deadline."""
        return None if self._ends_at is None else max(0.0, self._ends_at - time.monotonic())

    def sync(self) -> tenacity.Retrying:
        return tenacity.Retrying(**self._policy)

    def asynchronous(self) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(**self._policy)


def _is_unavailable(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and _received(error)[0].code is StatusName.UNAVAILABLE


@contextmanager
def typed_errors(address: str) -> Iterator[None]:
    """Raise winnow's errors in place of gRPC's."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error, address) from None


def present(value: T | None) -> T:
    """Raises WinnowError for a stream that ended without its result."""
    if value is None:
        raise WinnowError("the server ended the stream without a result")
    return value
