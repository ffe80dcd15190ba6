"""Where weights come from: a uniform view of safetensors folders, with errors that name the tensor and the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from winnow.errors import CorruptBlock, UnknownName

_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
FETCH_AGAIN = "copy or download the model again"


class WeightSource(Protocol):
    """Tensors by their name in `names.weight_shapes`, on the CPU, in the file's own float type.

    Attributes:
        norms_hold_one: Gemma's norm weights already contain the 1 that is added to them (GGUF does that).
    """

    norms_hold_one: bool

    def get(self, name: str) -> Tensor:
        """Raises CorruptBlock: missing or unreadable; the message names it."""
        ...


class SafetensorsSource:
    """One or several mapped safetensors files; a tensor is a view of the mapping until it is copied."""

    norms_hold_one = False

    def __init__(self, files: Sequence[Path]) -> None:
        """
        Raises:
            CorruptBlock: a file that is truncated or is not safetensors.
        """
        self._where: dict[str, tuple[str, object]] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")
                names: list[str] = list(handle.keys())  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, ValueError) as error:
                raise CorruptBlock(f"model: {file.name} is truncated or broken ({_reason(error)}); {FETCH_AGAIN}") from None
            self._where |= {name: (file.name, handle) for name in names}
        self._prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in self._where), _PREFIXES[0])
        self._head = next((name for name in _HEADS if name in self._where), _HEADS[0])

    def get(self, name: str) -> Tensor:
        """As `WeightSource.get`."""
        full = self._head if name == "lm_head.weight" else self._prefix + name
        if full not in self._where:
            raise CorruptBlock(f"model: tensor {full} is missing from its safetensors; {FETCH_AGAIN}")
        file, handle = self._where[full]
        try:
            tensor: Tensor = handle.get_tensor(full)  # type: ignore[attr-defined]
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptBlock(f"model: tensor {full} in {file} is broken ({_reason(error)}); {FETCH_AGAIN}") from None
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CorruptBlock(f"model: tensor {full} in {file} is {tensor.dtype}, not fp32, fp16 or bf16")
        return tensor


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, by its index where it is sharded; sorted by name.

    Raises:
        UnknownName: no weights, or a file the index names is missing.
        CorruptBlock: the index cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CorruptBlock(f"model: {index.name} is not a safetensors index; {FETCH_AGAIN}") from None
    elif single.is_file():
        names = [single.name]
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        if not names:
            raise UnknownName(
                "model: the folder has no .safetensors file; save the model with safe_serialization=True or give a .gguf file"
            )
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UnknownName(f"model: weight file {Path(name).name} is missing from the folder; {FETCH_AGAIN}")
    return [folder / name for name in names]


def _reason(error: Exception) -> str:
    """First words of a library's message, without what might be a path."""
    words = [word for word in str(error).split() if "/" not in word and "\\" not in word]
    return " ".join(words[:12]) or type(error).__name__
