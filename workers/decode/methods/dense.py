"""Dense decode: the new token reads every cached key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from winnow.index.segment import KVSegment
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.base import DecodeMethod, DecodeState, RetrievalSession, decode_methods
from winnow.workers.decode.dense import attend_dense


class DenseState(DecodeState):
    """Exact attention over the local segment."""

    def __init__(self, segment: KVSegment) -> None:
        self._layers = segment.kv.unbind(0)

    def collect(self, layer: LayerSpec, q: Tensor, n_cached: int) -> Tensor:
        pairs = layer.n_q_heads * (min(n_cached, layer.window) if layer.window else n_cached)
        self.keys_read += pairs
        self.keys_cached += pairs
        return attend_dense(layer, q, self._layers[layer.idx], n_cached)

    def close(self) -> None:
        self._layers = ()


@decode_methods.register("dense")
@dataclass(frozen=True)
class Dense(DecodeMethod):
    """Exact attention over all keys a layer may see, the control of every other method. Source: own baseline."""

    caps = Capabilities(tensor_parallel=True, exact=True, notes="exact attention over all cached keys")

    def open(self, segment: KVSegment, retrieval: RetrievalSession | None, *, strict: bool = False) -> DecodeState:
        return DenseState(segment)
