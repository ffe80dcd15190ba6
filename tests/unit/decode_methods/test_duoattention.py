"""DuoAttention while decoding, against softmax over the keys its rule names for each head."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.index.segment import KVSegment, SegmentLayout
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.base import DecodeState, decode_methods
from winnow.workers.decode.methods import duoattention
from winnow.workers.decode.methods.dense import Dense, DenseState
from winnow.workers.decode.methods.duoattention import DuoAttention
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods import duoattention as prefill
from winnow.workers.prefill.methods.duoattention import HeadClasses

HKV, GROUP, D, N = 5, 2, 16, 120
HQ = HKV * GROUP
# No run, one run, and runs that begin and end with either class: True streams.
CLASSES = torch.tensor(
    [
        [False, False, False, False, False],
        [True, True, True, True, True],
        [True, False, False, True, True],
        [False, True, False, True, False],
    ]
)
L = len(CLASSES)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


def layer_spec(idx: int, softcap: float = 0.0, window: int = 0) -> LayerSpec:
    return LayerSpec(idx, HQ, HKV, D, scale=D**-0.5, softcap=softcap, window=window)


def make_segment(n: int = N, dtype: str = "fp32", device: str = "cpu") -> KVSegment:
    """n valid tokens with room behind them, which holds NaN: nobody may read it."""
    generator = torch.Generator().manual_seed(n)
    segment = KVSegment.create(SegmentLayout(L, HKV, D, dtype), n + 8, device=device)
    segment.kv.fill_(torch.nan)
    for layer in range(L):
        k, v = (torch.randn(HKV, n, D, generator=generator) for _ in range(2))
        segment.write(layer, 0, k, v)
    segment.advance([1] * n)
    return segment


def query(seed: int = 0) -> Tensor:
    return torch.randn(HQ, D, generator=torch.Generator().manual_seed(seed)) * 2


def classed(**params: int) -> DuoAttention:
    return DuoAttention(**params).with_classes(HeadClasses.of(CLASSES))


def masked(segment: KVSegment, layer: LayerSpec, q: Tensor, n: int, sink: int, recent: int) -> Tensor:
    """[Hq, D] float64 on the CPU: dense attention of the last of n tokens under the rule as a mask."""
    k, v = (x[:, :n].cpu().double().repeat_interleave(GROUP, 0) for x in (segment.k(layer.idx), segment.v(layer.idx)))
    z = torch.einsum("hd,hnd->hn", q.double(), k) * layer.scale
    if layer.softcap:
        z = layer.softcap * torch.tanh(z / layer.softcap)
    j = torch.arange(n)
    kept = (j < sink) | (n - 1 - j < recent) | ~CLASSES[layer.idx].repeat_interleave(GROUP)[:, None]
    return torch.einsum("hn,hnd->hd", torch.softmax(z.masked_fill(~kept, -torch.inf), 1), v)


def step(state: DecodeState, layer: LayerSpec, q: Tensor, n: int) -> Tensor:
    state.submit(layer, q, n)
    return state.collect(layer, q, n)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("sink", "recent"), [(7, 20), (0, 1), (0, 33), (64, 50)])
def test_each_head_reads_what_its_class_says(sink: int, recent: int, softcap: float, device: str) -> None:
    segment = make_segment(device=device)
    state = classed(sink=sink, recent=recent).open(segment, None)
    steps = (N - 2, N - 1, N)
    for n in steps:
        for idx in range(L):
            layer, q = layer_spec(idx, softcap), query(n)
            out = step(state, layer, q.to(device), n)
            torch.testing.assert_close(out.cpu().double(), masked(segment, layer, q, n, sink, recent), rtol=1e-5, atol=1e-5)
    streaming = int(CLASSES.sum()) * GROUP
    assert state.keys_cached == L * HQ * sum(steps)
    assert state.keys_read == (L * HQ - streaming) * sum(steps) + streaming * (sink + recent) * len(steps)
    assert state.fallback_used == ""
    state.close()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_half_precision_keeps_its_dtype(device: str) -> None:
    segment = make_segment(dtype="bf16", device=device)
    state = classed(sink=7, recent=20).open(segment, None)
    for idx in range(L):
        q = query().bfloat16()
        out = step(state, layer_spec(idx), q.to(device), N)
        assert (out.dtype, out.shape) == (torch.bfloat16, (HQ, D))
        torch.testing.assert_close(out.cpu().double(), masked(segment, layer_spec(idx), q, N, 7, 20), rtol=1e-2, atol=1e-2)


@pytest.fixture
def only_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is attended run by run: that would give dense attention's output too, at more cost."""
    monkeypatch.delattr(duoattention, "_attend")


@pytest.mark.parametrize("n", [1, 7, 26, 27])
@pytest.mark.usefixtures("only_dense")
def test_caches_of_up_to_sink_and_recent_tokens_are_dense_to_the_bit(n: int) -> None:
    segment = make_segment(n)
    state, dense = classed(sink=7, recent=20).open(segment, None), Dense().open(segment, None)
    for idx in range(L):
        assert torch.equal(step(state, layer_spec(idx), query(), n), step(dense, layer_spec(idx), query(), n))
    assert state.keys_read == state.keys_cached == L * HQ * n


def test_one_token_more_is_left_out() -> None:
    state = classed(sink=7, recent=20).open(make_segment(28), None)
    step(state, layer_spec(1), query(), 28)
    assert (state.keys_read, state.keys_cached) == (HQ * 27, HQ * 28)


@pytest.mark.usefixtures("only_dense")
def test_a_layer_without_streaming_heads_is_dense_to_the_bit() -> None:
    segment = make_segment()
    state, dense = classed(sink=7, recent=20).open(segment, None), Dense().open(segment, None)
    assert torch.equal(step(state, layer_spec(0), query(), N), step(dense, layer_spec(0), query(), N))
    assert state.keys_read == state.keys_cached == HQ * N


@pytest.mark.parametrize("window", [40, N - 1])
@pytest.mark.usefixtures("only_dense")
def test_a_layer_with_a_window_shorter_than_the_cache_reads_it_whole(window: int) -> None:
    segment = make_segment()
    state, dense = classed(sink=7, recent=20).open(segment, None), Dense().open(segment, None)
    layer = layer_spec(1, window=window)
    assert torch.equal(step(state, layer, query(), N), step(dense, layer, query(), N))
    assert state.keys_read == state.keys_cached == HQ * window


def test_a_window_as_long_as_the_cache_changes_nothing() -> None:
    segment = make_segment()
    state = classed(sink=7, recent=20).open(segment, None)
    for idx in range(L):
        out = step(state, layer_spec(idx, window=N), query(), N)
        torch.testing.assert_close(out.double(), masked(segment, layer_spec(idx), query(), N, 7, 20), rtol=1e-5, atol=1e-5)


def test_retrieval_heads_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    segment, lengths, original = make_segment(), [], duoattention._attend
    inside = range(segment.kv.data_ptr(), segment.kv.data_ptr() + segment.kv.nbytes)

    def watched(layer: LayerSpec, rows: Tensor, kv: Tensor) -> Tensor:
        lengths.append((kv.shape[1], kv.shape[2], kv.data_ptr() in inside))
        return original(layer, rows, kv)

    monkeypatch.setattr(duoattention, "_attend", watched)
    step(classed(sink=7, recent=20).open(segment, None), layer_spec(2), query(), N)
    assert lengths == [(1, 27, False), (2, N, True), (2, 27, False)]


@pytest.mark.parametrize(
    ("params", "word"),
    [({"sparsity": "1.5"}, "sparsity"), ({"sparsity": "x"}, "sparsity"), ({"sink": "-1"}, "sink"), ({"recent": "0"}, "recent"),
     ({"chunk": "64"}, "chunk")],
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(params: dict[str, str], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        decode_methods.create("duoattention", params)


def test_it_is_exact_only_where_no_head_streams() -> None:
    assert decode_methods.names().count("duoattention") == 1
    assert not decode_methods.get("duoattention").caps.exact
    assert not decode_methods.create("duoattention", {"sparsity": "0.01"}).caps.exact
    assert decode_methods.create("duoattention", {"sparsity": "0"}).caps.exact


def test_without_classes_or_with_those_of_another_model_it_refuses() -> None:
    with pytest.raises(Unsupported, match="no head classes are bound"):
        DuoAttention().open(make_segment(), None)
    with pytest.raises(InvalidRequest, match=r"for \(4, 3\) layers and KV heads, the segment has \(4, 5\)"):
        DuoAttention().with_classes(HeadClasses.of(CLASSES[:, :3])).open(make_segment(), None)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))
    shape = {"num_hidden_layers": L, "num_key_value_heads": HKV, "num_attention_heads": HQ, "hidden_size": HQ * D}
    return load_model(str(make_tiny_model(tmp_path / "model", **shape)), device="cpu", dtype="fp32")


def test_bind_takes_the_classes_of_the_prefill_method(model: LoadedModel) -> None:
    scores = torch.rand(L, HKV, generator=torch.Generator().manual_seed(0))
    calibration.save("duoattention", model.fingerprint, {"scores": scores}, {})
    unbound = DuoAttention(sparsity=0.3, sink=7)
    bound, twin = unbound.bind(model), prefill.DuoAttention(sparsity=0.3).bind(model)
    assert unbound.classes is None and bound.classes is twin.classes
    assert bound.classes is not None and sum(bound.classes.counts) == 6
    assert (bound.sink, bound.recent, bound) == (7, 256, unbound)


def test_a_model_that_was_not_calibrated_is_refused_by_name(model: LoadedModel) -> None:
    with pytest.raises(Unsupported, match="winnow calibrate duoattention"):
        DuoAttention().bind(model)
    calibration.save("duoattention", model.fingerprint, {"scores": torch.zeros(1, 2)}, {})
    with pytest.raises(CorruptBlock, match="do not fit this model"):
        DuoAttention().bind(model)


def test_sparsity_0_needs_no_calibration_and_is_the_dense_state(model: LoadedModel) -> None:
    assert type(DuoAttention(sparsity=0.0).bind(model).open(make_segment(), None)) is DenseState


def test_sparsity_1_streams_every_head(model: LoadedModel) -> None:
    calibration.save("duoattention", model.fingerprint, {"scores": torch.ones(L, HKV)}, {})
    segment = make_segment()
    state = DuoAttention(sparsity=1.0, sink=7, recent=20).bind(model).open(segment, None)
    for idx in (0, 2):  # as layer 1, all of whose heads stream in CLASSES
        layer = layer_spec(idx)
        segment.kv[1].copy_(segment.kv[idx])
        expected = masked(segment, dataclasses.replace(layer, idx=1), query(), N, 7, 20)
        torch.testing.assert_close(step(state, layer, query(), N).double(), expected, rtol=1e-5, atol=1e-5)
    assert state.keys_read == 2 * HQ * 27
