"""The identity of a model: KV of one fingerprint never meets another. Any changed byte of weights changes it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

_STEP_BYTES = 16 << 20
DIGEST_FILE = "digests.json"


def file_digest(file: Path) -> str:
    """xxh3-128 of a file's bytes, hex. Reads through a mapping; holds no copy."""
    digest = xxhash.xxh3_128()
    if file.stat().st_size:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            for start in range(0, len(view), _STEP_BYTES):
                digest.update(view[start : start + _STEP_BYTES])
    return digest.hexdigest()


def fingerprint(config: dict[str, Any], weights: Sequence[Path], tokenizer: Sequence[Path], n_layers: int) -> str:
    """Hex digest over config, weight files, tokenizer files and the number of layers that run.

    Args:
        config: as parsed; the order of its keys does not matter.
        weights, tokenizer: files, each hashed by name and content. A weight file's digest is taken from `digests.json`
            beside it where size and modification time still agree (only the converted default model has that file).
        n_layers: a model cut short is another model.
    """
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, separators=(",", ":"), default=str).encode())
    for file in weights:
        digest.update(f"\0{file.name}\0{_known_digest(file) or file_digest(file)}".encode())
    for file in tokenizer:
        digest.update(f"\0{file.name}\0{file_digest(file)}".encode())
    digest.update(f"\0layers\0{n_layers}".encode())
    return digest.hexdigest()


def remember_digests(files: Sequence[Path]) -> None:
    """Write `digests.json` beside files that nobody changes any more."""
    known = {file.name: [file.stat().st_size, file.stat().st_mtime_ns, file_digest(file)] for file in files}
    (files[0].parent / DIGEST_FILE).write_text(json.dumps(known))


def _known_digest(file: Path) -> str | None:
    try:
        size, mtime_ns, digest = json.loads((file.parent / DIGEST_FILE).read_bytes())[file.name]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no such note, or not ours: the file itself is read
    stat = file.stat()
    return str(digest) if (size, mtime_ns) == (stat.st_size, stat.st_mtime_ns) else None
