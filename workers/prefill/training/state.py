"""What an unfinished training has done so far, on the disk, so that a second call goes on where the first one stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from winnow.config import home
from winnow.errors import InvalidRequest


class TrainingState:
    """A folder of named pieces, one for each method, model, seed and set of options: others do not go on with it.

    Pieces appear whole or not at all. Nothing here is needed once the calibration is saved.
    """

    def __init__(self, method: str, fingerprint: str, options: object, seed: int) -> None:
        self.method = method
        digest = xxhash.xxh3_64_hexdigest(f"{options!r} {seed}".encode())
        self.folder: Path = home() / "calibration" / f"{method}-{fingerprint[:16]}-{digest}.training"

    def read(self, name: str) -> dict[str, Tensor] | None:
        """A piece, or None where there is none or it cannot be read: then it is made again."""
        try:
            return load_file(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError):
            return None

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a piece, replacing an older one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.{os.getpid()}.partial"
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial)
            partial.replace(self.folder / f"{name}.safetensors")
        finally:
            partial.unlink(missing_ok=True)

    def need_finite(self, tensors: Mapping[str, Tensor], rate: float) -> None:
        """Let nobody use a training that diverged, or its state: to go on with that would end the same.

        Args:
            tensors: what is to be saved, in the dtype it is saved in: float16 ends at 65,504. rate: of the training.

        Raises:
            InvalidRequest: one is not finite.
        """
        diverged = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
        if diverged is not None:
            self.remove()
            raise InvalidRequest(
                f"calibrate {self.method}: rate={rate} is too high: what was learnt ({diverged}) is not finite; try a tenth of "
                "it, or --dtype fp32 where the model's own numbers overflow"
            )

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def pack(step: int, params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, the optimiser's state of each, and how many steps are done, as one piece."""
    piece = {"step": torch.tensor(step)}
    for i, param in enumerate(params):
        piece[f"{i}"] = param
        piece |= {f"{i}.{key}": value for key, value in optimizer.state[param].items()}
    return piece


def unpack(piece: dict[str, Tensor], params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put a piece of `pack` back into the parameters and the optimiser, in place; returns the steps done."""
    for i, param in enumerate(params):
        with torch.no_grad():
            param.copy_(piece[f"{i}"])
        prefix = f"{i}."
        state = {key.removeprefix(prefix): value for key, value in piece.items() if key.startswith(prefix)}
        optimizer.state[param] = {key: value.to(param.device) if value.dim() else value for key, value in state.items()}
    return int(piece["step"])
