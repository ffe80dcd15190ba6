"""One head's whole attention map, shrunk to a picture, with what a plan keeps of it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.scoring import logits_of

_CELLS = 128  # most cells of the picture on a side
_SLAB_BYTES = 128 << 20  # most float32 probabilities held at once


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Pictures of side x side cells, each of `cell` query rows x `cell` keys.

    Attributes:
        mass: [side, side] float32, mean attention mass that a row of the cell gives to all keys of the cell.
        kept: [side, side] float32, share of the cell's causal pairs that the plan keeps; cells without any are 0.
        n_tokens: rows and keys of the whole map; the last cell may be ragged.
    """

    layer: int
    head: int
    n_tokens: int
    cell: int
    mass: NDArray[np.float32]
    kept: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """Half precision, which a picture does not outlive, as base64."""
        packed = {name: base64.b64encode(getattr(self, name).astype("<f2").tobytes()).decode() for name in ("mass", "kept")}
        return {"layer": self.layer, "head": self.head, "n_tokens": self.n_tokens, "cell": self.cell, **packed}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AttentionMap:
        """The inverse of `to_json`, up to rounding."""
        side = -(-data["n_tokens"] // data["cell"])
        mass, kept = (
            np.frombuffer(base64.b64decode(data[name]), "<f2").reshape(side, side).astype(np.float32) for name in ("mass", "kept")
        )
        return cls(data["layer"], data["head"], data["n_tokens"], data["cell"], mass, kept)


def attention_map(layer: LayerSpec, plan: TilePlan | None, q: Tensor, k: Tensor, head: int) -> AttentionMap:
    """The map of one query head over a prompt taken whole.

    Args:
        plan: None = everything is kept.
        q: [Hq, N, D]. k: [Hkv, N, D].

    A cell is the smallest power of two of tokens for which _CELLS suffice, so that its borders are tile borders as well. Rows
    are done in slabs of bounded memory. Waits for the device. Mutates nothing.
    """
    hq, n, _ = q.shape
    cell = 1
    while -(-n // cell) > _CELLS:
        cell *= 2
    side = -(-n // cell)
    keys = k[head * k.shape[0] // hq]
    mass, kept = (torch.zeros(side, side, device=q.device) for _ in range(2))
    key = torch.arange(n, device=q.device)
    step = max(1, _SLAB_BYTES // (4 * n * cell)) * cell
    for start in range(0, n, step):
        stop = min(n, start + step)
        position = torch.arange(start, stop, device=q.device)[:, None]
        allowed = key <= position
        if layer.window:
            allowed &= key > position - layer.window
        probabilities = torch.softmax(logits_of(q[head, start:stop], keys, layer).masked_fill_(~allowed, -torch.inf), -1)
        pairs = allowed
        if plan is not None:
            pairs = allowed & plan.to_dense_mask(start, stop)[0, head * plan.mask_heads // hq]
        at = slice(start // cell, -(-stop // cell))
        mass[at] = _cells(probabilities, cell) / _cells(torch.ones_like(probabilities[:, :1]), cell)
        kept[at] = _cells(pairs.float(), cell) / _cells(allowed.float(), cell).clamp(min=1)
    return AttentionMap(layer.idx, head, n, cell, mass.cpu().numpy(), kept.cpu().numpy())


def _cells(x: Tensor, cell: int) -> Tensor:
    """[rows, columns] -> sums over cells of cell x cell, the last ones ragged."""
    padded: Tensor = torch.nn.functional.pad(x, (0, -x.shape[1] % cell, 0, -x.shape[0] % cell))
    cells: Tensor = padded.unflatten(0, (-1, cell)).sum(1).unflatten(1, (-1, cell)).sum(2)
    return cells
