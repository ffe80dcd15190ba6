"""What both clients share: where to connect, channel options, messages from arguments, errors from statuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc

from winnow.config import home
from winnow.errors import ConfigError, InvalidRequest, WinnowError, WorkerLost
from winnow.proto.v1 import winnow_pb2
from winnow.telemetry import hop_metadata
from winnow.types import Chunk, Document, Generation, Message, MethodChoice, Sampling, Usage
from winnow.wire import documents_to_proto, error_from_status, messages_to_proto, method_to_proto, sampling_to_proto

T = TypeVar("T")
Method = str | MethodChoice | None
DEFAULT_MAX_MESSAGE_BYTES = 16 << 20

# Only calls that did no work are tried again by gRPC: a stream that has begun is not retried.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "winnow.v1.Winnow"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "3s",
                "backoffMultiplier": 2.5,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


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
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
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


def error_of(error: Any, address: str) -> WinnowError:
    """The winnow error behind a failed call, with gRPC's own words for a lost connection replaced by readable ones."""
    trailing = {str(k): v for k, v in error.trailing_metadata() or () if isinstance(v, str)}
    found = error_from_status(error.code().name, error.details() or "", trailing)
    if type(found) is WorkerLost and "winnow-error" not in trailing:
        return WorkerLost(f"no answer from {address}: nothing listens there, it went away, or TLS or its certificates do not fit")
    return found


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
