"""Builds the gRPC server of the gateway and of every role: interceptor, health, reflection, limits, TLS, safe binding."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from winnow import telemetry
from winnow.config import GatewayConfig, WinnowConfig
from winnow.errors import ConfigError
from winnow.proto.v1 import internal_pb2_grpc, winnow_pb2_grpc
from winnow.services.common.auth import PUBLIC, RULES, Authenticator, require_rules, resolve_secret
from winnow.services.common.deadlines import DeadlineRule
from winnow.services.common.interceptor import CallInterceptor

log = telemetry.get_logger("rpc")
_PACKAGE = "winnow.v1"


class RpcServer:
    """A gRPC server, its health, and where it listens. Health is NOT_SERVING until `set_serving(True)`."""

    def __init__(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, host: str, port: int) -> None:
        self._server = server
        self._health = health_servicer
        self.host = host
        self.port = port

    @property
    def address(self) -> str:
        """host:port a client on this machine (or on the network, for a public bind) connects to."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def start(self) -> str:
        """Listen; returns the address."""
        await self._server.start()
        return self.address

    async def set_serving(self, serving: bool, service: str = "") -> None:
        """What health answers for `service` ("" = the whole process)."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(service, status)

    async def leave(self) -> None:
        """Health says NOT_SERVING from now on, whatever is set later: the first step of draining."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float | None = None) -> None:
        """Stop listening; running calls get grace_s seconds (None = 0) and are cancelled then."""
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        await self._server.wait_for_termination()


def build_server(
    servicers: Mapping[str, Any],
    config: WinnowConfig,
    *,
    audience: str = PUBLIC,
    host: str | None = None,
    port: int | None = None,
    secret: str | None = None,
    rules: Mapping[str, Any] = RULES,
    setting: str = "gateway",
) -> RpcServer:
    """A server with everything in front of its handlers. Call it inside the running event loop.

    Args:
        servicers: short service name of winnow.v1 -> servicer, e.g. {"Worker": w, "Prefill": p, "Segments": s}.
        config: message limits, deadlines, TLS and auth come from it.
        audience: PUBLIC for the gateway, INTERNAL for roles.
        host, port: where to listen; None = config.gateway's. Port 0 = any free one.
        secret: signing secret; None = `resolve_secret(config.auth)`.
        setting: name of the setting that holds the port, for messages.

    Raises:
        ConfigError: port in use, public bind without TLS and auth, unreadable TLS files, or an RPC without access rule.
    """
    gateway = config.gateway
    bind_host = gateway.host if host is None else host
    bind_port = gateway.port if port is None else port
    key = resolve_secret(config.auth) if secret is None else secret
    _refuse_open_door(bind_host, gateway, bool(key))
    full_names = [f"{_PACKAGE}.{name}" for name in servicers]
    served = [*full_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    require_rules(served, rules)
    server = grpc.aio.server(
        interceptors=(CallInterceptor(Authenticator(key, audience, rules), DeadlineRule.from_config(gateway)),),
        options=(
            ("grpc.max_receive_message_length", gateway.max_message_bytes),
            ("grpc.max_send_message_length", gateway.max_message_bytes),
            ("grpc.so_reuseport", 0),  # by default a second server on a taken port starts and steals half the calls
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_metadata_size", 16 << 10),
        ),
    )
    for name, servicer in servicers.items():
        _adder(name)(servicer, server)
    health_servicer = health.aio.HealthServicer()
    health_servicer._server_status[""] = health_pb2.HealthCheckResponse.NOT_SERVING
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(served, server)
    return RpcServer(server, health_servicer, bind_host, _bind(server, bind_host, bind_port, gateway, setting))


def _adder(name: str) -> Any:
    for module in (winnow_pb2_grpc, internal_pb2_grpc):
        add = getattr(module, f"add_{name}Servicer_to_server", None)
        if add is not None:
            return add
    raise ConfigError(f"no service {name!r} in {_PACKAGE}")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_open_door(host: str, config: GatewayConfig, has_auth: bool) -> None:
    if is_loopback(host):
        return
    missing = []
    if not (config.tls_cert and config.tls_key):
        missing.append("gateway.tls_cert and gateway.tls_key")
    if not has_auth:
        missing.append("auth.enabled=true")
    if missing:
        raise ConfigError(
            f"gateway.host: {host} is reachable from other machines and needs {' and '.join(missing)}; "
            "set them, or bind to 127.0.0.1"
        )


def read_pem(setting: str, path: str) -> bytes:
    """Contents of a PEM file named by a setting. Raises ConfigError naming the setting, not the path."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: the file cannot be read ({error.strerror})") from None


def _credentials(config: GatewayConfig) -> grpc.ServerCredentials | None:
    if not config.tls_cert and not config.tls_key:
        if config.tls_client_ca:
            raise ConfigError("gateway.tls_client_ca: client certificates need gateway.tls_cert and gateway.tls_key too")
        return None
    if not (config.tls_cert and config.tls_key):
        raise ConfigError("gateway.tls_cert and gateway.tls_key: TLS needs both, one is empty")
    pair = (read_pem("gateway.tls_key", config.tls_key), read_pem("gateway.tls_cert", config.tls_cert))
    ca = read_pem("gateway.tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _bind(server: grpc.aio.Server, host: str, port: int, config: GatewayConfig, setting: str) -> int:
    credentials = _credentials(config)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(target) if credentials is None else server.add_secure_port(target, credentials)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigError(
            f"{setting}.port: {port} on {host} cannot be bound, most likely because it is in use; stop what listens there, "
            f"or set another port (0 = any free one), e.g. WINNOW_{setting.upper()}__PORT=0"
        )
    return int(bound)
