"""Where segment files lie: a folder per user, mode 0700, in shared memory where there is room.

File names are `<owner>.<epoch>.<store>.<number>.kv`. A store holds a lock file of the same prefix while it lives, so that
the files of a killed process can be told from those of a live one, whatever their epochs say.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from pathlib import Path

import xxhash

from winnow.config import KVConfig
from winnow.errors import ConfigError, CorruptBlock, LeaseLost, Overloaded
from winnow.index.segment import KVSegment
from winnow.types import SegmentHandle


def candidate_folders(config: KVConfig) -> list[Path]:
    """Folders a segment of this configuration may lie in, best first. They may not exist yet."""
    name = f"winnow-{os.getuid()}"
    if config.dir:
        return [Path(config.dir) / name]
    return [Path("/dev/shm") / name, Path(tempfile.gettempdir()) / name]


def make_private(folder: Path) -> Path:
    """Create the folder for this user alone, or check that it is.

    Raises:
        ConfigError: it cannot be made, belongs to another user, or others may enter it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
    except OSError as error:
        raise ConfigError(f"kv.dir: the segment folder cannot be made ({error.strerror}); set kv.dir to a writable one") from None
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError("kv.dir: the segment folder must be this user's own with mode 0700; remove it or set kv.dir to another")
    return folder


def free_bytes(folder: Path) -> int:
    """Bytes that files in this folder may still take."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def choose_folder(config: KVConfig) -> Path:
    """The first candidate with room for the whole budget, else the roomiest; created if need be.

    Raises:
        ConfigError: none can be made.
        Overloaded: the roomiest has less than 1 MiB left.
    """
    folders: list[Path] = []
    reason: ConfigError | None = None
    for folder in candidate_folders(config):
        try:
            folders.append(make_private(folder))
        except ConfigError as error:
            reason = error
    if not folders:
        raise reason or ConfigError("kv.dir: no folder for segments")
    for folder in folders:
        if free_bytes(folder) >= config.budget_bytes:
            return folder
    best = max(folders, key=free_bytes)
    if free_bytes(best) < 1 << 20:
        raise Overloaded(f"KV segments: {free_bytes(best)} bytes free in the segment folder; set kv.dir to a larger one")
    return best


def open_handle(handle: SegmentHandle, config: KVConfig, *, writable: bool = True) -> KVSegment:
    """Map the segment a handle names, wherever among the candidate folders its owner put it.

    Raises:
        LeaseLost: it is in none of them.
        InvalidRequest, CorruptBlock: see `KVSegment.open`.
    """
    lost: LeaseLost | None = None
    for folder in candidate_folders(config):
        try:
            # Opened before it is judged: a file of that name in a folder somebody else made is not the owner's.
            segment = KVSegment.open(folder, handle.location, expect=handle, writable=writable)
        except LeaseLost as error:
            lost = error
            continue
        if os.lstat(folder).st_uid != os.getuid():
            raise CorruptBlock(f"segment {handle.segment_id}: its folder belongs to another user")
        return segment
    raise lost or LeaseLost(f"segment {handle.segment_id}: its owner has freed it; ask for the prompt again")


def file_prefix(owner: str, epoch: int, store: str) -> str:
    """Start of every file name of one store."""
    return f"{_plain(owner)}.{epoch}.{store}."


def _plain(owner: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", owner)[:64]
    return plain if plain == owner else f"{plain}-{xxhash.xxh3_64_hexdigest(owner.encode())}"


class StoreLock:
    """A lock file held while a store lives; the kernel frees it when the process dies, however it dies."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._path = folder / f"{prefix}lock"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def remove_orphans(folder: Path, owner: str, epoch: int) -> int:
    """Delete the files of `owner`'s stores of this or an earlier epoch whose process is dead.

    Returns:
        Segment files removed.
    """
    pattern = re.compile(rf"{re.escape(_plain(owner))}\.(\d+)\.([0-9a-f]+)\.(.+)")
    dead: dict[str, bool] = {}
    removed = 0
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is None or int(match[1]) > epoch:
            continue
        prefix = f"{_plain(owner)}.{match[1]}.{match[2]}."
        if prefix not in dead:
            dead[prefix] = _is_dead(folder / f"{prefix}lock")
        if dead[prefix] and path.suffix == ".kv":
            path.unlink(missing_ok=True)
            removed += 1
    for prefix, gone in dead.items():
        if gone:
            (folder / f"{prefix}lock").unlink(missing_ok=True)
    return removed


def _is_dead(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # a store takes its lock before it makes files
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)
