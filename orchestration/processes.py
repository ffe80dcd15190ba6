"""Looking at and ending processes we started, by id and start time, never by name.

Linux tells everything through /proc; elsewhere the start time is unknown (0) and sessions cannot be listed, so that only the
process itself is checked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_TIED = """
import ctypes, os, sys
parent, number, *command = sys.argv[1:]
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
if os.getppid() != int(parent):  # it ended before the call
    sys.exit(1)
os.execv(command[0], command)
"""


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 = no such process, a zombie, or not known on this system."""
    fields = _stat(pid)
    return 0 if fields is None or fields[0] == "Z" else int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """True while the process that had this id and start time lives; an id given to another process since then is not it."""
    if pid <= 0:
        return False
    if sys.platform == "linux":
        return started != 0 and start_time(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def in_session(session_id: int, not_before: int) -> list[int]:
    """Live processes of a session that started at `not_before` (ticks) or later. Linux only; empty elsewhere.

    The kernel gives a session's number to no new process while the session has members, so a member is what it seems.
    """
    if sys.platform != "linux" or session_id <= 1:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        fields = _stat(int(entry.name))
        if fields and fields[0] != "Z" and int(fields[3]) == session_id and int(fields[19]) >= not_before:
            found.append(int(entry.name))
    return found


def kill_session(session_id: int, not_before: int, timeout_s: float = 5.0) -> int:
    """SIGKILL every process of a session until none is left; returns how many there were."""
    killed: set[int] = set()
    ends = time.monotonic() + timeout_s
    while (alive := in_session(session_id, not_before)) and time.monotonic() < ends:
        for pid in alive:
            send(pid, signal.SIGKILL)
        killed.update(alive)
        time.sleep(0.02)  # the kernel tells nobody but the parent when a process is gone
    return len(killed)


def kill_session_but_self() -> int:
    """SIGKILL every other process of our own session. Only for a process that was started with a session of its own."""
    me = os.getpid()
    if os.getsid(0) != me:
        return 0
    others = [pid for pid in in_session(me, 1) if pid != me]
    for pid in others:
        send(pid, signal.SIGKILL)
    return len(others)


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_gone(pid: int, started: int, timeout_s: float) -> bool:
    """Wait for a process that is not our child; True when it ended in time."""
    ends = time.monotonic() + timeout_s
    while is_running(pid, started):
        if time.monotonic() >= ends:
            return False
        time.sleep(0.02)
    return True


def tied_to_parent(command: list[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """The same command, but the kernel sends it `number` when the thread that starts it ends. Linux only; unchanged elsewhere.

    A small program asks for that and then becomes the command. `preexec_fn` would need a plain fork(), and gRPC's fork handlers
    may abort the child when other threads are inside gRPC; without it `subprocess` uses vfork(), which runs no handlers.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), str(int(number)), *command]


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat after the name: [0] state, [3] session, [19] start time."""
    with contextlib.suppress(OSError):
        # the name may hold blanks and brackets, so everything up to the last bracket is skipped
        return (Path("/proc") / str(pid) / "stat").read_text(errors="replace").rpartition(") ")[2].split()
    return None
