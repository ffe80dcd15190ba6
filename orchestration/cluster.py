"""Ray: start or join a cluster, put one actor in each seat, watch them, stop everything.

Run as `python -m winnow.orchestration.cluster`: the placer, a child of the supervisor with a session of its own. It is a
process apart because Ray ends a driver whose head is lost; the gateway must outlive that (R15). It takes one line of JSON on
stdin (what to place), answers with JSON lines on stdout, and stops the cluster when told so or when stdin closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.errors import ConfigError, WinnowError, WorkerLost
from winnow.orchestration import control, processes
from winnow.orchestration.seats import Seat, seats_of, thread_environment

HEALTH_EVERY_S = 1.0
STUCK_AFTER_S = 10.0  # no answer for this long: killed and replaced (R30 allows 30 s); model work runs in other threads
START_TIMEOUT_S = 600.0  # of one role, the first download and conversion of a model not included
OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum is 75 MiB; KV never travels through it
LONGEST_BACKOFF_S = 15.0
_EXIT_RAY_LOST = 4


@dataclass(frozen=True)
class Placement:
    """What the placer is told.

    Attributes:
        ray_dir: folder for Ray's session, path short enough for its sockets.
        log_dir: folder of the roles' logs; "" = leave them to Ray (a cluster of other machines).
    """

    config: WinnowConfig
    metadata_url: str
    ray_dir: str
    log_dir: str


def prepare_environment(config: WinnowConfig) -> None:
    """Settings that Ray reads from the environment at import or hands down to its processes. Call it before importing ray."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # a role that asks for no GPU still sees the ones there are
    os.environ["RAY_DEDUP_LOGS"] = "0"
    os.environ["PYTHONWARNINGS"] = "ignore"
    if config.cluster.address:
        return
    os.environ.update(thread_environment(config))
    # Ray's name is misleading: 0 makes every Ray process listen on loopback only, on Linux too.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["AUTOSCALER_METRIC_PORT"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"  # noqa: SIM112  Ray's spelling; a lost head is noticed soon


class Cluster:
    """The actors of one deployment. Use it inside one event loop."""

    def __init__(self, placement: Placement, report: Callable[..., None]) -> None:
        """`report(**message)` sends a line to the supervisor."""
        self._placement = placement
        self._report = report
        self._config = placement.config
        self._actors: dict[Seat, Any] = {}
        self._pids: dict[Seat, int] = {}
        self._is_local = not placement.config.cluster.address
        self._log = telemetry.get_logger("cluster")

    async def start(self) -> list[control.Message]:
        """Start or join Ray, place every seat, wait until all are up; returns one entry per worker.

        Raises:
            ConfigError: no Ray cluster at cluster.address, or not enough GPUs in it.
            WinnowError: what a role said was wrong.
            WorkerLost: a role's process ended while starting.
        """
        self._report(progress="starting Ray" if self._is_local else "joining the Ray cluster")
        await asyncio.to_thread(self._init_ray)
        self._check_gpus()
        seats = seats_of(self._config.cluster)
        for seat in seats:
            self._actors[seat] = self._create(seat)
        self._report(progress=f"starting {len(seats)} roles: {', '.join(s.worker_id for s in seats)}")
        waiting = {asyncio.ensure_future(self._ready(seat)): seat for seat in seats}
        try:
            workers = []
            for done in asyncio.as_completed(waiting):
                worker = await done
                workers.append(worker)
                self._report(progress=f"{worker['worker_id']} is up ({len(workers)} of {len(seats)})")
            return workers
        finally:
            for task in waiting:
                task.cancel()

    async def watch(self) -> None:
        """Watch every actor, and Ray itself, until cancelled.

        Raises:
            WorkerLost: Ray's head does not answer; the cluster must be built anew.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_head())
            for seat in self._actors:
                group.create_task(self._watch_seat(seat))

    async def stop(self, grace_s: float) -> None:
        """Drain the actors together, then end them, and with them the Ray we started."""
        calls = [asyncio.ensure_future(_as_future(actor.drain.remote(grace_s))) for actor in self._actors.values()]
        if calls:
            await asyncio.wait(calls, timeout=grace_s + 10.0)
        for call in calls:
            if not call.cancel() and not call.cancelled() and call.exception() is not None:
                self._log.warning("a role did not stop cleanly", error=type(call.exception()).__name__)
        import ray

        if self._is_local and sys.platform == "linux":
            return  # a Ray of our own is killed as a session at the end of `main`; its own way out takes over a second
        for actor in self._actors.values():
            ray.kill(actor)
        await asyncio.to_thread(ray.shutdown)

    def _init_ray(self) -> None:
        import ray

        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
        if self._is_local:
            Path(self._placement.ray_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
            ray.init(
                num_cpus=max(2, os.cpu_count() or 2),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._placement.ray_dir,
                _node_ip_address="127.0.0.1",
                **common,
            )
            return
        try:
            ray.init(address=self._config.cluster.address, **common)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ConfigError(
                f"cluster.address: no Ray cluster joined at {self._config.cluster.address} ({type(error).__name__}); start it "
                "with `ray start --head`, use the same Ray version and token, or leave cluster.address empty to start one here"
            ) from None

    def _check_gpus(self) -> None:
        import ray

        wanted = sum(seat.n_gpus for seat in seats_of(self._config.cluster))
        there = float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
        if wanted > there:
            raise ConfigError(
                f"cluster.gpus_per_worker: {wanted:g} GPUs wanted in all, Ray has {there:g}; "
                "lower it (shares such as 0.25 are allowed)"
            )

    def _create(self, seat: Seat) -> Any:
        from winnow.orchestration.actors import create_actor

        host = "127.0.0.1" if self._is_local else _address_of_this_node()
        log_file = str(Path(self._placement.log_dir) / f"{seat.worker_id}.log") if self._placement.log_dir else ""
        return create_actor(seat, self._config, self._placement.metadata_url, host, log_file)

    async def _ready(self, seat: Seat) -> control.Message:
        from ray.exceptions import RayError

        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._pids[seat] = await _as_future(self._actors[seat].pid.remote())
                answer: control.Message = await _as_future(self._actors[seat].ready.remote())
        except TimeoutError:
            raise WorkerLost(f"{seat.worker_id}: not up after {START_TIMEOUT_S:g} s; its log is in the run folder") from None
        except RayError as error:
            raise WorkerLost(
                f"{seat.worker_id}: its process ended while starting ({type(error).__name__}; out of memory is a usual reason)"
            ) from None
        if "error" in answer:
            error_sent = control.error_from_wire(answer["error"])
            raise type(error_sent)(f"{seat.worker_id}: {error_sent}")
        worker: control.Message = answer["worker"]
        return worker

    async def _watch_seat(self, seat: Seat) -> None:
        """Replace what Ray does not: a process that lives but does not answer, and one whose start failed."""
        from ray.exceptions import ActorDiedError, RayError

        backoff_s, epoch = 0.5, 0
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            try:
                async with asyncio.timeout(STUCK_AFTER_S):
                    health = await _as_future(self._actors[seat].health.remote())
            except TimeoutError:
                self._log.warning("role is stuck and is killed", worker_id=seat.worker_id, pid=self._pids.get(seat, 0))
                self._report(event="stuck", worker_id=seat.worker_id)
                await self._kill(seat)
                continue
            except ActorDiedError:
                self._log.warning("actor ended for good and is placed anew", worker_id=seat.worker_id)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                self._actors[seat] = self._create(seat)
                continue
            except RayError:  # Ray is restarting it
                continue
            self._pids[seat] = health["pid"]
            if health["state"] == "failed":
                self._log.warning("role failed to start and is tried again", worker_id=seat.worker_id)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                await self._kill(seat)
            elif health["state"] == "up" and health["epoch"] != epoch:
                if epoch:
                    self._log.info("role is back", worker_id=seat.worker_id, epoch=health["epoch"], pid=health["pid"])
                    self._report(event="restarted", worker_id=seat.worker_id, epoch=health["epoch"])
                backoff_s, epoch = 0.5, health["epoch"]

    async def _kill(self, seat: Seat) -> None:
        """End a process that may not listen any more; Ray starts it again."""
        pid = self._pids.get(seat, 0)
        if self._is_local and pid:
            processes.send(pid, signal.SIGKILL)  # a stopped process cannot follow Ray's polite request
        else:
            import ray

            await asyncio.to_thread(ray.kill, self._actors[seat], no_restart=False)

    async def _watch_head(self) -> None:
        import ray

        while True:
            await asyncio.sleep(2 * HEALTH_EVERY_S)
            try:
                async with asyncio.timeout(STUCK_AFTER_S):
                    await asyncio.to_thread(ray.nodes)  # asks the head; its loss shows here long before actors notice
            except (TimeoutError, ConnectionError, RuntimeError) as error:
                raise WorkerLost(f"Ray's head does not answer ({type(error).__name__})") from None


async def _as_future(ref: Any) -> Any:
    """A Ray reference as something asyncio can wait for and give up."""
    return await asyncio.wrap_future(ref.future())


def _address_of_this_node() -> str:
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


async def _place(placement: Placement, out: control.LineWriter) -> int:
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    cluster = Cluster(placement, out.send)

    async def work() -> None:
        out.send(ready=await cluster.start())
        await cluster.watch()

    working = asyncio.ensure_future(work())
    told = asyncio.ensure_future(commands.readline())
    await asyncio.wait([working, told], return_when=asyncio.FIRST_COMPLETED)
    if told.done():  # a command, or the supervisor is gone
        working.cancel()
        await asyncio.wait([working])
        await cluster.stop(float(control.parse(told.result()).get("grace_s", 0.0)))
        out.send(stopped=True)
        return 0
    told.cancel()
    error = working.exception()
    assert error is not None  # watching does not end by itself
    telemetry.get_logger("cluster").error(
        "cluster failed", reason=str(error) if isinstance(error, WinnowError) else telemetry.places(error)
    )
    out.send(error=control.error_to_wire(error))
    return _EXIT_RAY_LOST


def main() -> None:
    """Entry point of the placer process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the supervisor, which stops us in order
    out = control.LineWriter(os.dup(1))
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between our lines
    told = control.parse(control.read_line(0))
    config = control.config_from_wire(told["config"])
    telemetry.configure_logging(config.telemetry, "placer")
    prepare_environment(config)
    placement = Placement(config, told["metadata_url"], told["ray_dir"], told["log_dir"])
    code = 1
    try:
        # not asyncio.run: it would wait for a thread that asks a dead head
        code = asyncio.new_event_loop().run_until_complete(_place(placement, out))
    except Exception as error:
        telemetry.get_logger("cluster").error("placer failed", reason=telemetry.places(error))
        out.send(error=control.error_to_wire(error))
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        if not config.cluster.address:
            processes.kill_session_but_self()
        os._exit(code)


if __name__ == "__main__":
    main()
