"""Real metadata servers: the embedded one and Debian's redis-server, each in a folder of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis

from winnow.orchestration.embedded import EmbeddedServer
from winnow.orchestration.metadata import RedisMetadata


class RealRedis:
    """redis-server on a unix socket (or a loopback port with a password), without persistence."""

    def __init__(self, folder: Path, *, port: int = 0, password: str = "") -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail("redis-server is not installed; these tests need it: apt-get install redis-server")
        self._socket = folder / "real.sock"
        self._command = [binary, "--save", "", "--appendonly", "no", "--dir", str(folder), "--loglevel", "warning"]
        self._command += (
            ["--port", str(port), "--bind", "127.0.0.1"] if port else ["--port", "0", "--unixsocket", str(self._socket)]
        )
        self._command += ["--requirepass", password] if password else []
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://:{password}@127.0.0.1:{port}/0" if port else f"unix://{self._socket}"

    def start(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ends = time.monotonic() + 10
        while True:
            try:
                with redis.from_url(self.url) as client:
                    client.ping()
                return self.url
            except redis.ConnectionError:
                assert time.monotonic() < ends, "redis-server did not start"
                time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=5)
            self._process = None


Server = EmbeddedServer | RealRedis


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder whose path is short enough for a socket (pytest's own are not)."""
    folder = Path(tempfile.mkdtemp(prefix="wn-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["embedded", "redis-server"])
def server(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[Server]:
    made: Server = EmbeddedServer(short_folder) if request.param == "embedded" else RealRedis(short_folder)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    """A second client that plays the operator (or the vandal)."""
    with redis.from_url(server.url, decode_responses=True) as client:
        yield client


@pytest.fixture
async def store(server: Server) -> AsyncIterator[RedisMetadata]:
    made = RedisMetadata(server.url, timeout_s=0.5)
    yield made
    await made.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        port: int = link.getsockname()[1]
        return port


class Snapshot:
    """All keys as they are now, to be put back later as an old dump would."""

    def __init__(self, client: redis.Redis) -> None:
        self._raw = redis.from_url("unix://" + client.connection_pool.connection_kwargs["path"])  # dumps are bytes
        self._keys = {key: (self._raw.dump(key), max(0, self._raw.pttl(key))) for key in self._raw.keys("*")}

    def restore(self) -> None:
        self._raw.flushall()
        for key, (value, ttl_ms) in self._keys.items():
            self._raw.restore(key, ttl_ms, value)
