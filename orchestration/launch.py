"""`up`, `down` and `serve`: what the command line and tests call. No torch, no Ray, no gRPC is imported here."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from winnow.config import WinnowConfig
from winnow.errors import Conflict, DeadlineExceeded, WinnowError, WorkerLost
from winnow.orchestration import control, processes, state
from winnow.orchestration.state import RunState

START_TIMEOUT_S = 900.0  # loading a large model from a slow disk is slow; progress is shown meanwhile

_attached: dict[int, subprocess.Popen[bytes]] = {}  # supervisors that end with this process; their stdin is the lifeline


def up(
    config: WinnowConfig,
    *,
    single: bool = False,
    detach: bool = True,
    on_progress: Callable[[str], None] = lambda text: None,
    timeout_s: float = START_TIMEOUT_S,
) -> RunState:
    """Start a deployment in its own process; returns when the gateway serves and all roles are up.

    Args:
        config: every setting. A default model is fetched by the caller beforehand if progress bars are wanted.
        single: all roles in one process, no Ray.
        detach: it goes on after this process ends; False = it drains and stops when this process ends or calls `down`.
        on_progress: called with a line for people at each step.

    Raises:
        Conflict: already running.
        ConfigError, WinnowError: why it could not start, in words of the part that failed. Nothing is left running.
        DeadlineExceeded: not up within `timeout_s`.
    """
    if state.read_state() is not None:
        raise Conflict(state.already_running())
    log_path = state.run_dir() / "supervisor.log"
    ready_read, ready_write = os.pipe()
    command = [sys.executable, "-m", "winnow.orchestration.supervisor", "--detach-ready-fd", str(ready_write)]
    command += ["--single"] * single + ["--attached"] * (not detach)
    with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(ready_write,), start_new_session=True, cwd="/"
        )
    os.close(ready_write)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps({"config": control.config_to_wire(_absolute(config))}).encode() + b"\n")
        process.stdin.flush()
        started = _wait_ready(process, ready_read, on_progress, timeout_s)
    except BaseException:  # Ctrl-C too: what was started is stopped
        _end(process, 30.0)
        raise
    finally:
        os.close(ready_read)
    if detach:
        process.stdin.close()
        process.returncode = 0  # not ours to wait for any more; keeps Python from warning about it
    else:
        _attached[process.pid] = process
    return started


def down(timeout_s: float = 60.0, on_progress: Callable[[str], None] = lambda text: None) -> bool:
    """Drain and stop the deployment of this home; True if one was running (or starting).

    Args:
        timeout_s: after this the supervisor is killed, and with the next `up` what it left.
    """
    found = state.read_state()
    pid, started = (found.pid, found.pid_started) if found else state.lock_holder()
    if not processes.is_running(pid, started):
        return False
    on_progress("draining")
    processes.send(pid, signal.SIGTERM)
    gone = _wait_gone(pid, started, timeout_s)
    if not gone:
        on_progress(f"not stopped within {timeout_s:g} s; killing it")
        processes.send(pid, signal.SIGKILL)
        _wait_gone(pid, started, 5.0)
        state.clear_state()
    _reap(pid)
    on_progress("stopped")
    return True


def serve(config: WinnowConfig, *, single: bool = False, on_progress: Callable[[str], None] = lambda text: None) -> int:
    """Run a deployment in the foreground until SIGTERM or Ctrl-C; returns the exit code (0 after a clean drain).

    Raises: as `up`.
    """
    started = up(config, single=single, detach=False, on_progress=on_progress)
    process = _attached[started.pid]
    on_progress(f"serving on {started.address}")
    previous = {n: signal.signal(n, lambda number, _: process.send_signal(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _reap(started.pid)


def _wait_ready(process: subprocess.Popen[bytes], fd: int, on_progress: Callable[[str], None], timeout_s: float) -> RunState:
    ends = time.monotonic() + timeout_s
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, ends - time.monotonic())):
                raise DeadlineExceeded(f"not up within {timeout_s:g} s; the logs in the run folder say how far it came")
            data = os.read(fd, 65536)
            if not data:
                raise WorkerLost(f"the supervisor ended while starting (exit code {process.wait(30)}): {_last_words()}")
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = control.parse(line)
                if "progress" in message:
                    on_progress(str(message["progress"]))
                elif "ready" in message:
                    return RunState(**message["ready"])
                elif "error" in message:
                    raise control.error_from_wire(message["error"])


def _last_words() -> str:
    """The last line of the supervisor's log that is not empty."""
    with contextlib.suppress(OSError):
        lines = (state.run_dir() / "supervisor.log").read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1][:300]
    return "its log is empty"


def _absolute(config: WinnowConfig) -> WinnowConfig:
    """Paths as seen from here: the supervisor works in another folder."""
    source, draft, kv = config.model.source, config.draft.source, config.kv.dir
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"source": _resolve(source)}),
            "draft": config.draft.model_copy(update={"source": _resolve(draft)}),
            "kv": config.kv.model_copy(update={"dir": _resolve(kv)}),
            "gateway": config.gateway.model_copy(
                update={name: _resolve(getattr(config.gateway, name)) for name in ("tls_cert", "tls_key", "tls_client_ca")}
            ),
        }
    )


def _resolve(text: str) -> str:
    return str(Path(text).expanduser().resolve()) if text and Path(text).expanduser().exists() else text


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _wait_gone(pid: int, started: int, timeout_s: float) -> bool:
    process = _attached.get(pid)
    if process is None:
        return processes.wait_gone(pid, started, timeout_s)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _reap(pid: int) -> None:
    process = _attached.pop(pid, None)
    if process is not None and process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def exit_code(pid: int) -> int | None:
    """Exit code of an attached supervisor; None while it runs or when it is not ours."""
    process = _attached.get(pid)
    return process.poll() if process is not None else None


__all__ = ["RunState", "WinnowError", "down", "exit_code", "serve", "up"]
