"""Training of DHSA's border predictors: labels and loss by their definitions, planted borders found, stopped and gone on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import LAYER, kept_mass, plan_of
from torch import Tensor
from workloads import Shape, s4_segments

from winnow.errors import ContextTooLong, InvalidRequest, Unsupported
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods.dhsa_v1 import DHSAv1, Predictors
from winnow.workers.prefill.training import trainer
from winnow.workers.prefill.training.dhsa_v1 import (
    Example,
    Options,
    Trainee,
    border_labels,
    example,
    focal_loss,
    mean_attention,
    measure,
    of_all_layers,
    roc_area,
    train,
    usable_gaps,
)

pytestmark = pytest.mark.slow

QUICK = {"tokens": 96, "passages": 3, "held_out": 1, "epochs": 2, "rate": 3e-3, "batch": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", seed=3)), dtype="fp32", device="cpu")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))


def test_labels_compare_what_later_rows_give_to_both_sides() -> None:
    x = s4_segments(Shape(200, 200), 1)
    attention = mean_attention(x.q[0], x.k[0], LAYER)
    logits = x.q[0].double() @ x.k[0].double().repeat_interleave(2, 0).transpose(-1, -2) * LAYER.scale
    truth = logits.masked_fill(~torch.ones(200, 200, dtype=torch.bool).tril(), -torch.inf).softmax(-1).mean(0)
    torch.testing.assert_close(attention.double(), truth, atol=1e-5, rtol=1e-4)
    gaps = usable_gaps(200, 4)
    assert gaps.tolist() == list(range(4, 195))
    labels = border_labels(attention, gaps, 4)
    for gap, label in zip(gaps.tolist(), labels.tolist(), strict=True):
        before, after = (float(truth[gap + 5 :, part].sum()) for part in (slice(gap - 4, gap), slice(gap, gap + 4)))
        ratio = (max(before, after) + 1e-6) / (min(before, after) + 1e-6)
        assert label == pytest.approx(1 / (1 + math.exp(-2 * (math.log(ratio) - math.log(2)))), abs=1e-4)
    assert float(labels.min()) >= 0.2 and float(labels.max()) > 0.9


def test_the_focal_loss_is_its_formula_for_soft_labels() -> None:
    scores, labels = torch.tensor([-3.0, 0.0, 0.7, 4.0]), torch.tensor([0.0, 0.3, 0.8, 1.0])
    p = torch.sigmoid(scores.double())
    y = labels.double()
    expected = (-3.0 * y * (1 - p) ** 2 * p.log() - (1 - y) * p**2 * (1 - p).log()).mean()
    assert float(focal_loss(scores, labels, 3.0)) == pytest.approx(float(expected), rel=1e-5)


def test_the_area_under_the_roc_curve_counts_pairs_in_order() -> None:
    scores, kinds = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.8]), torch.tensor([False, True, False, True, True])
    pairs = [(a, b) for a in scores[kinds] for b in scores[~kinds]]
    assert roc_area(scores, kinds) == pytest.approx(sum(float(a > b) for a, b in pairs) / len(pairs))
    assert math.isnan(roc_area(scores, torch.ones(5, dtype=torch.bool)))


def test_ties_count_half_in_the_area_wherever_they_stand() -> None:
    first = torch.arange(10) < 3
    assert roc_area(torch.zeros(10), first) == roc_area(torch.zeros(10), ~first) == 0.5
    scores, kinds = torch.tensor([1.0, 2.0, 2.0, 3.0, 2.0]), torch.tensor([False, True, False, True, False])
    assert roc_area(scores, kinds) == pytest.approx((1 + 0.5 + 0.5 + 3) / 6)


def planted_edges(k: Tensor) -> Tensor:
    """Where the topic of k [Hkv, T, D] changes: neighbours of one topic are almost parallel."""
    return (torch.nn.functional.cosine_similarity(k[:, 1:], k[:, :-1], dim=-1) < 0.5).all(0).nonzero().flatten() + 1


@pytest.fixture(scope="module")
def on_segments() -> tuple[Trainee, Trainee]:
    """Predictors before and after training on 16 seeded texts of planted segments."""
    torch.set_num_threads(1)
    chosen = Options(tokens=512, passages=16, epochs=4, rate=1e-3, batch=256, positive=5.0)
    seen = segments(range(100, 116))
    before, after = (Trainee(seen, 1, chosen, 0) for _ in range(2))
    train(after, seen, chosen, 0, None, lambda step: None)
    return before, after


def segments(seeds: range) -> Example:
    found = []
    for seed in seeds:
        x = s4_segments(Shape(512, 512), seed)
        found.append(example(x.q[0], x.k[0], LAYER, 4))
    return {name: torch.stack([one[name][None] for one in found]) for name in ("keys", "labels")}


def trained_method(trainee: Trainee, **params: Any) -> DHSAv1:
    return DHSAv1(**params).with_predictors(Predictors.of(trainee.tensors(), 1, 64, torch.device("cpu")))


def test_trained_on_planted_segments_it_finds_their_borders(on_segments: tuple[Trainee, Trainee]) -> None:
    """F1 within 4 tokens on unseen texts at the published threshold; untrained it is far from it."""
    scores = []
    for trainee in on_segments:
        method = trained_method(trainee, instruction=0)
        hits, planted, right, found = 0, 0, 0, 0
        for seed in range(8):
            k = s4_segments(Shape(512, 512), seed).k
            edges = planted_edges(k[0])
            borders = method.borders(k, LAYER)[0].nonzero().flatten()[1:]  # less token 0
            hits += sum(bool(((borders - edge).abs() <= 4).any()) for edge in edges)
            right += sum(bool(((edges - border).abs() <= 4).any()) for border in borders)
            planted += len(edges)
            found += len(borders)
        assert planted >= 24
        recall, precision = hits / planted, right / max(1, found)
        scores.append(2 * recall * precision / max(1e-9, recall + precision))
    assert scores[1] >= 0.8 and scores[0] < 0.5


def test_training_lowers_the_loss_on_unseen_texts_and_ranks_borders_first(on_segments: tuple[Trainee, Trainee]) -> None:
    unseen = segments(range(8))
    before, after = (measure(trainee, unseen) for trainee in on_segments)
    assert after.loss < 0.9 * before.loss
    assert after.roc_area > 0.85 > before.roc_area
    assert before.share == after.share < 0.1


def test_at_equal_budget_learnt_chunks_keep_no_less_than_chunks_of_128_tokens(on_segments: tuple[Trainee, Trainee]) -> None:
    kept = torch.zeros(2)
    for seed in range(4):
        x = s4_segments(Shape(1024, 1024), seed)
        sizes: dict[str, Any] = {"budget": 256, "block": 64, "local": 64, "global_tokens": 32, "instruction": 16}
        plans = [plan_of(trained_method(on_segments[1], **sizes), x.q, x.k), plan_of(DHSAv1(**sizes, chunk_tokens=128), x.q, x.k)]
        assert plans[0].density() == pytest.approx(plans[1].density(), abs=0.01)
        kept += torch.tensor([float(kept_mass(plan, x).mean()) / 4 for plan in plans])
    assert float(kept[0]) >= float(kept[1])


@pytest.mark.parametrize("per_layer", [0, 1])
def test_a_trained_model_cuts_with_its_own_predictors(model: LoadedModel, per_layer: int) -> None:
    seen: list[tuple[int, int]] = []
    tensors, made = trainer("dhsa-v1")(
        model, on_progress=lambda done, total: seen.append((done, total)), per_layer=per_layer, **QUICK
    )
    assert seen[0] == (1, seen[-1][1]) and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert tensors["qkv"].shape == (2 if per_layer else 1, 32, 96) and tensors["mean"].shape == (2, 32)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 2 << 20
    assert all(math.isfinite(float(part.split("=")[1])) for part in made["loss"].split())
    calibration.save("dhsa-v1", model.fingerprint, tensors, made)
    method = DHSAv1(budget=96, block=32, local=32, global_tokens=16, instruction=16, threshold=-10.0).bind(model)
    q, k = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    for layer in model.spec.layers:
        assert 5 < int(method.borders(k, layer).sum()) <= 2 + 300 // 32 * 8
        plan = method.plan(q, k, layer)
        assert plan is not None
        plan.check()


@pytest.mark.parametrize("per_layer", [0, 1])
def test_layers_with_a_window_are_not_learnt_from(tmp_path: Path, per_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = load_model(str(make_tiny_model(tmp_path / "mixed", "gemma3", seed=1)), dtype="fp32", device="cpu")
    assert [layer.window > 0 for layer in mixed.spec.layers] == [True, False]
    used: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "winnow.workers.prefill.training.dhsa_v1.measure",
        lambda trainee, unseen: (used.append((*unseen["keys"].shape[:2], *trainee.mean.shape)), measure(trainee, unseen))[1],
    )
    tensors, _ = trainer("dhsa-v1")(mixed, per_layer=per_layer, **QUICK)
    channels = mixed.spec.n_kv_heads * mixed.spec.head_size
    assert used == [(1, 1, 1, channels)] * 2  # passages, layers of them, layers known
    predictors = Predictors.of(tensors, 2, channels, torch.device("cpu"))
    assert len(predictors.of_layer) == 2 and tensors["mean"].shape == (2, channels)


def test_predictors_of_some_layers_stand_where_the_model_has_those() -> None:
    seen = {"keys": torch.randn(2, 2, 40, 8).half(), "labels": torch.rand(2, 2, 31)}
    for per_layer in (0, 1):
        own = Trainee(seen, 1 + per_layer, Options(tokens=40, per_layer=per_layer), 0).tensors()
        whole = of_all_layers(own, [1, 3], 4)
        assert whole["mean"].shape == (4, 8) and torch.equal(whole["mean"][[1, 3]], own["mean"])
        assert torch.equal(whole["deviation"][[1, 3]], own["deviation"])
        assert torch.equal(whole["qkv"][[1, 3]] if per_layer else whole["qkv"], own["qkv"])
        assert len(Predictors.of(whole, 4, 8, torch.device("cpu")).of_layer) == 4


def test_a_model_with_windows_everywhere_is_refused(tmp_path: Path) -> None:
    windowed = load_model(str(make_tiny_model(tmp_path / "windowed", "mistral")), dtype="fp32", device="cpu")
    with pytest.raises(Unsupported, match="every layer has a window"):
        trainer("dhsa-v1")(windowed, **QUICK)


def test_a_stopped_training_goes_on_and_ends_where_a_whole_one_does(model: LoadedModel) -> None:
    options = {**QUICK, "batch": 8}
    whole, _ = trainer("dhsa-v1")(model, **options)

    def stop(done: int, total: int) -> None:
        if done == total - 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("dhsa-v1")(model, on_progress=stop, **options)
    seen: list[int] = []
    again, _ = trainer("dhsa-v1")(model, on_progress=lambda done, total: seen.append(done), **options)
    assert 5 < seen[4] < seen[-1]  # four passages read again from the disk, then not from the first step
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reach": 0}, "reach"),
        ({"reach": 5000, "tokens": 100_000}, "reach"),
        ({"tokens": 16}, "tokens"),
        ({"passages": 0}, "passages"),
        ({"rate": 0}, "rate"),
        ({"rate": "quick"}, "rate"),
        ({"epochs": -1}, "epochs"),
        ({"positive": -1}, "positive"),
        ({"per_layer": 2}, "per_layer"),
        ({"layers": 2}, "layers"),
    ],
)
def test_bad_options_are_refused_by_name(model: LoadedModel, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        trainer("dhsa-v1")(model, **options)


def test_passages_longer_than_the_context_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ContextTooLong, match="2048"):
        trainer("dhsa-v1")(model, tokens=4096)
