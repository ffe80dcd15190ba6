"""What an evaluation has finished: one JSON line a cell in an append-only file, synced before the next cell begins.

A folder belongs to one model on one machine, because times of two machines say nothing about each other, and to one chunk and
tail of prefill, which decide what every method reads. Methods, tasks, lengths and seeds may be added to it later: a cell is known
by everything its result depends on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from winnow import __version__
from winnow.errors import Conflict, CorruptBlock, InvalidRequest
from winnow.orchestration.journals import whole_lines, write_atomic
from winnow.workers.model.loader import LoadedModel

CELLS, MANIFEST = "cells.jsonl", "run.json"
_FORMAT = 2  # raised when cells are measured or kept in another way
_PLACE = ("method", "task", "length", "seed", "asked_depth")  # what the user names of a cell
_CODE = ("--", ":/", ":(top,exclude)tests/bench/results")  # a benchmark's own file does not change what the next one measures
_OPTIONS = {"chunk_tokens": "--chunk", "tail_tokens": "--tail"}  # as the user names what a folder shares

Record = dict[str, Any]


def environment(model: LoadedModel, chunk_tokens: int, tail_tokens: int) -> dict[str, str]:
    """Everything that all cells of a folder share: model, machine, versions that decide results or times, chunk and tail.

    Args: chunk_tokens, tail_tokens: as `Grid` has them.
    """
    device = model.decoder.device
    return {
        "format": str(_FORMAT),
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": model.dtype_name,
        "chunk_tokens": str(chunk_tokens),
        "tail_tokens": str(tail_tokens),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "winnow": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}, {os.cpu_count()} cores"


@functools.cache
def commit() -> str:
    """Short commit of the checkout that runs, with "+" when it has changes other than results; "" for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no", *_CODE))
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or not ours to ask
        return ""
    return head + ("+" if changed else "")


def check_free(folder: Path, *, resume: bool) -> None:
    """Raises Conflict: the folder holds cells and resume is False."""
    if (folder / CELLS).exists() and not resume:
        raise Conflict("--out: the folder holds an evaluation already; add --resume to go on with it, or use another folder")


def cell_key(*parts: object) -> str:
    """The name of a cell: a digest of everything its result depends on."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, default=str).encode())


class Journal:
    """The finished cells of one folder, by key, in the order they were finished. Use as a context manager.

    Args:
        folder: made if it is not there.
        shared: what `environment` says; a folder of another one is refused.
        resume: go on with what is there; otherwise a folder with cells is refused.

    A torn last line, left by a crash, is cut off on opening.

    Raises:
        InvalidRequest: the folder cannot be written.
        Conflict: the folder holds cells and resume is False, or they were made with another model, machine, version, chunk or
            tail.
        CorruptBlock: a line before the last one is damaged.
    """

    def __init__(self, folder: Path, shared: dict[str, str], *, resume: bool) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.done = self._open(shared, resume)
            self._file = (folder / CELLS).open("ab", buffering=0)  # what failed to be written must not be tried again on closing
        except OSError as error:
            raise InvalidRequest(f"--out: cannot write there ({error.strerror}); choose another folder") from None

    def _open(self, shared: dict[str, str], resume: bool) -> dict[str, Record]:
        cells, manifest = self.folder / CELLS, self.folder / MANIFEST
        check_free(self.folder, resume=resume)
        if manifest.exists():
            known = _manifest(manifest, "--out")
            for name in sorted(known.keys() | shared.keys()):
                if known.get(name) != shared.get(name):
                    said = _OPTIONS.get(name, name)
                    raise Conflict(
                        f"--out: the folder's cells were made with {said} {known.get(name)!r}, this run has "
                        f"{shared.get(name)!r}; use another folder or the same {said}, so that what is compared "
                        "was measured alike"
                    )
        elif cells.exists() and cells.stat().st_size:
            raise CorruptBlock(f"--out: there are cells but no {MANIFEST} that says how they were made; use another folder")
        else:
            write_atomic(manifest, json.dumps(shared, indent=1) + "\n")
        return _read(cells)

    def add(self, record: Record) -> None:
        """Write a finished cell; it is on disk when this returns.

        Raises:
            InvalidRequest: it cannot be written; the cells before it are kept.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InvalidRequest(
                f"--out: a finished cell cannot be written there ({error.strerror}); those before it are kept: make room, then "
                "the same command with --resume goes on"
            ) from None
        self.done[record["key"]] = record

    def latest(self) -> list[Record]:
        """The records that count. Of two cells that differ only in what the user does not name (a method's version or
        calibration, rows measured) the later one."""
        return _latest(self.done)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_folder(folder: Path) -> tuple[dict[str, str], list[Record]]:
    """What a folder's cells share, as `environment`, and those of its cells that count. A torn last line is cut off.

    Raises:
        InvalidRequest: the folder holds no evaluation. CorruptBlock: a file of it is damaged.
    """
    try:
        shared = _manifest(folder / MANIFEST, folder.name)
    except OSError as error:
        raise InvalidRequest(f"{folder.name}: holds no evaluation ({error.strerror}); give the folder of one") from None
    return shared, _latest(_read(folder / CELLS))


def _manifest(path: Path, where: str) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CorruptBlock(f"{where}: its {MANIFEST} is not what winnow wrote; use another folder")
    return found


def _latest(done: dict[str, Record]) -> list[Record]:
    found = {tuple(r[name] for name in _PLACE): r for r in done.values()}
    return list(found.values())


def _read(path: Path) -> dict[str, Record]:
    return {record["key"]: record for record in _records(whole_lines(path))}


def _records(lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        try:
            record: Record = json.loads(line)
            for name in ("key", *_PLACE):
                record[name]
        except (ValueError, KeyError, TypeError):
            raise CorruptBlock(
                f"--out: line {number} of {CELLS} is damaged; remove the line to have its cell done again"
            ) from None
        yield record
