"""The attention backend of a decode step: one packed token of each sequence, each reading its own segment.

All sequences' k and v are stored and all searches started (`submit`) before the first answer is waited for (`collect`), so
that a batch's retrieval overlaps with its local attention. An exception of one sequence's state is that sequence's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.index.segment import KVSegment
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.decode.base import DecodeMethod, DecodeState, RetrievalSession
from winnow.workers.decode.dense import attend_dense
from winnow.workers.decode.methods.dense import DenseState


@dataclass(eq=False)
class Slot:
    """A sequence as the backend sees it.

    Attributes:
        layers: K and V of each layer, [2, Hkv, capacity, D], views on the segment.
        position: where this step's token goes: the segment's `n_total`.
        error: set when its state raised; its rows are 0 for the rest of the step, and its owner ends it.
        is_dense: exact attention over local keys; runs here without a call into the state for each layer.
    """

    segment: KVSegment
    state: DecodeState
    layers: tuple[Tensor, ...]
    position: int = 0
    error: BaseException | None = None
    is_dense: bool = False

    def __post_init__(self) -> None:
        self.is_dense = type(self.state) is DenseState  # a subclass may do something else

    @classmethod
    def open(cls, method: DecodeMethod, segment: KVSegment, retrieval: RetrievalSession | None, *, strict: bool) -> Slot:
        """Open the method's state over a segment; nothing stays open when this raises but the retrieval session."""
        kv = segment.kv
        return cls(segment, method.open(segment, retrieval, strict=strict), kv.unbind(0))

    @property
    def keys_read_share(self) -> float:
        """Keys read / keys cached since the sequence began; 1.0 before its first step."""
        return self.state.keys_read / self.state.keys_cached if self.state.keys_cached else 1.0

    def count_dense_step(self, n_layers: int, n_q_heads: int) -> None:
        """Book a step's reads for a state that was not asked."""
        if self.is_dense:
            pairs = n_layers * n_q_heads * (self.position + 1)
            self.state.keys_read += pairs
            self.state.keys_cached += pairs


class DecodeBackend:
    """Packed token b belongs to slots[b]. Mutates the segments' tails and the slots' errors."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See `AttentionBackend`; T is the number of slots."""
        slots = self._slots
        kv = torch.stack((k, v)).unbind(2)  # B x [2, Hkv, D]
        for slot, token in zip(slots, kv, strict=True):
            slot.layers[layer.idx].select(2, slot.position).copy_(token)
        queries = q.unbind(1)  # B x [Hq, D]
        for slot, query in zip(slots, queries, strict=True):
            if slot.error is None and not slot.is_dense:
                try:
                    slot.state.submit(layer, query, slot.position + 1)
                except BaseException as error:
                    slot.error = error
        rows = [self._collect(layer, slot, query) for slot, query in zip(slots, queries, strict=True)]
        return rows[0][:, None] if len(rows) == 1 else torch.stack(rows, dim=1)

    def _collect(self, layer: LayerSpec, slot: Slot, query: Tensor) -> Tensor:
        if slot.is_dense:
            return attend_dense(layer, query, slot.layers[layer.idx], slot.position + 1)
        if slot.error is None:
            try:
                return slot.state.collect(layer, query, slot.position + 1)
            except BaseException as error:
                slot.error = error
        return torch.zeros_like(query)
