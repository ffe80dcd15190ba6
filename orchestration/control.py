"""JSON lines between the processes of one deployment: progress, readiness, errors. Pipes only, never a socket."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from winnow import errors
from winnow.config import WinnowConfig
from winnow.errors import WinnowError

Message = dict[str, Any]


class LineWriter:
    """Writes one JSON object a line to a file descriptor. A reader that is gone is not our failure: the rest is dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, **message: Any) -> None:
        """Write one message; keys and values as JSON allows."""
        if self._fd < 0:
            return
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")  # below PIPE_BUF: whole lines, whoever else writes
        except BrokenPipeError:
            self._fd = -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def parse(line: bytes | str) -> Message:
    """One line as a message; a line that is not a JSON object gives an empty one (a library printed something)."""
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def read_line(fd: int) -> bytes:
    """One line from a descriptor without reading further (the rest may belong to another reader)."""
    parts = bytearray()
    while not parts.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            break
        parts += byte
    return bytes(parts)


def error_to_wire(error: BaseException) -> Message:
    """A deliberate error by class and text; anything else by its type only, since its text may quote secrets or paths."""
    for inner in _leaves(error):
        if isinstance(inner, WinnowError):
            return {"kind": type(inner).__name__, "text": str(inner)}
    first = next(_leaves(error))
    return {
        "kind": "WinnowError",
        "text": f"unexpected {type(first).__name__} while starting; the log of the run folder says where",
    }


def error_from_wire(data: Mapping[str, Any]) -> WinnowError:
    """The error a message speaks of."""
    kind = getattr(errors, str(data.get("kind", "")), None)
    text = str(data.get("text", "failed without saying why"))
    return kind(text) if isinstance(kind, type) and issubclass(kind, WinnowError) else WinnowError(text)


def config_to_wire(config: WinnowConfig) -> Message:
    """Every setting, the signing secret included: for pipes and for Ray's authenticated channels only."""
    return config.model_dump(mode="json")


def config_from_wire(data: Message) -> WinnowConfig:
    """The same configuration again; all fields are given, so neither the environment nor a file changes anything."""
    return WinnowConfig(**data)


def _leaves(error: BaseException) -> Any:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
