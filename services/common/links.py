"""Calls from one role to another: one channel per address, internal token, trace, remaining time, typed errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio

from winnow import telemetry
from winnow.config import GatewayConfig, WinnowConfig
from winnow.errors import ConfigError, WinnowError, WorkerLost
from winnow.services.common import deadlines
from winnow.services.common.auth import INTERNAL, INTERNAL_SCOPE, mint, resolve_secret
from winnow.services.common.server import is_loopback, read_pem
from winnow.wire import ERROR_KEY, error_from_status

TOKEN_TTL_S = 600.0


def error_of(error: grpc.RpcError) -> WinnowError:
    """The winnow error behind a failed call (sync or async)."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    details = error.details() if hasattr(error, "details") else ""
    values = {str(k): v for k, v in trailing or () if isinstance(v, str)}
    return error_from_status(code.name, details or "", values)


@contextlib.contextmanager
def translated(peer: str = "") -> Iterator[None]:
    """Raise the winnow error behind any failed call in the block. `peer` names the worker in the message of a lost one."""
    try:
        yield
    except grpc.RpcError as error:
        found = error_of(error)
        # gRPC's own text holds addresses and socket errors; only a winnow server's text is meant for callers.
        if isinstance(found, WorkerLost) and peer and not from_winnow(error):
            found = WorkerLost(f"{peer} is lost; the request may be tried again")
        raise found from None


def from_winnow(error: grpc.RpcError) -> bool:
    """A winnow server ended the call itself; otherwise gRPC or the network did."""
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return any(key == ERROR_KEY for key, _ in trailing or ())


class Links:
    """Channels to other roles, opened once per address and closed together. Use it inside one event loop."""

    def __init__(self, config: WinnowConfig, secret: str | None = None) -> None:
        self._config = config
        self._secret = resolve_secret(config.auth) if secret is None else secret
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._token: tuple[str, float] = ("", 0.0)

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to `address` (host:port)."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open(address)
        return channel

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Internal token, request id and trace of the current request."""
        if not self._secret:
            return telemetry.hop_metadata()
        token, expires = self._token
        if time.monotonic() > expires - TOKEN_TTL_S / 2:
            token = mint(self._secret, audience=INTERNAL, scopes=(INTERNAL_SCOPE,), tenant="winnow", ttl_s=TOKEN_TTL_S)
            self._token = (token, time.monotonic() + TOKEN_TTL_S)
        return (("authorization", f"Bearer {token}"), *telemetry.hop_metadata())

    def options(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Keyword arguments of a stub call: metadata and a timeout.

        Args:
            timeout_s: cap of this call; None = what is left of the current request less the hop margin.

        Raises:
            DeadlineExceeded: nothing is left.
        """
        left = deadlines.next_hop(self._config.gateway.hop_margin_s)
        known = [t for t in (left, timeout_s) if t is not None]
        timeout = min(known) if known else self._config.gateway.default_deadline_s
        stated = (deadlines.TIMEOUT_KEY, str(int(timeout * 1000)))
        return {"metadata": (*self.metadata(), stated), "timeout": timeout}

    async def forget(self, address: str) -> None:
        """Close the channel to a worker that is gone."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        for address in list(self._channels):
            await self.forget(address)

    def _open(self, address: str) -> grpc.aio.Channel:
        credentials = channel_credentials(address, self._config.gateway)
        options = channel_options(self._config.gateway)
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)


def channel_options(limits: GatewayConfig) -> tuple[tuple[str, int], ...]:
    """Options of every internal channel, async or not."""
    return (
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),  # a restarted worker is found within a second
        ("grpc.enable_retries", 0),  # retries across workers are the gateway's, which knows what is idempotent
        ("grpc.use_local_subchannel_pool", 1),
    )


def channel_credentials(address: str, limits: GatewayConfig) -> grpc.ChannelCredentials | None:
    """mTLS where it is configured; None = plain text, which only loopback may use. Raises ConfigError otherwise."""
    if not (limits.tls_cert and limits.tls_key):
        if not is_loopback(address.rsplit(":", 1)[0].strip("[]")):
            raise ConfigError("a role on another machine needs gateway.tls_cert, tls_key and tls_client_ca (mTLS)")
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=read_pem("gateway.tls_client_ca", limits.tls_client_ca) if limits.tls_client_ca else None,
        private_key=read_pem("gateway.tls_key", limits.tls_key),
        certificate_chain=read_pem("gateway.tls_cert", limits.tls_cert),
    )


@contextlib.asynccontextmanager
async def cancelling(call: Any) -> AsyncIterator[Any]:
    """Cancel a stream on every way out of the block, so that the other side stops work."""
    try:
        yield call
    finally:
        call.cancel()
