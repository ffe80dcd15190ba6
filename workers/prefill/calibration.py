"""What a method learnt about one model (thresholds, head classes, gates), as one small file per method and model.

A file is safetensors; its header names method, model and how it was made. It is looked for under the user's folder first
(`WINNOW_HOME/calibration`, where `winnow calibrate` writes) and then among those that come with winnow.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from winnow.config import home
from winnow.errors import CorruptBlock, Unsupported

_SHIPPED = Path(__file__).parent / "calibrations"
_FORMAT = "1"
_SCALE = ".scale"
_STEPS = 127
_LEAST_STEP = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True, eq=False)
class Calibration:
    """Tensors by name, on the CPU; `made` says how they came about; `digest` names the content."""

    tensors: Mapping[str, Tensor]
    made: Mapping[str, str]
    digest: str


def file_name(method: str, fingerprint: str) -> str:
    return f"{method}-{fingerprint[:16]}.safetensors"


def save(method: str, fingerprint: str, tensors: dict[str, Tensor], made: dict[str, str]) -> Path:
    """Write a calibration into the user's folder, whole or not at all, replacing an older one.

    Args:
        fingerprint: of the model it was made with.
        made: free text by name (command, data, figures).
    """
    folder = home() / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(method, fingerprint)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    header = {**made, "format": _FORMAT, "method": method, "model": fingerprint}
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata=header)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(method: str, fingerprint: str) -> Calibration:
    """The calibration of a method for a model.

    Raises:
        Unsupported: there is none. CorruptBlock: the file is damaged or was made for another method or model.
    """
    for folder in (home() / "calibration", _SHIPPED):
        path = folder / file_name(method, fingerprint)
        if path.is_file():
            return _read(path, path.stat().st_mtime_ns, method, fingerprint)
    raise Unsupported(
        f"{method}: not calibrated for this model; run `winnow calibrate {method}` with it first, or pick another method"
    )


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Learnt parameters in a quarter of their room: those of three dimensions and more as int8 with a scale for each row.

    Args:
        tensors: [L, ...] float.

    Returns:
        By the same names int8 [L, rows, ...] and under name + ".scale" the step of each row, [L, rows] float16; smaller tensors
        as float16. All on the CPU.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().cpu()
        if tensor.dim() < 3:
            found[name] = tensor.half()
            continue
        flat = tensor.flatten(2)
        step = (flat.abs().amax(-1) / _STEPS).clamp(min=_LEAST_STEP).half()
        codes = torch.round(flat / step.float().unsqueeze(-1)).clamp(-_STEPS, _STEPS)
        found[name], found[name + _SCALE] = codes.to(torch.int8).view(tensor.shape), step
    return found


def unrounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `rounded` stored as float32, and what it did not as it is.

    Raises:
        ValueError: a scale that `rounded` does not make.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            continue
        step = tensors.get(name + _SCALE)
        if step is not None and not (
            tensor.dtype == torch.int8 and step.is_floating_point() and step.dim() == 2 and step.shape == tensor.shape[:2]
        ):
            raise ValueError(f"{name}{_SCALE} does not fit {name}")
        wide = tensor.float() if tensor.is_floating_point() or step is not None else tensor
        found[name] = wide if step is None else wide * step.float()[(..., *[None] * (tensor.dim() - 2))]
    return found


def are_numbers(tensors: Iterable[Tensor]) -> bool:
    """Whether these can be learnt parameters: floating point, not codes without their scale, and finite in float32."""
    return all(tensor.is_floating_point() and bool(tensor.float().isfinite().all()) for tensor in tensors)


def whole_number(tensor: Tensor | None, least: int, most: int) -> int | None:
    """The whole number that a tensor of one element holds; None where it does not, or the number is not in least .. most."""
    if tensor is None or tensor.numel() != 1:
        return None
    number = float(tensor)
    return int(number) if least <= number <= most and number.is_integer() else None


@functools.lru_cache(maxsize=32)
def _read(path: Path, changed_ns: int, method: str, fingerprint: str) -> Calibration:
    """`changed_ns` makes a rewritten file another entry of the cache."""
    try:
        with safe_open(path, framework="pt") as file:
            made = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CorruptBlock(
            f"{method}: its calibration file is damaged ({type(error).__name__}); run `winnow calibrate {method}` again"
        ) from None
    if (made.get("method"), made.get("model"), made.get("format")) != (method, fingerprint, _FORMAT):
        raise CorruptBlock(
            f"{method}: its calibration file is of another method, model or format; run `winnow calibrate {method}` again"
        )
    return Calibration(tensors, made, xxhash.xxh3_64_hexdigest(path.read_bytes()))
