"""Weights a second time, in oneDNN's blocked layout: the quick way to multiply the few rows of a decode step on a CPU.

A decode step reads every weight once for a row or a handful of rows, so it runs at the memory's speed or not at all. MKL's
products of few rows get half of it; oneDNN's get more, but only from its own layout. Measured on two cores with SmolLM2's
shapes, all linear layers of a step: float32 on AVX2 29.5 ms instead of 37.5 at one row, 41 instead of 62 at eight; bfloat16 on
AVX-512 15 instead of 35, 23 instead of 29. On AVX2 the plain layout is the faster one from about a hundred rows on, in
bfloat16 on AVX-512 they are level at two thousand, so both are kept.
"""

from __future__ import annotations

import platform
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
        """x [T, n] -> x weight^T + bias, [T, m], of the weights' dtype. KeyError for a weight that was not packed."""
        packed = self._packed[weight.data_ptr()]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """On a CPU that multiplies the weight's dtype itself, and a torch that was built with oneDNN."""
        native = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu_multiplies_bf16())
        return weight.device.type == "cpu" and native and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def cpu_multiplies_bf16() -> bool:
    """AVX-512 BF16, AMX, or Arm's. Elsewhere bf16 products are emulated: 8 times slower than in fp32 on an AVX2 machine."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
