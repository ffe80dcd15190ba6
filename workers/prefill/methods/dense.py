"""Dense prefill: every row reads every key before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import PrefillMethod, prefill_methods


@prefill_methods.register("dense")
@dataclass(frozen=True)
class Dense(PrefillMethod):
    """Exact causal attention, the control of every other method. Source: own baseline."""

    caps = Capabilities(tensor_parallel=True, exact=True, notes="exact attention")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """None: the executor's dense path."""
        return None
