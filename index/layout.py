"""What the bytes of a KV segment mean: the part of a segment that two processes must agree on before they share one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
import xxhash

from winnow.errors import InvalidRequest

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class SegmentLayout:
    """Shape and type of the keys and values of one token.

    Attributes:
        n_layers: L, layers that keep K and V.
        n_kv_heads: Hkv, the same in every layer.
        head_size: D of keys and of values.
        dtype: "fp32", "fp16" or "bf16".
        version: of the arrangement [L][K, V][Hkv, capacity, D]; raised when it changes.
    """

    n_layers: int
    n_kv_heads: int
    head_size: int
    dtype: str
    version: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"layout.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r:.20}")
        for name in ("n_layers", "n_kv_heads", "head_size", "version"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise InvalidRequest(f"layout.{name} must be an integer in [1, {1 << 20}], got {value!r:.20}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one key (or value) of one head of one layer."""
        return self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers and heads."""
        return self.n_layers * 2 * self.n_kv_heads * self.row_bytes

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)

    def digest(self) -> str:
        """Hex digest, the `kv_layout` of a Fingerprint and of a SegmentHandle."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())
