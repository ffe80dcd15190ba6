"""The supervisor's side of the placer process: starts it, listens to it, starts it anew when it or Ray is lost (R15)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path

from winnow import telemetry
from winnow.config import WinnowConfig
from winnow.errors import WorkerLost
from winnow.orchestration import control, processes, state

_LONGEST_BACKOFF_S = 15.0
_MAX_LINE_BYTES = 1 << 20


class RayHost:
    """One role per process, placed by Ray. Same interface as `single.SingleHost`.

    Attributes:
        n_rebuilds: how often the whole cluster had to be built anew since the start.
    """

    mode = "ray"

    def __init__(self, config: WinnowConfig, metadata_url: str, log_dir: Path) -> None:
        self._config = config
        self._metadata_url = metadata_url
        self._log_dir = log_dir
        self._ray_dir = state.short_dir() / "ray"
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0
        self._log = telemetry.get_logger("placer")
        self.n_rebuilds = 0

    async def start(self, report: Callable[[str], None]) -> list[control.Message]:
        """Start the placer and wait until every role is up; returns one entry per worker.

        Raises:
            WinnowError: what the placer or a role said.
            WorkerLost: the placer ended without a word; its last words are in supervisor.log.
        """
        if not self._config.cluster.address:
            # a session killed earlier leaves gigabytes of nothing useful behind
            await asyncio.to_thread(shutil.rmtree, self._ray_dir, ignore_errors=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "winnow.orchestration.cluster",
            stdin=PIPE, stdout=PIPE, stderr=None, start_new_session=True, limit=_MAX_LINE_BYTES,
        )  # fmt: skip
        self._process, self._started = process, processes.start_time(process.pid)
        record_child("placer", process.pid, self._started)
        assert process.stdin is not None
        job = {
            "config": control.config_to_wire(self._config),
            "metadata_url": self._metadata_url,
            "ray_dir": str(self._ray_dir),
            "log_dir": "" if self._config.cluster.address else str(self._log_dir),
        }
        process.stdin.write(json.dumps(job).encode() + b"\n")
        while message := await self._next():
            if "progress" in message:
                report(str(message["progress"]))
            elif "ready" in message:
                return list(message["ready"])
            elif "error" in message:
                raise control.error_from_wire(message["error"])
        raise WorkerLost(f"the placer process ended while starting (exit code {await process.wait()})")

    async def watch(self) -> None:
        """Keep the roles placed until cancelled: a placer that ended is replaced, with everything it had started."""
        backoff_s = 0.5
        while True:
            while message := await self._next():
                self._log.info("placer says", said=message)
            self._log.error("the placer or Ray is lost; building the cluster anew", exit_code=await self._exit_code())
            while True:
                await asyncio.to_thread(self._kill_all)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
                self.n_rebuilds += 1
                try:
                    await self.start(lambda text: self._log.info("placer", progress=text))
                except Exception as error:
                    self._log.error("building the cluster failed; trying again", reason=telemetry.places(error))
                    continue
                backoff_s = 0.5
                break

    async def stop(self, grace_s: float) -> None:
        """Drain the roles, end the placer and with it everything Ray started."""
        process = self._process
        if process is None:
            return
        if process.returncode is None and process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps({"grace_s": grace_s}).encode() + b"\n")
                await process.stdin.drain()
            try:
                async with asyncio.timeout(grace_s + 15.0):
                    while await self._next():
                        pass
                    await process.wait()
            except TimeoutError:
                self._log.error("the placer does not stop and is killed")
        await asyncio.to_thread(self._kill_all)
        if not self._config.cluster.address:
            await asyncio.to_thread(shutil.rmtree, self._ray_dir, ignore_errors=True)
        self._process = None

    async def _next(self) -> control.Message:
        """The placer's next message; empty when it ended."""
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if message := control.parse(line):
                return message
        return {}

    async def _exit_code(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    def _kill_all(self) -> None:
        if self._process is not None:
            processes.kill_session(self._process.pid, self._started)


def record_child(name: str, pid: int, started: int) -> None:
    """Note a child so that the next start can end it if we are killed before we can."""
    path = state.run_dir() / "children.json"
    known = read_children()
    known[name] = {"pid": pid, "started": started}
    state.write_private(path, json.dumps(known))


def read_children() -> dict[str, dict[str, int]]:
    """Children noted by the last supervisor."""
    try:
        data = json.loads((state.run_dir() / "children.json").read_text())
        return {str(k): {"pid": int(v["pid"]), "started": int(v["started"])} for k, v in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def clean_stale(config: WinnowConfig) -> list[str]:
    """End and remove what a killed supervisor left: its processes, sockets, Ray's folder, segment files.

    Call it with the run lock held. Returns what was found, for the log.
    """
    found = []
    for name, child in read_children().items():
        if name == "placer":
            n = processes.kill_session(child["pid"], child["started"])
            if n:
                found.append(f"{n} processes of Ray")
        elif processes.is_running(child["pid"], child["started"]):
            processes.send(child["pid"], signal.SIGKILL)
            found.append(name)
    folders = [state.short_dir() / "ray", *state.all_kv_dirs(config.kv.dir)]
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
            found.append(folder.name)
    for name in ("children.json", "state.json"):
        (state.run_dir() / name).unlink(missing_ok=True)
    return found
