"""The Ray actor that hosts one role process. Ray restarts it when it dies; its RoleProcess then takes a new epoch (R14)."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import ray

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.errors import WinnowError
from winnow.orchestration import control
from winnow.orchestration.metadata import RedisMetadata
from winnow.orchestration.seats import Seat, thread_environment
from winnow.types import WorkerInfo

CPUS_PER_ROLE = 0.01  # roles share cores by the system's scheduling, so any number of them fits on any machine
GIVE_UP_EXIT = 3


class RoleHost:
    """Body of the actor: starts the roles in the background so that creation returns at once, and tells how they are.

    Ray calls the constructor again in a fresh process after a crash, which is all the restarting there is to do.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it; a task needs the running loop
        self, seat: Seat, config: control.Message, metadata_url: str, host: str, log_file: str
    ) -> None:
        if log_file:
            _redirect_output(Path(log_file))
        self._seat = seat
        self._host = host
        self._config: WinnowConfig = control.config_from_wire(config)
        os.environ.update(thread_environment(self._config))  # torch is not imported yet: OpenMP reads this once, then
        telemetry.configure_logging(self._config.telemetry, seat.worker_id)
        telemetry.configure_tracing(self._config.telemetry, seat.worker_id)
        self._log = telemetry.get_logger("actor")
        self._metadata = RedisMetadata(metadata_url, timeout_s=self._config.metadata.timeout_s)
        self._process: Any = None
        self._info: WorkerInfo | None = None
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> WorkerInfo:
        process_class = await asyncio.to_thread(_role_process_class)  # imports torch: seconds
        self._process = process_class(self._seat.worker_id, self._seat.roles, self._config, self._metadata, host=self._host)
        info: WorkerInfo = await self._process.start()
        self._info = info
        self._log.info("role is up", worker_id=info.worker_id, epoch=info.epoch, pid=os.getpid())
        return info

    async def ready(self) -> control.Message:
        """Wait for the start; {"worker": …} or {"error": …} (errors travel as text: Ray would wrap them)."""
        try:
            info = await asyncio.shield(self._starting)
        except (WinnowError, Exception) as error:  # anything that ends the start is the answer
            self._log.error("start failed", reason=str(error) if isinstance(error, WinnowError) else telemetry.places(error))
            return {"error": control.error_to_wire(error)}
        return {"worker": {"worker_id": info.worker_id, "epoch": info.epoch, "pid": os.getpid(), "address": info.address}}

    async def health(self) -> control.Message:
        """Who answers: {"pid", "epoch", "state"}; state is "starting", "up" or "failed". Answers while the roles work."""
        state = "up" if self._info else "failed" if self._starting.done() else "starting"
        return {"pid": os.getpid(), "epoch": self._info.epoch if self._info else 0, "state": state}

    async def pid(self) -> int:
        return os.getpid()

    async def drain(self, grace_s: float) -> None:
        """Finish running work within `grace_s`, take no more, then let everything go."""
        if self._info is not None:
            await self._process.drain(grace_s)
        await self.stop()

    async def stop(self) -> None:
        """Let everything go now."""
        if not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._process is not None:
            await self._process.stop()
        await self._metadata.close()


def create_actor(seat: Seat, config: WinnowConfig, metadata_url: str, host: str, log_file: str) -> Any:
    """Ask Ray for the actor of a seat; returns its handle at once. Ray restarts it as often as it dies."""
    options: dict[str, Any] = {
        "num_cpus": CPUS_PER_ROLE,
        "num_gpus": seat.n_gpus,
        "max_restarts": -1,
        "max_task_retries": 0,  # a health question put to a dead process must fail, not wait for the next one
        "max_concurrency": 64,
    }
    if config.cluster.address:  # a cluster of others: its nodes did not inherit our environment
        options["runtime_env"] = {"env_vars": thread_environment(config)}
    actor_class = ray.remote(**options)(RoleHost)
    return actor_class.remote(seat, control.config_to_wire(config), metadata_url, host, log_file)


def _role_process_class() -> Any:
    from winnow.services.roles import RoleProcess

    return RoleProcess


def _redirect_output(path: Path) -> None:
    """Everything this process prints goes to its own log, which outlives Ray's session folder."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
