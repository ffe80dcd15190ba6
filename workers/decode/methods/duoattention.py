"""DuoAttention while decoding: some heads read the whole cache, the others its first tokens and the last ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported
from winnow.index.segment import KVSegment
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_keys
from winnow.workers.decode.base import DecodeMethod, DecodeState, RetrievalSession, decode_methods
from winnow.workers.decode.dense import attend_dense
from winnow.workers.decode.methods.dense import DenseState
from winnow.workers.prefill.methods import duoattention as prefill
from winnow.workers.prefill.methods.duoattention import HeadClasses

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel


@dataclass(frozen=True)
class Run:
    """Neighbouring KV heads of one class: start .. stop - 1."""

    streams: bool
    start: int
    stop: int


class DuoState(DecodeState):
    """One sequence. `runs` has those of each layer, all its KV heads in order; () where no head of the layer streams."""

    def __init__(self, segment: KVSegment, runs: tuple[tuple[Run, ...], ...], sink: int, recent: int) -> None:
        self._layers = segment.kv.unbind(0)
        self._runs = runs
        self._sink = sink
        self._recent = recent

    def collect(self, layer: LayerSpec, q: Tensor, n_cached: int) -> Tensor:
        kv = self._layers[layer.idx]
        runs = self._runs[layer.idx]
        if not runs or n_cached <= self._sink + self._recent or 0 < layer.window < n_cached:
            pairs = layer.n_q_heads * (min(n_cached, layer.window) if layer.window else n_cached)
            self.keys_read += pairs
            self.keys_cached += pairs
            return attend_dense(layer, q, kv, n_cached)
        group = layer.n_q_heads // layer.n_kv_heads
        outs = []
        for run in runs:
            rows = q[run.start * group : run.stop * group]
            keys = kv[:, run.start : run.stop, :n_cached]
            if run.streams:
                keys = torch.cat((keys[:, :, : self._sink], keys[:, :, n_cached - self._recent :]), dim=2)
            outs.append(_attend(layer, rows, keys))
            self.keys_read += rows.shape[0] * keys.shape[2]
        self.keys_cached += layer.n_q_heads * n_cached
        return torch.cat(outs)

    def close(self) -> None:
        self._layers = ()


def _attend(layer: LayerSpec, rows: Tensor, kv: Tensor) -> Tensor:
    """Query heads [R, D] of a run over all its keys and values [2, H, m, D] -> [R, D]."""
    if rows.device.type == "cpu":  # a run has few heads: here its keys are divided among the threads, in `attend_dense` its heads
        return attend_keys(rows, kv[0], kv[1], scale=layer.scale, softcap=layer.softcap)[0].to(rows.dtype)
    part = dataclasses.replace(layer, n_q_heads=rows.shape[0], n_kv_heads=kv.shape[1], window=0)
    return attend_dense(part, rows, kv, kv.shape[2])


@decode_methods.register("duoattention")
@dataclass(frozen=True)
class DuoAttention(DecodeMethod):
    """Retrieval heads read all cached keys; streaming heads the `sink` first ones and the `recent` last, the new one included.

    Which KV heads stream is what the prefill method of this name and the same `sparsity` says, by the same calibration, so a
    step is the next row of such a prefill. A streaming KV head takes its whole group of query heads along. Keys keep their true
    positions. Caches of up to sink + recent tokens, and layers with a sliding window shorter than the cache, are dense.

    Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (arXiv 2410.10819, ICLR
    2025) and the published code's defaults. Deviations, beside those of the prefill method in choosing heads:
    - it saves reading, not memory: a segment keeps all tokens of all heads, which other methods and later turns may read. The
      published cache of a streaming head holds sink + recent tokens;
    - `recent` counts the new token; the published step reads it beside sink + recent cached ones;
    - heads are not reordered: runs of neighbouring heads of one class are attended one after the other, retrieval heads in
      place, streaming heads over a copy of the sink + recent tokens they read.

    Attributes:
        sparsity: share of all KV heads that stream, in [0, 1]; at 0 the method is dense. Published: 0.5 for grouped heads, 0.75
            for one KV head per query head.
        sink, recent: tokens a streaming head reads; sink >= 0, recent >= 1.
    """

    caps = Capabilities(training="calibration", notes="per KV head: all cached keys, or sink and recent")
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256
    classes: HeadClasses | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._as_prefill()  # refuses the same values in the same words
        if self.sparsity == 0.0:
            object.__setattr__(self, "caps", dataclasses.replace(self.caps, exact=True))

    def _as_prefill(self) -> prefill.DuoAttention:
        return prefill.DuoAttention(self.sparsity, self.sink, self.recent)

    def bind(self, model: LoadedModel) -> DuoAttention:
        """See `DecodeMethod.bind`. At sparsity 0 no head streams and nothing is loaded.

        Raises:
            Unsupported: not calibrated for this model. CorruptBlock: the file is damaged or does not fit the model.
        """
        classes = self._as_prefill().bind(model).classes
        assert classes is not None
        return self.with_classes(classes)

    def with_classes(self, classes: HeadClasses) -> DuoAttention:
        """A copy whose heads have these classes."""
        bound = copy.copy(self)
        object.__setattr__(bound, "classes", classes)
        return bound

    def open(self, segment: KVSegment, retrieval: RetrievalSession | None, *, strict: bool = False) -> DecodeState:
        """See `DecodeMethod.open`.

        Raises:
            Unsupported: no head classes are bound. InvalidRequest: the segment does not have the heads they are for.
        """
        if self.classes is None:
            raise Unsupported("duoattention: no head classes are bound; let the engine bind it to a model")
        have, want = (segment.layout.n_layers, segment.layout.n_kv_heads), tuple(self.classes.streaming.shape)
        if have != want:
            raise InvalidRequest(
                f"duoattention: its head classes are for {want} layers and KV heads, the segment has {have}; "
                "use the model they were found for"
            )
        if not any(self.classes.counts):
            return DenseState(segment)
        return DuoState(segment, _runs(self.classes), self.sink, self.recent)


@functools.lru_cache(maxsize=16)
def _runs(classes: HeadClasses) -> tuple[tuple[Run, ...], ...]:
    """As `DuoState` takes them. Cached, as the classes of a model and a sparsity are: they may lie on an accelerator."""
    layers = []
    for flags in classes.streaming.tolist():
        ends = itertools.accumulate(len(list(heads)) for _, heads in itertools.groupby(flags))
        borders = itertools.pairwise((0, *ends))
        layers.append(tuple(Run(flags[a], a, b) for a, b in borders) if any(flags) else ())
    return tuple(layers)
