"""One deployment as an object: what is started in which order, kept going, and stopped so that nothing is left.

Order of starting: lock, what a killed predecessor left, metadata, then roles and gateway together; the state file is
written when all roles are up and the gateway serves. Order of stopping: health NOT_SERVING, running requests finish within
`gateway.drain_grace_s`, gateway, roles, metadata, files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.errors import ConfigError, WinnowError, WorkerLost
from winnow.orchestration import placer, processes, state
from winnow.orchestration.embedded import EmbeddedServer
from winnow.orchestration.leases import DeploymentLease
from winnow.orchestration.metadata import RedisMetadata
from winnow.orchestration.placer import RayHost
from winnow.orchestration.seats import ROLES
from winnow.orchestration.single import SingleHost
from winnow.orchestration.state import RunState
from winnow.workers.defaults import check_defaults

TOKEN_TTL_S = 7 * 24 * 3600.0
SERVING_TIMEOUT_S = 60.0
EMBEDDED_CHECK_S = 0.5  # between looks at the embedded metadata server; R11 gives it 5 s to be back


class Deployment:
    """One deployment on this machine. Use it inside one event loop, started from the main thread."""

    def __init__(self, config: WinnowConfig, *, single: bool, on_progress: Callable[[str], None]) -> None:
        self._config = config
        self._configured_kv_dir = config.kv.dir
        self._single = single
        self._report = on_progress
        self._lock = state.RunLock()
        self._embedded: EmbeddedServer | None = None
        self._metadata: RedisMetadata | None = None
        self._lease: DeploymentLease | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._host: RayHost | SingleHost | None = None
        self._gateway: Any = None
        self._address = ""
        self._owns_files = False  # until the lock is ours
        self._metrics: telemetry.MetricsServer | None = None
        self._log = telemetry.get_logger("supervisor")

    async def start(self) -> RunState:
        """Start everything; returns once the gateway serves and every role is up.

        Raises:
            Conflict: a deployment of this home is running, or another one uses the same Redis.
            ConfigError, WinnowError: what was wrong; all that had been started is stopped by `stop`.
        """
        self._lock.acquire()
        self._owns_files = True
        if found := await asyncio.to_thread(placer.clean_stale, self._config):
            self._log.warning("cleaned up after a killed run", found=found)
        _check_port(self._config)
        await asyncio.to_thread(check_defaults, self._config)
        self._config = _complete(self._config)
        if self._config.cluster.address and not self._config.metadata.redis_url and not self._single:
            raise ConfigError(
                "metadata.redis_url: empty, but cluster.address names a Ray cluster whose machines cannot reach the embedded "
                "server; set it to a Redis server they can all reach"
            )
        url = self._config.metadata.redis_url or self._start_embedded()
        self._metadata = RedisMetadata(url, timeout_s=self._config.metadata.timeout_s)
        if self._config.metadata.redis_url:
            await self._metadata.check_reachable()
            self._lease = DeploymentLease(self._metadata)
            await self._lease.take()
            self._keeping = asyncio.create_task(self._lease.keep())  # from now on: starting may take longer than the lease lasts
        self._host = (
            SingleHost(self._config, self._metadata) if self._single else RayHost(self._config, url, state.run_dir() / "logs")
        )
        async with asyncio.TaskGroup() as group:
            roles = group.create_task(self._host.start(self._report))
            group.create_task(self._make_gateway())
        self._log.info("roles are up", workers=roles.result())
        self._address = await self._gateway.start()
        await self._until_served()
        return self._write_state()

    async def run(self) -> None:
        """Keep things going until cancelled: roles, embedded server, the local user's token."""
        assert self._host is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._host.watch())
            group.create_task(self._refresh_token())
            if self._embedded is not None:
                group.create_task(self._watch_embedded(self._embedded))

    async def stop(self, grace_s: float) -> None:
        """Drain for at most `grace_s`, then stop all that was started, whatever of it fails to."""
        steps: list[tuple[str, Callable[[], Any]]] = []
        if self._gateway is not None:
            steps.append(("gateway", lambda: self._gateway.drain(grace_s)))
        if self._host is not None:
            steps.append(("roles", lambda: self._host.stop(min(grace_s, 5.0))))  # type: ignore[union-attr]
        if self._lease is not None:
            if self._keeping is not None:
                self._keeping.cancel()
            steps.append(("deployment lease", self._lease.give_back))
        if self._metadata is not None:
            steps.append(("metadata", self._metadata.close))
        for name, step in steps:
            try:
                await step()
            except Exception as error:  # the next step must run; the reason is in the log
                self._log.error("stopping failed", step=name, reason=telemetry.places(error))
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.stop)
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        if self._owns_files:
            await asyncio.to_thread(self._remove_files)
        self._lock.release()

    def _start_embedded(self) -> str:
        self._report("starting the embedded metadata server")
        self._embedded = EmbeddedServer(state.short_dir())
        url = self._embedded.start()
        placer.record_child("metadata", self._embedded.pid, processes.start_time(self._embedded.pid))
        return url

    async def _make_gateway(self) -> None:
        """Everything slow about the gateway (imports, tokenizer), while the roles load. It listens when they are up."""
        if self._config.telemetry.metrics:
            self._metrics = telemetry.serve_metrics(self._config.telemetry.metrics_port)
        telemetry.configure_tracing(self._config.telemetry, "gateway")
        gateway_class, bundle = await asyncio.to_thread(_load_gateway, self._config.model.source)
        self._gateway = gateway_class(self._config, self._metadata, bundle)

    async def _until_served(self) -> None:
        """Wait until the gateway has accepted a worker of every role: they fit each other and answer."""
        counts = self._config.cluster
        for role in (r for r in ROLES if getattr(counts, r) > 0):
            try:
                await self._gateway.router.wait_for(role, SERVING_TIMEOUT_S)
            except WorkerLost as error:
                states = {w.name: f"{w.state} {w.reason}".strip() for w in self._gateway.router.workers}
                raise WorkerLost(f"the gateway accepted no {role} worker within {SERVING_TIMEOUT_S:g} s: {states}") from error

    def _write_state(self) -> RunState:
        pid = os.getpid()
        current = RunState(
            address=self._address,
            token=self._mint_token(),
            pid=pid,
            pid_started=processes.start_time(pid),
            mode="single" if self._single else "ray",
            started=time.time(),
            metrics_address=self._metrics.address if self._metrics else "",
            version=_version(),
        )
        state.write_state(current)
        return current

    def _mint_token(self) -> str:
        from winnow.services.common.auth import mint

        if not self._config.auth.enabled:
            return ""
        return mint(self._config.auth.secret, scopes=("generate", "rank", "read", "admin"), ttl_s=TOKEN_TTL_S)

    async def _refresh_token(self) -> None:
        while True:
            await asyncio.sleep(TOKEN_TTL_S / 2)
            self._write_state()

    async def _watch_embedded(self, server: EmbeddedServer) -> None:
        """A metadata server that died is started again, empty; the roles announce themselves within a heartbeat.

        One that does not start is tried again and again: without it requests are slower, not impossible (R11).
        """
        while True:
            await asyncio.sleep(EMBEDDED_CHECK_S)
            if server.is_running():
                continue
            self._log.error("the embedded metadata server ended and is started again")
            try:
                server.launch()  # from the main thread: the kernel ties its life to this thread's
                placer.record_child("metadata", server.pid, processes.start_time(server.pid))
                await asyncio.to_thread(server.wait_until_up)
            except (WinnowError, OSError) as error:
                self._log.error("the embedded metadata server did not start; trying again", reason=str(error))

    def _remove_files(self) -> None:
        state.clear_state()
        for name in ("children.json", "secret"):  # a secret made for this run ends with it; a configured one was never written
            (state.run_dir() / name).unlink(missing_ok=True)
        for folder in state.all_kv_dirs(self._configured_kv_dir):
            shutil.rmtree(folder, ignore_errors=True)
        short = state.short_dir()
        if short != state.run_dir():
            shutil.rmtree(short, ignore_errors=True)


def _complete(config: WinnowConfig) -> WinnowConfig:
    """The configuration with what is decided at start-up: signing secret and folder of segment files."""
    from winnow.services.common.auth import resolve_secret

    secret = resolve_secret(config.auth, state.run_dir())
    folder = state.kv_dir(config.kv.dir, config.kv.budget_bytes)
    if not config.cluster.address:
        try:
            folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise ConfigError(
                f"kv.dir: a folder for segments cannot be made there ({error.strerror}); set it to one you may write to"
            ) from None
    return config.model_copy(
        update={
            "auth": config.auth.model_copy(update={"secret": secret}),
            "kv": config.kv.model_copy(update={"dir": str(folder)}),
        }
    )


def _load_gateway(source: str) -> tuple[Any, Any]:
    from winnow.services.gateway.server import Gateway
    from winnow.workers.model.loader import load_tokenizer

    return Gateway, load_tokenizer(source)


def _check_port(config: WinnowConfig) -> None:
    """Say at once that the gateway's port is taken, not after the roles have loaded. The real binding comes later."""
    host, port = config.gateway.host, config.gateway.port
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that is only waiting out old connections is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"gateway.port: {port} on {host} cannot be bound ({error.strerror}); stop what listens there, or set another "
                "port (0 = any free one), e.g. WINNOW_GATEWAY__PORT=0"
            ) from None


def _version() -> str:
    try:
        return version("winnow-llm")
    except PackageNotFoundError:
        return "unknown"
