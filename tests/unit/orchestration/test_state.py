"""Run folder, state file, lock, and what a killed predecessor left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from winnow.config import WinnowConfig
from winnow.errors import ConfigError, Conflict
from winnow.orchestration import placer, processes, state

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    with contextlib.suppress(ConfigError):  # a test made the run folder unusable
        if state.short_dir() != state.run_dir():
            shutil.rmtree(state.short_dir())


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    yield process
    process.kill()
    process.wait(timeout=5)


def a_state(pid: int, pid_started: int) -> state.RunState:
    return state.RunState("127.0.0.1:7070", "token", pid, pid_started, "ray", 1.0, "", "0")


def test_state_is_read_while_its_process_lives_and_not_after(sleeper: subprocess.Popen[bytes]) -> None:
    written = a_state(sleeper.pid, processes.start_time(sleeper.pid))
    state.write_state(written)
    assert state.read_state() == written
    sleeper.kill()
    sleeper.wait(timeout=5)
    assert state.read_state() is None
    assert state.read_last_state() == written


def test_another_process_under_the_same_id_is_not_taken_for_ours(sleeper: subprocess.Popen[bytes]) -> None:
    state.write_state(a_state(sleeper.pid, processes.start_time(sleeper.pid) - 1))
    assert state.read_state() is None


@pytest.mark.promise("R28")
def test_files_with_secrets_are_for_their_owner_only(own_home: Path) -> None:
    state.write_state(a_state(os.getpid(), processes.start_time(os.getpid())))
    assert stat.S_IMODE((own_home / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((own_home / "run" / "state.json").stat().st_mode) == 0o600
    (own_home / "run").chmod(0o755)
    state.run_dir()
    assert stat.S_IMODE((own_home / "run").stat().st_mode) == 0o700


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"address": 1}', '{"pid": "x"}'])
def test_a_damaged_state_file_reads_as_not_running(own_home: Path, text: str) -> None:
    state.run_dir()
    (own_home / "run" / "state.json").write_text(text)
    assert state.read_state() is None


def test_unknown_fields_of_a_newer_version_are_ignored(own_home: Path) -> None:
    written = a_state(os.getpid(), processes.start_time(os.getpid()))
    state.write_state(written)
    path = own_home / "run" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "zone": "eu"}))
    assert state.read_state() == written


def test_the_lock_is_exclusive_and_says_what_runs() -> None:
    first, second = state.RunLock(), state.RunLock()
    first.acquire()
    state.write_state(a_state(os.getpid(), processes.start_time(os.getpid())))
    with pytest.raises(Conflict, match=r"already running at 127\.0\.0\.1:7070.*winnow down"):
        second.acquire()
    assert state.lock_holder() == (os.getpid(), processes.start_time(os.getpid()))
    first.release()
    second.acquire()
    second.release()


def test_a_long_home_gets_a_short_private_folder_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / ("h" * 120)))
    short = state.short_dir()
    try:
        assert len(str(short)) < 40
        assert stat.S_IMODE(short.stat().st_mode) == 0o700
        assert state.short_dir() == short
    finally:
        short.rmdir()


def test_a_run_folder_that_is_a_link_is_refused(own_home: Path, tmp_path: Path) -> None:
    own_home.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (own_home / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="WINNOW_HOME"):
        state.run_dir()


def test_what_a_killed_run_left_is_ended_and_removed(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    config = WinnowConfig(kv={"dir": str(tmp_path)})  # type: ignore[arg-type]
    placer.record_child("placer", sleeper.pid, processes.start_time(sleeper.pid))
    segments = state.kv_dir(str(tmp_path), 0)
    segments.mkdir(mode=0o700)
    (segments / "orphan.kv").write_bytes(b"x")
    (state.short_dir() / "ray").mkdir()
    state.write_state(a_state(sleeper.pid, 1))
    found = placer.clean_stale(config)
    assert sleeper.wait(timeout=5) == -signal.SIGKILL
    assert "1 processes of Ray" in found
    assert not segments.exists()
    assert not (state.short_dir() / "ray").exists()
    assert placer.read_children() == {}
    assert state.read_last_state() is None
    assert placer.clean_stale(config) == []


def test_a_session_is_not_touched_when_its_number_was_given_away(sleeper: subprocess.Popen[bytes]) -> None:
    later = processes.start_time(sleeper.pid) + 1
    assert processes.in_session(sleeper.pid, later) == []
    assert processes.kill_session(sleeper.pid, later) == 0
    assert sleeper.poll() is None
