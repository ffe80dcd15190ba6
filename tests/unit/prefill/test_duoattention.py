"""DuoAttention's head classes against the rule they state, pair by pair."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from workloads import Shape, s1_noise, s7_mixture

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.spec import ModelSpec
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods.duoattention import DuoAttention, HeadClasses, streaming_heads

pytestmark = pytest.mark.slow

LAYER = LayerSpec(0, 4, 2, 32, 1 / math.sqrt(32))


def classed(streaming: list[bool], **params: object) -> DuoAttention:
    return DuoAttention(**params).with_classes(HeadClasses.of(torch.tensor([streaming])))  # type: ignore[arg-type]


def by_rule(n: int, m: int, sink: int, recent: int) -> Tensor:
    """[N, M] bool, straight from the definition."""
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    return (j <= i) & ((j < sink) | (i - j < recent))


def spec_of(windows: list[int], kv_heads: int = 2) -> ModelSpec:
    layers = tuple(LayerSpec(i, 4, kv_heads, 32, 1.0, window=window) for i, window in enumerate(windows))
    return ModelSpec("llama", len(layers), 8, 8, 4, kv_heads, 32, 8, 64, layers, (), ())


@pytest.mark.parametrize("sink", [0, 1, 16, 70])
@pytest.mark.parametrize("recent", [1, 50, 64])
@pytest.mark.parametrize("step", [1, 17, 128, 300])
def test_any_chunks_give_the_stated_rule_at_every_pair(sink: int, recent: int, step: int) -> None:
    n = 300
    x = s1_noise(Shape(n, n))
    method = classed([True, False], sink=sink, recent=recent)
    streams, everything = by_rule(n, n, sink, recent), by_rule(n, n, n, 1)
    whole = method.plan(x.q, x.k, LAYER)
    expected = attend_plan(whole, x.q, x.k, x.v, scale=LAYER.scale)[0]
    starts = range(0, n, step) if step > 1 else [0, 1, sink + recent - 1, sink + recent, sink + recent + 1, n - 1]
    for start in starts:
        stop = min(start + step, n)
        q, k, v = x.q[:, :, start:stop], x.k[:, :, :stop], x.v[:, :, :stop]
        plan = method.plan(q, k, LAYER)
        kept = by_rule(stop - start, stop, stop, 1).expand(2, -1, -1) if plan is None else plan.to_dense_mask()[0]
        assert torch.equal(kept[0], streams[start:stop, :stop]) and torch.equal(kept[1], everything[start:stop, :stop])
        out = attend_plan(plan, q, k, v, scale=LAYER.scale)[0]
        torch.testing.assert_close(out, expected[:, :, start:stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("streaming", [[True, False], [True, True]])
@pytest.mark.parametrize("step", [64, 192, 640])
def test_the_published_rule_equals_a_cache_of_sink_and_recent_beside_each_chunk(streaming: list[bool], step: int) -> None:
    """However the engine cuts the prompt, `chunk` says where the published chunks begin."""
    n, chunk, sink, recent = 640, 192, 64, 128
    x = s1_noise(Shape(n, n))
    method = classed(streaming, sink=sink, recent=recent, chunk=chunk)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    streams = torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, n, chunk):
        cached = (j < min(sink, start)) | ((j >= start - recent) & (j < start))
        inside = (i >= start) & (i < start + chunk)
        streams |= inside & (cached | (j >= start)) & (j <= i)
    causal = j <= i
    for start in range(0, n, step):
        stop = min(start + step, n)
        plan = method.plan(x.q[:, :, start:stop], x.k[:, :, :stop], LAYER)
        for head, does in enumerate(streaming):
            wanted = (streams if does else causal)[start:stop, :stop]
            kept = by_rule(stop - start, stop, stop, 1) if plan is None else plan.to_dense_mask()[0, head]
            assert torch.equal(kept, wanted)


def test_one_more_token_is_read_as_in_a_longer_prompt() -> None:
    """A decode step over the cache equals the last row of a prefill that is one token longer, for both classes."""
    x = s7_mixture(Shape(301, 301), 1)
    method = classed([False, True], sink=16, recent=64)
    longer = attend_plan(method.plan(x.q, x.k, LAYER), x.q, x.k, x.v, scale=LAYER.scale)[0]
    last = x.q[:, :, 300:]
    step = attend_plan(method.plan(last, x.k, LAYER), last, x.k, x.v, scale=LAYER.scale)[0]
    torch.testing.assert_close(step, longer[:, :, 300:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "density"), [(4096, 0.150), (32_768, 0.0194), (131_072, 0.0049)])
def test_streaming_heads_have_the_published_density(tokens: int, density: float) -> None:
    q, k = torch.empty(1, 4, tokens, 0), torch.empty(1, 2, tokens, 0)
    plan = classed([True, True]).plan(q, k, LAYER)
    assert plan is not None and plan.density() == pytest.approx(density, rel=0.01)
    mixed = classed([True, False]).plan(q, k, LAYER)
    assert mixed is not None and mixed.density() == pytest.approx((1 + plan.density()) / 2)


def test_layers_of_one_kind_need_no_mixed_plan() -> None:
    x = s1_noise(Shape(600, 600, batch=2))
    classes = HeadClasses.of(torch.tensor([[False, False], [True, True], [True, False]]))
    method = DuoAttention(sink=8, recent=64).with_classes(classes)
    plans = [method.plan(x.q, x.k, dataclasses.replace(LAYER, idx=i)) for i in range(3)]
    assert plans[0] is None
    assert plans[1] is not None and plans[1].kinds == {HeadClass.STREAMING}
    assert plans[2] is not None and plans[2].kinds == {HeadClass.STREAMING, HeadClass.DENSE}
    for plan in (plans[1], plans[2]):
        assert isinstance(plan, TilePlan)
        plan.check()
        assert (plan.batch, plan.mask_heads) == (2, 2)


def test_short_prompts_and_windowed_layers_stay_dense() -> None:
    x = s1_noise(Shape(320, 320))
    method = classed([True, True])
    assert method.plan(x.q, x.k, LAYER) is None
    x = s1_noise(Shape(321, 321))
    assert method.plan(x.q, x.k, LAYER) is not None
    assert method.plan(x.q, x.k, dataclasses.replace(LAYER, window=100)) is None


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_lowest_scores_of_all_layers_stream(sparsity: float) -> None:
    scores = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    streaming = streaming_heads(scores, sparsity, spec_of([0] * 5, kv_heads=4))
    assert int(streaming.sum()) == round(20 * sparsity)
    if 0 < sparsity < 1:
        assert float(scores[streaming].max()) < float(scores[~streaming].min())


def test_equal_scores_stream_in_order() -> None:
    streaming = streaming_heads(torch.ones(3, 2), 0.5, spec_of([0, 0, 0]))
    assert streaming.tolist() == [[True, True], [True, False], [False, False]]


def test_heads_of_windowed_layers_are_not_counted_unless_there_are_no_others() -> None:
    scores = torch.tensor([[0.0, 0.0], [0.9, 0.8], [0.1, 0.1], [0.2, 0.7]])
    assert streaming_heads(scores, 0.5, spec_of([64, 0, 64, 0])).tolist() == [[False] * 2, [False] * 2, [False] * 2, [True] * 2]
    assert int(streaming_heads(scores, 0.5, spec_of([64] * 4)).sum()) == 4


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must be in"),
        ({"sink": -1}, "needs sink >= 0"),
        ({"recent": 0}, "recent >= 1"),
        ({"chunk": 100}, "chunk must be 0 or"),
        ({"chunk": 128, "sink": 10}, "multiple of 64"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(params: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"duoattention: .*{message}"):
        DuoAttention(**params)  # type: ignore[arg-type]


def test_without_classes_or_with_those_of_other_heads_it_refuses() -> None:
    x = s1_noise(Shape(400, 400))
    with pytest.raises(Unsupported, match="no head classes are bound"):
        DuoAttention().plan(x.q, x.k, LAYER)
    with pytest.raises(InvalidRequest, match="are for 3 KV heads, got 2"):
        classed([True, False, True]).plan(x.q, x.k, LAYER)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))
    return load_model(str(make_tiny_model(tmp_path / "model")), device="cpu", dtype="fp32")


def test_bind_classes_the_models_heads_by_their_scores(model: LoadedModel) -> None:
    with pytest.raises(Unsupported, match="winnow calibrate duoattention"):
        DuoAttention().bind(model)
    assert DuoAttention(sparsity=0.0).bind(model).plan(*_qk(), model.spec.layers[0]) is None
    calibration.save("duoattention", model.fingerprint, {"scores": torch.tensor([[0.9, 0.1], [0.3, 0.2]])}, {})
    unbound = DuoAttention(sparsity=0.75, sink=8, recent=32)
    method = unbound.bind(model)
    assert unbound.classes is None and method.classes is not None and method.calibration_id
    assert method.classes.streaming.tolist() == [[False, True], [True, True]] and method.classes.counts == (1, 2)
    kept = method.plan(*_qk(), model.spec.layers[0])
    assert kept is not None and torch.equal(kept.to_dense_mask()[0, 1], by_rule(200, 200, 8, 32))


@pytest.mark.parametrize("scores", [torch.zeros(2, 3), torch.full((2, 2), torch.nan)])
def test_scores_that_do_not_fit_the_model_are_refused(model: LoadedModel, scores: Tensor) -> None:
    calibration.save("duoattention", model.fingerprint, {"scores": scores}, {})
    with pytest.raises(CorruptBlock, match="do not fit this model"):
        DuoAttention().bind(model)


def _qk() -> tuple[Tensor, Tensor]:
    x = s1_noise(Shape(200, 200, head_size=16))
    return x.q, x.k
