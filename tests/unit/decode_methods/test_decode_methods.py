"""Decode methods against exact attention: degenerate cases equal dense, lost retrieval falls back and says so."""

from __future__ import annotations

import pytest
import torch

from winnow.errors import InvalidRequest, UnknownName, Unsupported, WorkerLost
from winnow.index.segment import KVSegment
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.base import DecodeState, Partial, decode_methods
from winnow.workers.decode.local_retrieval import LocalRetrieval, SegmentIndex
from winnow.workers.decode.methods.dense import Dense
from winnow.workers.decode.methods.retrieval_attention import LOST, RetrievalAttention

from .test_local_retrieval import HKV, HQ, RECENT, SINK, D, L, layer_spec, make_segment, query

N = 300
SPARSE = RetrievalAttention(sink_tokens=SINK, recent_tokens=RECENT, top_k=10)


def grow(segment: KVSegment, n: int) -> None:
    """Write a tail, as decode does."""
    for layer in range(L):
        k, v = (torch.randn(HKV, n, D, generator=torch.Generator().manual_seed(9 + i)) for i in range(2))
        segment.write(layer, segment.n_total, k, v)
    segment.advance([1] * n)


def open_session(segment: KVSegment, method: RetrievalAttention, spec: str = "flat") -> LocalRetrieval:
    return LocalRetrieval(SegmentIndex(segment, spec, method.sink_tokens, method.recent_tokens))


def step(state: DecodeState, spec: LayerSpec, q: torch.Tensor, n: int) -> torch.Tensor:
    state.submit(spec, q, n)
    return state.collect(spec, q, n)


def softmax_over(segment: KVSegment, spec: LayerSpec, q: torch.Tensor, keep: list[set[int]]) -> torch.Tensor:
    """Exact attention in float64 where head h reads the keys in keep[h]."""
    rows = []
    for head in range(HQ):
        ids = sorted(keep[head])
        k, v = (x[head // (HQ // HKV)][ids].double() for x in (segment.k(spec.idx), segment.v(spec.idx)))
        z = (k @ q[head].double()) * spec.scale
        if spec.softcap:
            z = spec.softcap * torch.tanh(z / spec.softcap)
        rows.append(torch.softmax(z, 0) @ v)
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("window", [0, 50, 1000])
def test_dense_reads_all_keys_that_the_layer_may_see(softcap: float, window: int) -> None:
    segment = make_segment(N)
    grow(segment, 3)
    state = Dense().open(segment, None)
    for layer in range(L):
        spec = layer_spec(layer, softcap, window)
        keep = [set(range(max(0, 303 - window) if window else 0, 303))] * HQ
        torch.testing.assert_close(
            step(state, spec, query(), 303).double(), softmax_over(segment, spec, query(), keep), rtol=1e-5, atol=1e-5
        )
    assert state.keys_read == state.keys_cached == L * HQ * (min(window, 303) if window else 303)
    assert state.fallback_used == ""
    state.close()


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_retrieval_attention_is_softmax_over_sink_recent_generated_and_found_keys(softcap: float) -> None:
    segment = make_segment(N)
    state = SPARSE.open(segment, open_session(segment, SPARSE))
    for n_new in (1, 2):
        grow(segment, 1)
        n = N + n_new
        for layer in range(L):
            spec, q = layer_spec(layer, softcap), query(n_new)
            middle = range(SINK, N - RECENT)
            keep = []
            for head in range(HQ):
                scores = segment.k(layer)[head // (HQ // HKV), SINK : N - RECENT] @ q[head]
                found = {middle[i] for i in scores.topk(10).indices.tolist()}
                keep.append(found | set(range(SINK)) | set(range(N - RECENT, n)))
            torch.testing.assert_close(
                step(state, spec, q, n).double(), softmax_over(segment, spec, q, keep), rtol=1e-5, atol=1e-5
            )
    assert state.keys_read == L * HQ * sum(SINK + RECENT + 10 + new for new in (1, 2))
    assert state.keys_cached == L * HQ * (301 + 302)
    assert state.fallback_used == ""
    state.close()


def test_as_many_keys_as_there_are_equals_dense() -> None:
    segment = make_segment(N)
    grow(segment, 1)
    method = RetrievalAttention(sink_tokens=SINK, recent_tokens=RECENT, top_k=N)
    state, dense = method.open(segment, open_session(segment, method)), Dense().open(segment, None)
    for layer in range(L):
        torch.testing.assert_close(
            step(state, layer_spec(layer), query(), 301), step(dense, layer_spec(layer), query(), 301), rtol=1e-5, atol=1e-5
        )
    assert state.keys_read == state.keys_cached == dense.keys_read


@pytest.mark.parametrize("n", [1, SINK + RECENT])
def test_a_static_set_that_covers_all_is_bit_equal_to_dense_without_retrieval(n: int) -> None:
    segment = make_segment(n, "bf16")
    grow(segment, 4)
    assert SPARSE.index_spec(n) is None
    assert SPARSE.index_spec(n + SINK + RECENT) == ("auto", SINK, RECENT)
    state, dense = SPARSE.open(segment, None, strict=True), Dense().open(segment, None)
    q = query().bfloat16()
    for layer in range(L):
        out = step(state, layer_spec(layer), q, n + 4)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, step(dense, layer_spec(layer), q, n + 4))
    assert state.fallback_used == ""
    assert state.keys_read == state.keys_cached > 0


def test_nothing_found_leaves_the_static_set() -> None:
    class Empty(LocalRetrieval):
        def collect(self, layer: LayerSpec) -> Partial:
            return Partial(torch.full((HQ, D), torch.nan), torch.full((HQ,), -torch.inf), 0, 7)

    segment = make_segment(N)
    state = SPARSE.open(segment, Empty(SegmentIndex(segment, "flat", SINK, RECENT)))
    keep = [set(range(SINK)) | set(range(N - RECENT, N))] * HQ
    out = step(state, layer_spec(), query(), N)
    torch.testing.assert_close(out.double(), softmax_over(segment, layer_spec(), query(), keep), rtol=1e-5, atol=1e-5)
    assert state.keys_read == HQ * (SINK + RECENT)


def test_layers_with_a_window_read_it_exactly_and_search_nothing() -> None:
    segment = make_segment(N)
    state, dense = SPARSE.open(segment, open_session(segment, SPARSE)), Dense().open(segment, None)
    spec = layer_spec(0, window=100)
    assert torch.equal(step(state, spec, query(), N), step(dense, spec, query(), N))
    assert state.keys_read == state.keys_cached == HQ * 100


class Losing(LocalRetrieval):
    """A session whose service dies at the given call."""

    def __init__(self, index: SegmentIndex, at: str, after: int) -> None:
        super().__init__(index)
        self.at, self.left, self.n_closed = at, after, 0

    def _maybe_die(self, where: str) -> None:
        if where == self.at:
            self.left -= 1
            if self.left < 0:
                raise WorkerLost("the retrieval service is gone")

    def submit(self, layer: LayerSpec, q: torch.Tensor, top_k: int) -> None:
        self._maybe_die("submit")
        super().submit(layer, q, top_k)

    def collect(self, layer: LayerSpec) -> Partial:
        self._maybe_die("collect")
        return super().collect(layer)

    def close(self) -> None:
        self.n_closed += 1
        super().close()


@pytest.mark.promise("R10")
@pytest.mark.parametrize("at", ["submit", "collect"])
@pytest.mark.parametrize("after", [0, 3])
def test_lost_retrieval_goes_on_densely_and_says_so(at: str, after: int) -> None:
    segment = make_segment(N)
    grow(segment, 4)
    session = Losing(SegmentIndex(segment, "flat", SINK, RECENT), at, after)
    state, dense, whole = (
        SPARSE.open(segment, session),
        Dense().open(segment, None),
        SPARSE.open(segment, open_session(segment, SPARSE)),
    )
    calls = [(layer, n) for n in (N + 1, N + 2, N + 3) for layer in range(L)]
    for i, (layer, n) in enumerate(calls):
        out = step(state, layer_spec(layer), query(n), n)
        same = whole if i < after else dense
        assert torch.equal(out, step(same, layer_spec(layer), query(n), n))
    assert state.fallback_used == LOST
    state.close()
    assert session.n_closed == 1


@pytest.mark.promise("R10")
@pytest.mark.parametrize("at", ["submit", "collect"])
def test_strict_refuses_instead_of_falling_back(at: str) -> None:
    segment = make_segment(N)
    session = Losing(SegmentIndex(segment, "flat", SINK, RECENT), at, 0)
    state = SPARSE.open(segment, session, strict=True)
    with pytest.raises(Unsupported, match="strict"):
        step(state, layer_spec(), query(), N)
    assert state.fallback_used == ""
    state.close()
    assert session.n_closed == 1
    with pytest.raises(Unsupported, match="strict"):
        SPARSE.open(segment, None, strict=True)


@pytest.mark.promise("R10")
def test_no_retrieval_from_the_start_is_dense_and_says_so() -> None:
    segment = make_segment(N)
    state, dense = SPARSE.open(segment, None), Dense().open(segment, None)
    assert torch.equal(step(state, layer_spec(), query(), N), step(dense, layer_spec(), query(), N))
    assert state.fallback_used == LOST


@pytest.mark.parametrize(("params", "error", "word"), [
    ({"top_k": "0"}, InvalidRequest, "top_k"), ({"sink_tokens": "-1"}, InvalidRequest, "sink_tokens"),
    ({"recent_tokens": "nan"}, InvalidRequest, "recent_tokens"), ({"index": "nope"}, UnknownName, "flat"),
    ({"index": "hnsw0"}, InvalidRequest, "M"), ({"colour": "1"}, InvalidRequest, "colour"),
])  # fmt: skip
def test_bad_parameters_are_refused_by_name(params: dict[str, str], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        decode_methods.create("retrieval-attention", params)


def test_both_methods_are_registered_with_their_capabilities() -> None:
    assert decode_methods.get("dense").caps.exact
    caps = decode_methods.get("retrieval-attention").caps
    assert (caps.exact, caps.fallback, caps.needs) == (False, "dense", {"retrieval"})
    method = decode_methods.create("retrieval-attention", {"top_k": "7", "index": "hnsw16"})
    assert isinstance(method, RetrievalAttention)
    assert method.index_spec(10_000) == ("hnsw16", 128, 512)
