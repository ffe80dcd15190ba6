"""Rotary position embedding over packed tokens, from tables computed once in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.errors import ContextTooLong
from winnow.workers.model.fused import fused
from winnow.workers.model.spec import RopeSpec


class RopeTable:
    """cos and signed sin of one `RopeSpec`, [rows, D] each in the model's dtype.

    With x = [x1, x2] the rotation is x * cos + [-x2, x1] * sin = x * cos + [x2, x1] * sin', where sin' = [-sin, sin]:
    the sign lives in the table, so that a rotation is one concatenation, one product and one fused multiply-add.
    On the CPU the table grows with the positions asked for; on a device it is built whole, since looking at the
    positions would wait for the device.
    """

    def __init__(self, spec: RopeSpec, max_context: int, dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self._max_context = max_context
        self._dtype = dtype
        self._device = device
        self._cos = torch.empty(0, 2 * len(spec.inv_freq), dtype=dtype, device=device)
        self._sin = self._cos

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin' for positions [T] int64, each [T, 1, D].

        Raises:
            ContextTooLong: on the CPU, a position outside [0, max_context). A device has its admission check only.
        """
        n_rows = self._max_context
        if self._device.type == "cpu":
            low, high = (int(edge) for edge in positions.aminmax()) if positions.numel() else (0, 0)
            if low < 0 or high >= self._max_context:
                raise ContextTooLong(f"positions: {low}..{high} outside the model's context of {self._max_context} tokens")
            n_rows = high + 1
        if n_rows > self._cos.shape[0]:
            self._build(min(self._max_context, max(n_rows, 2 * self._cos.shape[0], 4096)))
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def _build(self, n_rows: int) -> None:
        inv_freq = torch.tensor(self._spec.inv_freq, dtype=torch.float, device=self._device)
        angles = torch.arange(n_rows, dtype=torch.float, device=self._device)[:, None] * inv_freq  # [rows, D/2]
        cos, sin = angles.cos() * self._spec.scaling, angles.sin() * self._spec.scaling
        self._cos = torch.cat((cos, cos), -1).to(self._dtype)
        self._sin = torch.cat((-sin, sin), -1).to(self._dtype)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by the rows [T, 1, D] of a `RopeTable`. A new tensor; x stays as it was."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.mul(x, cos).addcmul_(swapped, sin)
