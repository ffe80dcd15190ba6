"""The embedded metadata server: where it listens, what it leaves, and that it never outlives its parent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from winnow.errors import ConfigError
from winnow.orchestration import processes
from winnow.orchestration.embedded import EmbeddedServer

pytestmark = pytest.mark.timeout(30)


def listening_tcp_ports(pid: int) -> list[str]:
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1])
    return found


@pytest.mark.promise("R28")
def test_it_listens_on_a_private_unix_socket_only(short_folder: Path) -> None:
    server = EmbeddedServer(short_folder)
    url = server.start()
    try:
        with redis.from_url(url) as client:
            assert client.ping()
        assert listening_tcp_ports(server.pid) == []
        assert stat.S_IMODE((short_folder / "meta.sock").stat().st_mode) == 0o700
        assert stat.S_IMODE(short_folder.stat().st_mode) == 0o700
    finally:
        server.stop()
    assert [p.name for p in short_folder.iterdir()] == ["meta.log"]


def test_stop_ends_the_process_and_it_can_start_again(short_folder: Path) -> None:
    server = EmbeddedServer(short_folder)
    server.start()
    pid, started = server.pid, processes.start_time(server.pid)
    server.stop()
    assert not processes.is_running(pid, started)
    assert not server.is_running()
    server.start()
    assert server.is_running()
    server.stop()


def test_a_socket_left_by_a_killed_server_is_replaced(short_folder: Path) -> None:
    first = EmbeddedServer(short_folder)
    first.start()
    os.kill(first.pid, signal.SIGKILL)
    second = EmbeddedServer(short_folder)
    with redis.from_url(second.start()) as client:
        assert client.ping()
    second.stop()
    first.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ties a child's life to its parent's on Linux only")
def test_it_dies_with_a_parent_that_is_killed(short_folder: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from winnow.orchestration.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer(pathlib.Path({str(short_folder)!r}))\n"
        "server.start(); print(server.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    started = processes.start_time(pid)
    assert started
    parent.kill()
    parent.wait(timeout=5)
    assert processes.wait_gone(pid, started, 5.0)


def test_a_path_too_long_for_a_socket_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"WINNOW_HOME.*too long"):
        EmbeddedServer(tmp_path / ("x" * 100))
