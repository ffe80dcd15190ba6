"""A worker as the text kept in Redis, and back. What comes back is checked field by field: others may write there too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from winnow.types import Fingerprint, WorkerInfo

T = TypeVar("T")
MAX_ENTRY_CHARS = 64 << 10  # an entry is below 4 KiB; anything huge was not written by us


def worker_to_json(info: WorkerInfo) -> str:
    """One worker as the text kept in Redis."""
    prints = info.fingerprint
    return json.dumps(
        {
            "worker_id": info.worker_id,
            "epoch": info.epoch,
            "roles": list(info.roles),
            "address": info.address,
            "host_id": info.host_id,
            "pid": info.pid,
            "metrics_address": info.metrics_address,
            "fingerprint": {
                "protocol": prints.protocol,
                "model": prints.model,
                "kv_layout": prints.kv_layout,
                "dtype": prints.dtype,
                "tensor_parallel": prints.tensor_parallel,
                "methods": list(prints.methods),
            },
        }
    )


def worker_from_json(text: str) -> WorkerInfo:
    """The worker in `text`.

    Raises:
        ValueError: not JSON, a field missing or of another type, or far too long. Fields not known here are ignored.
    """
    if len(text) > MAX_ENTRY_CHARS:
        raise ValueError("entry too long")
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("entry nested too deeply") from None
    prints = _field(data, "fingerprint", dict)
    return WorkerInfo(
        worker_id=_field(data, "worker_id", str),
        epoch=_field(data, "epoch", int),
        roles=_texts(data, "roles"),
        address=_field(data, "address", str),
        host_id=_field(data, "host_id", str),
        fingerprint=Fingerprint(
            protocol=_field(prints, "protocol", int),
            model=_field(prints, "model", str),
            kv_layout=_field(prints, "kv_layout", str),
            dtype=_field(prints, "dtype", str),
            tensor_parallel=_field(prints, "tensor_parallel", int),
            methods=_texts(prints, "methods"),
        ),
        pid=_field(data, "pid", int),
        metrics_address=_field(data, "metrics_address", str),
    )


def _field(data: Any, name: str, kind: type[T]) -> T:
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}: not {kind.__name__}")
    return value


def _texts(data: Any, name: str) -> tuple[str, ...]:
    values = _field(data, name, list)
    if not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name}: not all text")
    return tuple(values)
