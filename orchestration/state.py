"""Where a deployment lives and what is known of it: the run folder, its state file, its lock.

`home()/run` (0700) holds state.json (0600; the address and a token for the local user, never the signing secret), the logs
and the lock. Sockets need short paths: they lie there if the path is short, else in a private folder below the temporary one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from winnow.config import home
from winnow.errors import ConfigError, Conflict
from winnow.orchestration import processes

_RAY_SOCKET_TAIL = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
_MAX_SOCKET_PATH = 103  # bytes, the smallest limit of the systems we run on


@dataclass(frozen=True)
class RunState:
    """A running deployment, as written to state.json.

    Attributes:
        address: host:port of the gateway.
        token: of the local user, with every public scope; "" when auth is off. The file is rewritten before it expires.
        pid, pid_started: the supervisor, with its start time in clock ticks since boot (0 where the system does not tell).
        mode: "ray" (a process per role) or "single".
        started: seconds since 1970.
        metrics_address: host:port of the gateway's Prometheus endpoint, "" = none.
        version: of winnow.
    """

    address: str
    token: str
    pid: int
    pid_started: int
    mode: str
    started: float
    metrics_address: str
    version: str


def run_dir() -> Path:
    """`home()/run`, made with mode 0700.

    Raises:
        ConfigError: it cannot be made, or belongs to another user.
    """
    return _private(home() / "run")


def short_dir() -> Path:
    """A folder (0700) for sockets and Ray's files, the same for the same home, with a path short enough for sockets."""
    inside = run_dir()
    if len(bytes(inside)) + _RAY_SOCKET_TAIL <= _MAX_SOCKET_PATH:
        return inside
    return _private(Path(tempfile.gettempdir()) / f"winnow-{os.getuid()}-{_home_digest()}")


def kv_dir(configured: str, least_bytes: int) -> Path:
    """The folder of this deployment's segment files: below `configured`, else in shared memory where `least_bytes` are free."""
    name = f"winnow-{os.getuid()}-{_home_digest()}"
    if configured:
        return Path(configured) / name
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= least_bytes:
        return shared / name
    return Path(tempfile.gettempdir()) / f"{name}-kv"


def all_kv_dirs(configured: str) -> list[Path]:
    """Every folder `kv_dir` may have chosen in an earlier run with this setting."""
    return [kv_dir(configured, 0), kv_dir(configured, 1 << 62)]


def write_state(state: RunState) -> None:
    """Write state.json in one step (0600)."""
    write_private(run_dir() / "state.json", json.dumps(asdict(state), indent=1))


def read_state() -> RunState | None:
    """The running deployment, or None: never started, ended, killed (its process is gone), or the file cannot be read."""
    state = read_last_state()
    return state if state and processes.is_running(state.pid, state.pid_started) else None


def read_last_state() -> RunState | None:
    """What state.json says, whether or not that process still lives."""
    try:
        data = json.loads((home() / "run" / "state.json").read_text())
        values = {f.name: data[f.name] for f in fields(RunState)}
        state = RunState(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if isinstance(state.pid, int) and isinstance(state.pid_started, int) else None


def clear_state() -> None:
    (run_dir() / "state.json").unlink(missing_ok=True)


class RunLock:
    """Held by the supervisor as long as it lives; the system lets go of it however the process ends."""

    def __init__(self) -> None:
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            Conflict: another supervisor has it.
        """
        fd = os.open(run_dir() / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Conflict(already_running()) from None
        self._fd = fd
        pid = os.getpid()
        os.truncate(fd, 0)
        os.write(fd, json.dumps([pid, processes.start_time(pid)]).encode())

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_holder() -> tuple[int, int]:
    """Process id and start time of the last supervisor that took the lock; (0, 0) = none. It may have ended since."""
    try:
        pid, started = json.loads((home() / "run" / "lock").read_text())
        return int(pid), int(started)
    except (OSError, ValueError, TypeError):
        return 0, 0


def already_running() -> str:
    """What to tell someone who starts a second one."""
    state = read_state()
    where = f" at {state.address} (process {state.pid}, {state.mode} mode)" if state else ""
    way_out = "use it, stop it with `winnow down`, or set WINNOW_HOME to another folder for a second one"
    return f"winnow is already running{where}; {way_out}"


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees the old or the new content, never half of it."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"WINNOW_HOME: the run folder cannot be made ({error.strerror}); set it to a folder you may write to"
        ) from None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise ConfigError("WINNOW_HOME: the run folder belongs to another user or is a link; set it to a folder of your own")
    if stat.S_IMODE(info.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def _home_digest() -> str:
    return hashlib.sha256(bytes(home().resolve())).hexdigest()[:10]
