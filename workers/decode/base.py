"""The decode plug-in point: how one query token reads a sequence's cached keys.

One step of one layer is select -> attend on each tier -> merge by log-sum-exp. A method's `DecodeState` lives as long as
its sequence. `submit` starts whatever can run elsewhere (a search in the retrieval service) and `collect` attends to
what is local, waits for the rest and merges, so that a batch's searches overlap with its local attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from winnow.index.segment import KVSegment
from winnow.registry import Capabilities, Registry, modules_in
from winnow.workers.attention.backend import LayerSpec

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel


@dataclass(frozen=True)
class Partial:
    """Attention over a subset of keys, to be merged with others by log-sum-exp.

    Attributes:
        out: [Hq, D] float32, normalised over the subset.
        lse: [Hq] float32, natural log; -inf where the subset is empty (out is then 0).
        keys_read: (query head, key) pairs attended.
        keys_scanned: (query head, key) pairs scored to find them.
    """

    out: Tensor
    lse: Tensor
    keys_read: int
    keys_scanned: int = 0


class RetrievalSession(Protocol):
    """Search over one segment's sealed keys, between its sink and its recent tokens. In process or over one gRPC stream."""

    @property
    def sink_tokens(self) -> int: ...

    @property
    def recent_tokens(self) -> int:
        """Sealed tokens at the end that are not indexed."""
        ...

    def submit(self, layer: LayerSpec, q: Tensor, top_k: int) -> None:
        """Start attention of q [Hq, D] over the top_k keys of each query head."""
        ...

    def collect(self, layer: LayerSpec) -> Partial:
        """The answer to the last `submit` of this layer. Raises WorkerLost when the service is gone."""
        ...

    def close(self) -> None: ...


class DecodeState(ABC):
    """One sequence's view of its cache while it decodes. `n_cached` counts valid tokens in the segment, the new one included."""

    keys_read: int = 0
    keys_cached: int = 0  # pairs a dense step would have read; keys_read / keys_cached is the reported share
    fallback_used: str = ""

    def submit(self, layer: LayerSpec, q: Tensor, n_cached: int) -> None:  # noqa: B027 - most methods have nothing to start
        """Start remote work for q [Hq, D] of this step."""

    @abstractmethod
    def collect(self, layer: LayerSpec, q: Tensor, n_cached: int) -> Tensor:
        """Attention output [Hq, D] in q's dtype for this step; the step's own k and v are already in the segment."""

    def close(self) -> None:  # noqa: B027
        """Free what the state holds. Called exactly once, on every way out."""


class DecodeMethod(ABC):
    """Opens a `DecodeState` for a sequence. Subclasses are frozen dataclasses whose fields are parameters."""

    name: ClassVar[str] = ""
    caps: ClassVar[Capabilities]

    def bind(self, model: LoadedModel) -> DecodeMethod:
        """The method ready for `model`; the engine calls it once per request, before `open`.

        A method that needs nothing of the model, the default, returns itself. One that was calibrated for a model returns a copy
        that holds what `calibration.load` finds for it. Mutates nothing.

        Raises:
            Unsupported: not calibrated for this model, or the model's shape does not fit.
        """
        return self

    def index_spec(self, n_tokens: int) -> tuple[str, int, int] | None:
        """(index spec, sink tokens, recent tokens) of the index to open over n_tokens sealed tokens; None = needs none.

        Asked before `bind`: it depends on parameters alone.
        """
        return None

    @abstractmethod
    def open(self, segment: KVSegment, retrieval: RetrievalSession | None, *, strict: bool = False) -> DecodeState:
        """State for one sequence over `segment`.

        Args:
            retrieval: the opened index, where `index_spec` asked for one; None when it could not be had.
            strict: raise instead of falling back to exact attention when retrieval is lost.

        Raises:
            Unsupported: strict and no retrieval, or what `bind` would have brought is missing.
        """


decode_methods: Registry[DecodeMethod] = Registry(
    kind="decode method",
    entry_points="winnow.decode_methods",
    modules=modules_in("winnow.workers.decode.methods"),
)
