"""DHSA's first version: chunk algebra, the choice of tokens written out in loops, borders, the predictor against torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from selection import LAYER, plan_of, probabilities
from torch import Tensor
from workloads import Shape, s1_noise, s6_needle, s7_mixture

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill import calibration, scoring
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.chunk_borders import BorderPredictor, parameter_shapes, pick_borders
from winnow.workers.prefill.methods.dhsa_v1 import Chunks, DHSAv1, Predictors

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"budget": 160, "block": 32, "local": 32, "global_tokens": 16, "instruction": 24}
CHANNELS = 64  # two KV heads of 32


def random_tensors(stacks: int = 1, layers: int = 1, channels: int = CHANNELS, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    params = {
        name: torch.randn(stacks, *shape, generator=gen) / (shape[0] if shape else 1) ** 0.5
        for name, shape in parameter_shapes(channels).items()
    }
    spread = {
        "mean": torch.randn(layers, channels, generator=gen),
        "deviation": torch.rand(layers, channels, generator=gen) + 0.5,
    }
    return {**params, **spread, "reach": torch.tensor(4)}


def random_predictors(seed: int = 0) -> Predictors:
    return Predictors.of(random_tensors(seed=seed), 1, CHANNELS, torch.device("cpu"))


@pytest.mark.parametrize("size", [16, 48, 64])
def test_chunks_of_equal_length_score_as_pooled_blocks_times_the_root_of_their_length(size: int) -> None:
    x = s7_mixture(Shape(384, 768), 1)
    chunks = Chunks.between(DHSAv1(**SMALL | {"chunk_tokens": size, "instruction": 0}).borders(x.k, LAYER), 768 // size + 2)
    got = chunks.scores(x.q, x.k, 32)[..., : 768 // size]
    rows = x.q.mean(1).unflatten(1, (-1, 32)).mean(2) * math.sqrt(32)
    keys = x.k.mean(1).unflatten(1, (-1, size)).mean(2) * math.sqrt(size)
    torch.testing.assert_close(got, rows @ keys.transpose(-1, -2), atol=1e-4, rtol=1e-4)


def test_scores_of_chunks_alike_but_for_their_length_differ_by_the_root_of_its_ratio() -> None:
    q, k = torch.randn(1, 2, 64, 8), torch.randn(1, 1, 1, 8).expand(-1, -1, 200, -1)
    borders = torch.zeros(1, 200, dtype=torch.bool)
    borders[0, [0, 20, 100]] = True  # 20, 80 and 100 tokens
    scores = Chunks.between(borders, 5).scores(q, k, 32)
    torch.testing.assert_close(scores[..., 1], 2 * scores[..., 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[..., 2], math.sqrt(5) * scores[..., 0], atol=1e-4, rtol=1e-4)
    assert bool((scores[..., 3:] == 0).all())


def test_a_ragged_last_block_is_divided_by_the_root_of_its_own_length() -> None:
    q, k = torch.ones(1, 1, 72, 4), torch.ones(1, 1, 72, 4)
    borders = torch.zeros(1, 72, dtype=torch.bool)
    borders[0, 0] = True
    scores = Chunks.between(borders, 2).scores(q, k, 32)[0, :, 0]
    torch.testing.assert_close(scores, 4 * torch.tensor([32.0, 32.0, 8.0]).sqrt() * math.sqrt(72))


def chosen_tokens(method: DHSAv1, q: Tensor, k: Tensor) -> list[set[int]]:
    """By the class's text: for each block, forced tokens and then those of the best chunks, earlier ones first."""
    n, m, b = q.shape[2], k.shape[2], method.block
    starts = [*method.borders(k, LAYER)[0].nonzero().flatten().tolist(), m]
    query, key = q[0].double().mean(0), k[0].double().mean(0)
    found = []
    for first in range(0, n, b):
        rows = query[first : first + b]
        end = first + len(rows) + m - n
        want = rows.sum(0) / math.sqrt(len(rows))
        score = {}
        for start, stop in itertools.pairwise(starts):
            chunk = float(want @ key[start:stop].sum(0)) / math.sqrt(stop - start)
            score |= dict.fromkeys(range(start, stop), chunk)
        forced = {j for j in range(end) if j < method.global_tokens or j >= end - method.local}
        ranked = sorted((j for j in range(end) if j not in forced), key=lambda j: (-score[j], j))
        found.append(forced | set(ranked[: max(0, method.budget - len(forced))]))
    return found


def check_tokens(plan: TilePlan, method: DHSAv1, q: Tensor, k: Tensor) -> None:
    """Every row of a plan with SMALL's parameters keeps what `chosen_tokens` says."""
    n, m = q.shape[2], k.shape[2]
    kept = plan.to_dense_mask()[0, 0]
    expected = chosen_tokens(method, q, k)
    for row in range(n):
        position, block = row + m - n, row // 32
        first = block * 32 + m - n
        if block * 32 + 31 >= n - 24:
            assert bool(kept[row, : position + 1].all())  # blocks with rows of the instruction are dense
            continue
        own = set(range(first // 32 * 32, position + 1))  # a block reads its own keys even where they lie across two tiles
        assert set(kept[row].nonzero().flatten().tolist()) == {j for j in expected[block] | own if j <= position}
        assert len(expected[block]) <= 160


@pytest.mark.parametrize("shape", [Shape(512, 512), Shape(500, 500), Shape(200, 457)], ids=str)
@pytest.mark.parametrize("chunk_tokens", [0, 40])
def test_a_block_reads_its_forced_tokens_and_those_of_the_best_chunks_up_to_its_budget(shape: Shape, chunk_tokens: int) -> None:
    x = s7_mixture(shape, 2)
    method = DHSAv1(**SMALL, chunk_tokens=chunk_tokens, threshold=0.0)
    method = method if chunk_tokens else method.with_predictors(random_predictors())
    borders = method.borders(x.k, LAYER)[0]
    assert bool(borders[0]) and bool(borders[shape.m - 24])
    assert chunk_tokens or 10 < int(borders.sum()) < shape.m // 8
    plan = plan_of(method, x.q, x.k)
    check_tokens(plan, method, x.q, x.k)
    assert plan.mask_heads == 1 and plan.density() < 0.7


@pytest.mark.parametrize(("shape", "per_block", "most"), [(Shape(500, 500), 1, 15), (Shape(200, 457), 2, 28)], ids=str)
def test_where_every_gap_scores_high_the_best_borders_per_block_are_kept(shape: Shape, per_block: int, most: int) -> None:
    """m // 32 blocks; a short last one adds none. Token 0 and the instruction's border come on top."""
    x = s7_mixture(shape, 2)
    method = DHSAv1(**SMALL, threshold=-1e9, apart=1, borders_per_block=per_block).with_predictors(random_predictors())
    scores = random_predictors().of_layer[0].scores(x.k[0].transpose(0, 1).flatten(1)).tolist()
    peaks = [p for p in range(1, shape.m) if scores[p] == max(scores[p - 1 : p + 2])]
    assert len(peaks) > 2 * most
    best = sorted(peaks, key=lambda p: -scores[p])[:most]
    assert method.borders(x.k, LAYER)[0].nonzero().flatten().tolist() == sorted({0, *best, shape.m - 24})
    assert not {0, shape.m - 24} & set(best)
    check_tokens(plan_of(method, x.q, x.k), method, x.q, x.k)


def test_the_plan_runs_and_equals_attention_over_the_tokens_it_names() -> None:
    x = s7_mixture(Shape(500, 500), 3)
    plan = plan_of(DHSAv1(**SMALL, chunk_tokens=40), x.q, x.k)
    out, lse = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    truth = probabilities(x.q, x.k) * plan.to_dense_mask()
    torch.testing.assert_close(
        out.double(), truth / truth.sum(-1, keepdim=True) @ x.v.double().repeat_interleave(2, 1), atol=1e-4, rtol=1e-4
    )
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("depth", [100, 300, 600])
def test_a_needle_of_a_chunk_is_kept_at_every_depth(depth: int) -> None:
    x = s6_needle(Shape(1024, 1024), 5, width=32)
    first = x.planted["needle"][0]
    k = x.k.clone()
    k[:, :, first : first + 32], k[:, :, depth : depth + 32] = x.k[:, :, depth : depth + 32], x.k[:, :, first : first + 32]
    method = DHSAv1(**SMALL | {"instruction": 0}, chunk_tokens=16)
    kept = plan_of(method, x.q, k).to_dense_mask()
    assert bool(kept[0, 0, -1, depth : depth + 32].all())
    assert float(kept[0, 0, -1].sum()) <= 160


def test_borders_are_peaks_above_the_threshold_that_keep_their_distance() -> None:
    gen = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 400, generator=gen)
    scores[:, 0] = -torch.inf
    borders = pick_borders(scores, threshold=0.5, apart=8, most=1000)
    for row, kept in zip(scores, borders, strict=True):
        places = kept.nonzero().flatten()
        assert len(places) > 10
        assert int(places.diff().min()) > 8 and float(row[places].min()) > 0.5
        for p in range(400):
            around = row[max(0, p - 8) : p + 9]
            assert bool(kept[p]) == (float(row[p]) > 0.5 and float(row[p]) == float(around.max()))
        few = pick_borders(row[None], threshold=0.5, apart=8, most=5)[0].nonzero().flatten()
        assert sorted(few.tolist()) == sorted(places[row[places].topk(5).indices].tolist())


def test_of_equal_scores_the_first_is_the_border() -> None:
    scores = torch.zeros(1, 40)
    scores[0, 10:14] = 2.0
    assert pick_borders(scores, threshold=1.0, apart=4, most=9).nonzero().tolist() == [[0, 10]]
    assert pick_borders(torch.full((1, 30), 2.0), threshold=1.0, apart=8, most=9).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("apart", [300, 10**9, 10**25])
def test_a_distance_beyond_the_text_leaves_its_highest_border(apart: int) -> None:
    scores = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))
    borders = pick_borders(scores, threshold=0.0, apart=apart, most=9)
    assert borders.nonzero().tolist() == [[0, int(scores[0].argmax())], [1, int(scores[1].argmax())]]


@pytest.mark.parametrize("name", ["instruction", "chunk_tokens", "borders_per_block", "apart"])
def test_a_number_beyond_the_prompt_means_all_of_it(name: str) -> None:
    """The registry takes whole numbers that no tensor holds."""
    x = s7_mixture(Shape(300, 300), 2)
    plans = []
    for value in (300, 10**25):
        method = prefill_methods.create("dhsa-v1", {**SMALL, "threshold": "-9", name: str(value)})
        assert isinstance(method, DHSAv1)
        plans.append(plan_of(method.with_predictors(random_predictors()), x.q, x.k).to_dense_mask())
    assert torch.equal(*plans)


@pytest.mark.parametrize(
    ("shape", "local", "most"),
    [(Shape(512, 512), 32, 0), (Shape(512, 512), 1, 31), (Shape(512, 543), 32, 31), (Shape(512, 543), 1, 62)],
    ids=str,
)
def test_a_block_reads_its_budget_and_those_of_its_own_keys_that_it_did_not_choose(shape: Shape, local: int, most: int) -> None:
    x = s7_mixture(shape, 2)
    method = DHSAv1(**SMALL | {"local": local, "instruction": 0}, chunk_tokens=16)
    kept = plan_of(method, x.q, x.k).to_dense_mask()[0, 0].unflatten(0, (-1, 32)).any(1).sum(-1)  # keys a block reads
    assert int(kept.max()) <= 160 + most
    assert int(kept.max()) > 160 + most // 2 - 1


@torch.no_grad()
def test_the_predictor_is_attention_norm_and_a_small_network_over_the_halves() -> None:
    """Against torch.nn's attention and layers, gap by gap, at the ends of the text too."""
    predictor = random_predictors(3).of_layer[0]
    p = predictor.params
    attention = torch.nn.MultiheadAttention(CHANNELS, 8, batch_first=True)
    attention.in_proj_weight.copy_(p["qkv"].T)
    attention.in_proj_bias.copy_(p["qkv_bias"])
    attention.out_proj.weight.copy_(p["out"].T)
    attention.out_proj.bias.copy_(p["out_bias"])
    norm = torch.nn.LayerNorm(CHANNELS)
    norm.weight.copy_(p["norm"])
    norm.bias.copy_(p["norm_bias"])
    keys = 2 * torch.randn(40, CHANNELS, generator=torch.Generator().manual_seed(4))
    expected = [-math.inf]
    for gap in range(1, 40):
        x = ((keys - predictor.mean) / predictor.deviation)[max(0, gap - 4) : gap + 4][None]
        y = norm(x + attention(x, x, x, need_weights=False)[0])[0]
        cut = min(4, gap)
        left, right = y[:cut].mean(0), y[cut:].mean(0)
        cosine = torch.nn.functional.cosine_similarity(left, right, dim=0)[None]
        features = torch.cat((left, right, (left - right).abs(), left * right, cosine))
        expected.append(float(torch.nn.functional.gelu(features @ p["hidden"] + p["hidden_bias"]) @ p["score"] + p["score_bias"]))
    torch.testing.assert_close(predictor.scores(keys), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_slabs_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(Shape(300, 600), 6)
    method = DHSAv1(**SMALL, threshold=0.0).with_predictors(random_predictors())
    whole = plan_of(method, x.q, x.k).to_dense_mask()
    monkeypatch.setattr(scoring, "SLAB_BYTES", 1 << 18)
    assert torch.equal(whole, plan_of(method, x.q, x.k).to_dense_mask())


def model_named(fingerprint: str, heads: int = 2, layers: int = 3) -> LoadedModel:
    spec = SimpleNamespace(n_layers=layers, n_kv_heads=heads, head_size=32)
    return cast(
        LoadedModel, SimpleNamespace(fingerprint=fingerprint, spec=spec, decoder=SimpleNamespace(device=torch.device("cpu")))
    )


@pytest.mark.parametrize("stacks", [1, 3])
def test_predictors_come_from_the_models_calibration(stacks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    tensors = random_tensors(stacks, layers=3)
    calibration.save("dhsa-v1", "cafe" * 8, tensors, {})
    bound = DHSAv1(**SMALL, threshold=0.0).bind(model_named("cafe" * 8))
    assert bound.calibration_id
    x = s7_mixture(Shape(300, 300), 1)
    borders = [bound.borders(x.k, dataclasses.replace(LAYER, idx=i)) for i in range(3)]
    for i in range(3):
        own = {name: t[i % stacks] for name, t in tensors.items() if name in parameter_shapes(CHANNELS)}
        predictor = BorderPredictor(own, tensors["mean"][i], tensors["deviation"][i], 4)
        alone = pick_borders(predictor.scores(x.k[0].transpose(0, 1).flatten(1))[None], threshold=0.0, apart=8, most=72)
        alone[0, [0, 300 - 24]] = True
        assert torch.equal(borders[i], alone)
    with pytest.raises(CorruptBlock, match="does not fit"):
        DHSAv1().bind(model_named("cafe" * 8, heads=4))
    with pytest.raises(CorruptBlock, match="does not fit"):
        DHSAv1().bind(model_named("cafe" * 8, layers=5))


@pytest.mark.parametrize(
    "changed",
    [
        {"qkv": torch.tensor(1.0)},
        {"score_bias": torch.tensor(1.0)},
        {"hidden": torch.zeros(0)},
        {"norm": torch.full((1, CHANNELS), math.nan)},
        {"out": torch.full((1, CHANNELS, CHANNELS), math.inf)},
        {"out": torch.ones(1, CHANNELS, CHANNELS, dtype=torch.int8)},
        {"score": torch.full((1, 256), 1e300, dtype=torch.float64)},
        {"deviation": torch.zeros(1, CHANNELS)},
        {"reach": torch.tensor([4, 4])},
        {"reach": torch.tensor(math.nan)},
        {"reach": torch.tensor(2.5)},
        *({"reach": torch.tensor(reach)} for reach in (0, -1, 10**9)),
    ],
    ids=lambda changed: f"{next(iter(changed))}-{next(iter(changed.values())).flatten()[:1].tolist()}",
)
def test_predictors_that_make_no_sense_are_refused(changed: dict[str, Tensor]) -> None:
    whole = random_tensors()
    assert Predictors.of(whole, 1, CHANNELS, torch.device("cpu")).of_layer[0].reach == 4
    with pytest.raises(CorruptBlock, match="winnow calibrate dhsa-v1"):
        Predictors.of({**whole, **changed}, 1, CHANNELS, torch.device("cpu"))


def test_without_a_predictor_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    x = s7_mixture(Shape(300, 300), 1)
    with pytest.raises(Unsupported, match="winnow calibrate dhsa-v1"):
        DHSAv1().bind(model_named("beef" * 8))
    with pytest.raises(Unsupported, match="chunk_tokens"):
        DHSAv1(**SMALL).plan(x.q, x.k, LAYER)
    fixed = DHSAv1(chunk_tokens=64)
    assert fixed.bind(model_named("beef" * 8)) is fixed and fixed.calibration_id == ""


def test_prompts_within_the_budget_are_dense() -> None:
    x = s1_noise(Shape(300, 300))
    method = DHSAv1(**SMALL, chunk_tokens=16)
    assert method.plan(x.q[:, :, :160], x.k[:, :, :160], LAYER) is None
    assert method.plan(x.q, x.k, LAYER) is not None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"block": 256}, "block"),
        ({"budget": 200}, "budget"),
        ({"local": 0}, "local"),
        ({"global_tokens": -1}, "global_tokens"),
        ({"instruction": -1}, "instruction"),
        ({"apart": 0}, "apart"),
        ({"borders_per_block": 0}, "borders_per_block"),
        ({"chunk_tokens": -1}, "chunk_tokens"),
        ({"threshold": math.nan}, "threshold"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        DHSAv1(**params)
