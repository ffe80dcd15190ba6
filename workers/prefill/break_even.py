"""Whether a layer runs by its method or dense: whatever is predicted to be faster, selection included.

The choice depends on the tokens up to a chunk's end, the method and the kind of device alone, never on other requests or on a
clock: the same chunk after the same tokens gives the same KV. On an accelerator a plan's density travels to the host beside the
work and is looked at a fixed number of layers later, so that the host stays ahead and the device never runs dry; a chunk's first
one before a second plan is made, so that a text unlike the usual ones costs one layer and not several.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.costs import DeviceCosts, MethodCosts, Size

# Passes from a plan on an accelerator to the first choice that knows its density: so far the host may run ahead. A chunk's first
# density is waited for; the device has that layer's attention and linear work to do meanwhile.
LAG = 8
# Of what dense attention would have taken so far: what may be lost in finding out that sparse does not pay. Half of the 3 % that
# are promised, for what predictions are off.
ALLOWANCE = 0.015
# Of dense attention's time: what sparse must be predicted to stay below. Predictions on a CPU are off by up to a quarter, on an
# accelerator the host may fall behind where layers are short, and a gain of less than a tenth is not worth the risk.
_PAYS_BELOW = 0.9
# Milliseconds that a sparse pass takes on an accelerator besides selection and attention: the dense end of a prompt, putting both
# together, measuring and booking. Of a layer of an 8B-shaped model 0.2 to 0.4 at 8K; on a CPU nothing beside the rest.
_AROUND_MS = 0.3
# Where nobody measured the method on the device:
_LEAST_KEYS = 8192
_MOST_DENSITY = 0.25

SPARSE_REASONS = ("pays", "trial", "unmeasured")
DENSE_REASONS = ("too_short", "no_gain", "too_dense")  # not tried for either reason, and dropped after selection


class _Read:
    """A number on its way from an accelerator."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(value.device))

    def wait(self) -> float:
        self._arrived.synchronize()
        return float(self._value)


@dataclass(eq=False)
class BreakEven:
    """The choices of one prompt, chunk by chunk. Ask `tries` before a method plans and `takes` after; `begin_chunk` before each
    chunk.

    A layer is tried when the method is predicted to gain a tenth at the density that is expected: the mean of the
    layers' so far in this chunk as far as known, else the usual one of the method with its parameters at this length. Else when
    what that may lose fits the allowance: 1.5 % of dense attention's time so far in the chunk, less what has been lost already,
    or may be by trials of which the density is on its way.
    On a CPU, where a plan's density is known at once, a plan that is too dense is dropped: only its selection is lost.

    Calls smaller than any that was measured are dense. A method that nobody measured on this kind of device is tried from 8192
    keys on, and taken while its plans have a density of at most 0.25.

    Attributes:
        device: what dense attention costs on it, and the method does; None = not measured.
        method: its `PrefillMethod.spec`.
        counts: passes through a layer by reason, one of `SPARSE_REASONS` or `DENSE_REASONS`, or "method" where the method
            itself left the layer dense. Mutated.
    """

    device: DeviceCosts | None
    method: str
    counts: Counter[str] = field(default_factory=Counter)
    _densities: list[float] = field(default_factory=list)  # of the layers so far
    _dense_ms: float = 0.0
    _lost_ms: float = 0.0
    _trial_ms: float = 0.0  # what the pass that is tried now may lose; 0 = it is expected to pay
    _passes: int = 0  # of this chunk
    _on_the_way: deque[tuple[int, Size, float, _Read]] = field(default_factory=deque)  # the pass, and what it may lose as a trial

    @cached_property  # not looked up for each layer: a short prompt waits for the host
    def _costs(self) -> tuple[DeviceCosts, MethodCosts] | None:
        method = self.device.of(self.method) if self.device is not None else None
        return (self.device, method) if self.device is not None and method is not None else None

    def begin_chunk(self) -> None:
        """Forget what earlier chunks were like. Counts stay."""
        self._densities.clear()
        self._on_the_way.clear()
        self._passes = 0
        self._dense_ms = self._lost_ms = 0.0

    def tries(self, layer: LayerSpec, rows: int, keys: int, device: torch.device) -> bool:
        """Whether the method shall plan this pass."""
        self._passes += 1
        while self._on_the_way and (not self._densities or self._on_the_way[0][0] <= self._passes - LAG):
            _, size, _, density = self._on_the_way.popleft()
            self._note(size, density.wait(), may_drop=False)
        reason = self._why_not(layer, Size.of(layer, rows, keys), device)
        if reason:
            self.counts[reason] += 1
        return not reason

    def _why_not(self, layer: LayerSpec, size: Size, device: torch.device) -> str:
        """One of `DENSE_REASONS`, "" = it is tried."""
        if layer.window or layer.softcap:  # dense reads the window alone; no fast path of a plan soft-caps
            return "no_gain"
        if self._costs is None:
            if size.keys < _LEAST_KEYS:
                return "too_short"
            return "" if self._expected(0.0) <= _MOST_DENSITY else "no_gain"
        costs, method = self._costs
        dense = costs.dense_ms(size)
        self._dense_ms += dense
        if not method.covers(size):
            return "too_short"
        expected = self._expected(method.usual_density(size.keys, self.method.partition(":")[2]))
        around = 0.0 if device.type == "cpu" else _AROUND_MS
        selection, attention = method.selection_ms(size) + around, method.attention_ms(size, expected)
        self._trial_ms = 0.0
        if selection + attention <= dense * _PAYS_BELOW:
            return ""
        self._trial_ms = selection if device.type == "cpu" else selection + max(0.0, method.attention_ms(size, 1.0) - dense)
        at_risk = sum(trial_ms for _, _, trial_ms, _ in self._on_the_way)
        return "" if self._lost_ms + at_risk + self._trial_ms <= ALLOWANCE * self._dense_ms else "no_gain"

    def _expected(self, usual: float) -> float:
        return sum(self._densities) / len(self._densities) if self._densities else usual

    def takes(self, layer: LayerSpec, plan: TilePlan | None) -> bool:
        """Whether the plan of a pass that was tried shall run."""
        if plan is None:
            self.counts["method"] += 1
            return False
        size = Size.of(layer, plan.n_rows, plan.n_keys)
        share = plan.kept_pairs.sum().double() * (layer.n_q_heads // plan.mask_heads / size.causal)
        if share.device.type == "cpu":
            density = float(share)
            if not self._note(size, density, may_drop=True):
                self.counts["too_dense"] += 1
                return False
        else:
            self._on_the_way.append((self._passes, size, self._trial_ms, _Read(share)))
        self.counts["unmeasured" if self._costs is None else "trial" if self._trial_ms else "pays"] += 1
        return True

    def _note(self, size: Size, density: float, *, may_drop: bool) -> bool:
        """Remember a plan's density and what was lost by it; whether running it is faster than dense."""
        self._densities.append(density)
        if self._costs is None:
            return density <= _MOST_DENSITY
        dense, method = self._costs[0].dense_ms(size), self._costs[1]
        attention = method.attention_ms(size, density)
        runs = attention <= dense
        spent = min(attention, dense) if may_drop else attention + _AROUND_MS  # only a CPU knows a density in time to drop a plan
        self._lost_ms += max(0.0, method.selection_ms(size) + spent - dense)
        return runs


def dense_share(passes: Mapping[str, int]) -> float:
    """Share of passes, counted by reason, that ran dense because sparse would not have paid; 0 where there were none."""
    total = sum(passes.values())
    return sum(passes.get(reason, 0) for reason in DENSE_REASONS) / total if total else 0.0
