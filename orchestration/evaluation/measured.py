"""The attention backend that measures: what `PrefillBackend` does, with a clock around selection and attention and the layer's
sampled rows compared with exact attention. The clock stands still while it compares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.orchestration.evaluation.maps import MapSums
from winnow.orchestration.evaluation.metrics import RowMetrics, head_densities, row_metrics, sampled_rows
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.backend import PrefillBackend
from winnow.workers.prefill.base import PrefillMethod


@dataclass(eq=False)
class LayerLog:
    """One layer of one prompt; every forward pass of a chunked prompt adds to it.

    Attributes:
        rows: what was found on the sampled rows of each pass.
        kept: [Hq] pairs kept, and pairs: causal pairs of one head, over the passes.
        select_s, attend_s: seconds spent planning and attending, device included.
    """

    rows: list[RowMetrics] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    pairs: float = 0.0
    select_s: float = 0.0
    attend_s: float = 0.0


@dataclass
class Recorder:
    """What is to be measured of a prompt of n_tokens tokens, and what was found.

    Attributes:
        n_rows: query rows to sample.
        map_at: (layer, query head) of which to keep the attention map; None = none.
    """

    n_tokens: int
    n_rows: int = 64
    map_at: tuple[int, int] | None = None
    layers: dict[int, LayerLog] = field(default_factory=dict)
    map: MapSums | None = None

    def rows_of(self, start: int, n: int) -> list[int]:
        """The sampled rows among positions start .. start + n - 1, as rows of that pass."""
        return [row - start for row in sampled_rows(self.n_tokens, self.n_rows) if start <= row < start + n]


@dataclass
class MeasuredBackend(PrefillBackend):
    """A `PrefillBackend` whose output and KV are bit for bit the same, and which fills in a `Recorder`."""

    recorder: Recorder = field(default_factory=lambda: Recorder(0))

    def _plan(self, layer: LayerSpec, method: PrefillMethod, n: int, q: Tensor, k: Tensor, raw: RawQK) -> TilePlan | None:
        """See `PrefillBackend`. Mutates the recorder."""
        began = _now(q.device)
        plan = super()._plan(layer, method, n, q, k, raw)
        self._log(layer).select_s += _now(q.device) - began
        return plan

    def _attend(self, layer: LayerSpec, plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PrefillBackend`. Mutates the tally and the recorder."""
        n, start, log = q.shape[2], k.shape[2] - q.shape[2], self._log(layer)
        began = _now(q.device)
        out, _ = attend_plan(plan, q, k, v, scale=layer.scale, softcap=layer.softcap, window=layer.window)
        log.attend_s += _now(q.device) - began
        pairs = n * start + n * (n + 1) / 2
        density = [1.0] if plan is None else head_densities(plan)
        by_head = [density[h * len(density) // layer.n_q_heads] for h in range(layer.n_q_heads)]
        self.tally.add(float(layer.n_q_heads) * pairs, sum(by_head) / len(by_head))
        log.kept = [pairs * d + (log.kept[h] if log.kept else 0.0) for h, d in enumerate(by_head)]
        log.pairs += pairs
        rows: Sequence[int] = self.recorder.rows_of(start, n)
        if rows:
            log.rows.append(row_metrics(layer, plan, q[0], k[0], v[0], out[0], rows))
        wanted = self.recorder.map_at
        if wanted is not None and wanted[0] == layer.idx:
            if self.recorder.map is None:
                self.recorder.map = MapSums(layer.idx, wanted[1], self.recorder.n_tokens)
            self.recorder.map.add(layer, plan, q[0], k[0])
        return out

    def _log(self, layer: LayerSpec) -> LayerLog:
        return self.recorder.layers.setdefault(layer.idx, LayerLog())


def _now(device: torch.device) -> float:
    """Seconds, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
