"""Float32 weights a second time, in oneDNN's blocked layout: the quick way to multiply the few rows of a decode step on a CPU.

A decode step reads every weight once for a row or a handful of rows, so it runs at the memory's speed or not at all. MKL's
products of few rows get half of it; oneDNN's get more, but only from its own layout. Measured on two AVX2 cores with
SmolLM2's shapes, all linear layers of a step: 29.5 ms instead of 37.5 at one row, 41 instead of 62 at eight. From about a
hundred rows on the plain layout is the faster one, so both are kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FEW_ROWS = 64
_TYPICAL_ROWS = 8  # what the layout is chosen for; measured as good as a layout of its own for each of 1 to 64


class PackedWeights:
    """Packed copies of weights [m, n], found again by the weight itself. Costs their bytes once more."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._packed = {w.data_ptr(): torch.ops.mkldnn._reorder_linear_weight(w, _TYPICAL_ROWS) for w in weights}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, n] -> x weight^T + bias, [T, m], float32. KeyError for a weight that was not packed."""
        packed = self._packed[weight.data_ptr()]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Float32 on a CPU, and a torch that was built with oneDNN."""
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
