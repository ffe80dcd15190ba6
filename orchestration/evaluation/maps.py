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
_SLAB_BYTES = 64 << 20  # most float32 probabilities held at once


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


@dataclass(eq=False)
class MapSums:
    """An `AttentionMap` in the making: the sums of the rows seen so far."""

    layer: int
    head: int
    n_tokens: int
    _sums: Tensor | None = None  # [3, side, side]: mass, kept pairs, causal pairs

    @property
    def cell(self) -> int:
        """The smallest power of two of tokens for which _CELLS suffice, so that its borders are tile borders as well."""
        return 1 << max(0, (-(-self.n_tokens // _CELLS) - 1).bit_length())

    def add(self, layer: LayerSpec, plan: TilePlan | None, q: Tensor, k: Tensor) -> None:
        """The rows of one forward pass; each row of the prompt is added once.

        Args:
            plan: None = everything is kept.
            q: [Hq, N, D]. k: [Hkv, M, D], all keys up to the last row's.

        Rows are done in slabs of bounded memory. Waits for the device.
        """
        (hq, n, _), m, cell = q.shape, k.shape[1], self.cell
        side = -(-self.n_tokens // cell)
        if self._sums is None:
            self._sums = torch.zeros(3, side, side)
        keys = k[self.head * k.shape[0] // hq]
        key = torch.arange(m, device=q.device)
        step = max(1, _SLAB_BYTES // (4 * m))
        for start in range(0, n, step):
            stop = min(n, start + step)
            position = torch.arange(start, stop, device=q.device) + (m - n)
            allowed = key <= position[:, None]
            if layer.window:
                allowed &= key > position[:, None] - layer.window
            logits = logits_of(q[self.head, start:stop], keys, layer)
            pairs = allowed
            if plan is not None:
                pairs = allowed & plan.to_dense_mask(start, stop)[0, self.head * plan.mask_heads // hq]
            for i, x in enumerate((torch.softmax(logits.masked_fill_(~allowed, -torch.inf), -1), pairs, allowed)):
                columns = torch.nn.functional.pad(x.float(), (0, side * cell - m)).unflatten(1, (side, cell)).sum(2)
                self._sums[i].index_add_(0, (position // cell).cpu(), columns.cpu())

    def finished(self) -> AttentionMap:
        """The map of all rows added."""
        assert self._sums is not None, "no row was added"
        mass, kept, allowed = self._sums
        rows = (self.n_tokens - torch.arange(mass.shape[0]) * self.cell).clamp(max=self.cell)
        pictures = (mass / rows[:, None]).numpy(), (kept / allowed.clamp(min=1)).numpy()
        return AttentionMap(self.layer, self.head, self.n_tokens, self.cell, *pictures)
