"""RetrievalAttention: read the first, the latest and the best-matching keys; the last found by a vector index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported, WorkerLost
from winnow.index.segment import KVSegment
from winnow.index.spec import make_index
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_keys
from winnow.workers.attention.lse import merge
from winnow.workers.decode.base import DecodeMethod, DecodeState, RetrievalSession, decode_methods
from winnow.workers.decode.dense import attend_dense


class RetrievalState(DecodeState):
    """One sequence: the static set W is attended here, the found set by the retrieval session; merged exactly.

    Sealed tokens between sink and recent are the session's; everything else, all generated tokens included, is W. Once
    the session is lost every layer is read densely from the local segment, and `fallback_used` says so.
    """

    def __init__(self, segment: KVSegment, retrieval: RetrievalSession, top_k: int, *, strict: bool) -> None:
        self._layers = segment.kv.unbind(0)
        self._retrieval: RetrievalSession | None = retrieval
        self._top_k = top_k
        self._strict = strict
        # The session's own numbers: it was opened over these sealed tokens, and W must be what it left out.
        self._sink = min(retrieval.sink_tokens, segment.n_tokens)
        self._recent_from = max(self._sink, segment.n_tokens - retrieval.recent_tokens)

    def _searches(self, layer: LayerSpec) -> bool:
        # A layer with a window never reads far keys, so there is nothing to find.
        return self._retrieval is not None and not layer.window and self._recent_from > self._sink

    def submit(self, layer: LayerSpec, q: Tensor, n_cached: int) -> None:
        if self._retrieval is not None and self._searches(layer):
            try:
                self._retrieval.submit(layer, q, self._top_k)
            except WorkerLost:
                self._lose()

    def collect(self, layer: LayerSpec, q: Tensor, n_cached: int) -> Tensor:
        pairs = layer.n_q_heads * (min(n_cached, layer.window) if layer.window else n_cached)
        kv = self._layers[layer.idx]
        if self._retrieval is not None and self._searches(layer):
            # Local work first: the search runs meanwhile.
            k, v = torch.cat((kv[:, :, : self._sink], kv[:, :, self._recent_from : n_cached]), dim=2).unbind(0)
            out, lse = attend_keys(q, k, v, scale=layer.scale, softcap=layer.softcap)
            try:
                found = self._retrieval.collect(layer)
            except WorkerLost:
                self._lose()
            else:
                self.keys_cached += pairs
                self.keys_read += layer.n_q_heads * k.shape[1] + found.keys_read
                return merge([out, found.out.to(out.device)], [lse, found.lse.to(out.device)])[0].to(q.dtype)
        self.keys_cached += pairs
        self.keys_read += pairs
        return attend_dense(layer, q, kv, n_cached)

    def _lose(self) -> None:
        if self._strict:
            raise Unsupported(
                "decode method retrieval-attention: the retrieval service was lost, and strict forbids going on with dense; "
                "try again, or leave strict off"
            ) from None
        self.fallback_used = LOST
        self._end_session()

    def _end_session(self) -> None:
        if self._retrieval is not None:
            self._retrieval.close()
            self._retrieval = None

    def close(self) -> None:
        self._end_session()
        self._layers = ()


LOST = "decode: dense (retrieval lost)"


class _FallenBack(RetrievalState):
    """Retrieval could not be had from the start: exact attention, said so."""

    def __init__(self, segment: KVSegment) -> None:
        self._layers = segment.kv.unbind(0)
        self._retrieval = None
        self._sink = self._recent_from = 0
        self.fallback_used = LOST


class _AllStatic(_FallenBack):
    """W covers every sealed token: nothing to search, exact attention as intended."""

    def __init__(self, segment: KVSegment) -> None:
        super().__init__(segment)
        self.fallback_used = ""


@decode_methods.register("retrieval-attention")
@dataclass(frozen=True)
class RetrievalAttention(DecodeMethod):
    """Softmax over W + top-k keys of each query head, both parts exact and merged by log-sum-exp.

    Args:
        sink_tokens: first tokens, always read.
        recent_tokens: last sealed tokens, always read, as are all generated ones.
        top_k: keys per query head found by the index among the rest.
        index: index spec; "auto" is exact below 16K keys.

    Source: RetrievalAttention, arXiv 2409.10516, sections 3.2 and 3.3. Deviations: the index is any of winnow's (theirs is
    an attention-aware graph); generated tokens stay in W for good; layers with a sliding window are read as they are.
    """

    caps = Capabilities(
        exact=False, fallback="dense", needs=frozenset({"retrieval"}),
        notes="first + recent + top-k keys found by an index; exact softmax over those",
    )  # fmt: skip
    sink_tokens: int = 128
    recent_tokens: int = 512
    top_k: int = 100
    index: str = "auto"

    def __post_init__(self) -> None:
        for name, low in (("sink_tokens", 0), ("recent_tokens", 0), ("top_k", 1)):
            if not low <= getattr(self, name) <= 1 << 24:
                raise InvalidRequest(
                    f"decode method retrieval-attention: {name} must be in [{low}, {1 << 24}], got {getattr(self, name)}"
                )
        make_index(self.index, 1 << 17)  # refuses an unknown or unfit spec at admission; both sides of "auto" are known good

    def index_spec(self, n_tokens: int) -> tuple[str, int, int] | None:
        if n_tokens <= self.sink_tokens + self.recent_tokens:
            return None
        return self.index, self.sink_tokens, self.recent_tokens

    def open(self, segment: KVSegment, retrieval: RetrievalSession | None, *, strict: bool = False) -> DecodeState:
        if self.index_spec(segment.n_tokens) is None:
            if retrieval is not None:
                retrieval.close()
            return _AllStatic(segment)
        if retrieval is not None:
            return RetrievalState(segment, retrieval, self.top_k, strict=strict)
        if strict:
            raise Unsupported(
                "decode method retrieval-attention: no retrieval service, and strict forbids dense instead; start one "
                "(cluster.retrieval), or leave strict off"
            )
        return _FallenBack(segment)
