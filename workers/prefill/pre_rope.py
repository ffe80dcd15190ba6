"""Back from cached, rotated q and k to what they were before RoPE, for methods whose gates look at those."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.model.rope import RopeTable
from winnow.workers.model.spec import ModelSpec


class PreRope:
    """Undoes the rotary embedding of one model.

    The decoder rotates with cos and sin rounded to the model's dtype, times a scaling where the model has one. Each pair is
    turned back with the very rows it was turned with, and divided by cos^2 + sin^2, which is not exactly one: what remains is
    the rounding of x itself.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            spec: whose rotary tables and `layer_ropes` to use. dtype, device: those of the decoder.
        """
        self._layer_ropes, self._device = spec.layer_ropes, device
        self._tables = [RopeTable(rope, spec.max_context, dtype, device) for rope in spec.ropes]

    def undo(self, x: Tensor, layer_idx: int, first: int) -> Tensor:
        """x [B, H, T, D] of the tokens at positions first .. first + T - 1 of a layer -> the same before RoPE, float32.

        Raises:
            ContextTooLong: on the CPU, a position beyond the model's context.
        """
        cos, sin = (rows.float() for rows in self.rows(layer_idx, first, x.shape[2]))
        wide = x.float()
        half = x.shape[-1] // 2
        swapped = torch.cat((wide[..., half:], wide[..., :half]), -1)
        return (wide * cos - swapped * sin) / (cos * cos + sin * sin)

    def rows(self, layer_idx: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """cos and [-sin, sin], [count, D] each in the model's dtype, that turned the tokens from position `first` on."""
        table = self._tables[self._layer_ropes[layer_idx]]
        cos, sin = table.rows(torch.arange(first, first + count, device=self._device))
        return cos.squeeze(1), sin.squeeze(1)
