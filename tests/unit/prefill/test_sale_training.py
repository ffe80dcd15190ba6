"""The search for SALE's thresholds: what it promises of each head, its prompts, and that it goes on where it was stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from workloads import Shape, s2_verticals, s4_segments

from winnow.errors import ContextTooLong, InvalidRequest
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods.sale import SALE
from winnow.workers.prefill.training import forget, trainer
from winnow.workers.prefill.training.sale import Search, retrieval_prompt

pytestmark = pytest.mark.slow

LAYER = LayerSpec(0, 4, 2, 32, 1 / math.sqrt(32))
QUICK = {"prompts": 2, "tokens": 1600, "start": 2.56, "floor": 0.02, "theta": 0.02}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", seed=3)), dtype="fp32", device="cpu")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))


def output_error(tau: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Hq]: sum over D of |sparse - dense|, mean over rows, by explicit masks in float64."""
    plan = SALE().with_thresholds(tau[None]).plan(q, k, LAYER)
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * LAYER.scale
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    outs = []
    for kept in (causal, causal if plan is None else plan.to_dense_mask()):
        outs.append(logits.masked_fill(~kept, -torch.inf).softmax(-1) @ v.double().repeat_interleave(2, 1))
    return (outs[0] - outs[1]).abs().sum(-1).mean((0, 2))


@pytest.mark.parametrize("theta", [0.03, 0.003])
def test_each_threshold_is_the_largest_of_its_halvings_whose_error_is_below_theta(theta: float) -> None:
    x = s2_verticals(Shape(1280, 1280), 5)
    tau = torch.full((1, 4), 0.5)
    search = Search(tau, theta, 0.004)
    out = search.attend(LAYER, x.q[0], x.k[0], x.v[0], RawQK(x.q[0], x.k[0]))
    torch.testing.assert_close(out[None], attend_plan(None, x.q, x.k, x.v, scale=LAYER.scale)[0])
    error = output_error(tau[0], x.q, x.k, x.v)
    torch.testing.assert_close(search.error[0].double(), error, atol=1e-4, rtol=1e-3)
    assert bool((error < theta).all())
    lowered = (tau[0] < 0.5).nonzero().flatten().tolist()
    assert lowered, "no head was too coarse: the test says nothing"
    for head in lowered:
        assert float(tau[0, head]) in {0.5 / 2**i for i in range(8)} | {0.0}
        coarser = tau[0].clone()
        coarser[head] = 2 * tau[0, head] if tau[0, head] > 0 else 0.5 / 2**7
        assert float(output_error(coarser, x.q, x.k, x.v)[head]) >= theta


def test_thresholds_only_decrease_over_prompts_and_fixed_ones_stay() -> None:
    tau = torch.full((1, 4), 0.5)
    before = tau.clone()
    for seed in range(2):
        x = s4_segments(Shape(1600, 1600), seed)
        Search(tau, 0.05, 0.004).attend(LAYER, x.q[0], x.k[0], x.v[0], RawQK(x.q[0], x.k[0]))
        assert bool((tau <= before).all())
        before = tau.clone()
    x = s2_verticals(Shape(1600, 1600), 9)
    fixed = Search(tau, 1e-6, 0.004, is_fixed=True)
    fixed.attend(LAYER, x.q[0], x.k[0], x.v[0], RawQK(x.q[0], x.k[0]))
    assert torch.equal(tau, before)
    plan = SALE().with_thresholds(tau).plan(x.q, x.k, LAYER)
    assert plan is not None
    assert float(fixed.density.mean()) == pytest.approx(plan.density(), abs=1e-5)


def test_a_calibrated_model_runs_with_its_own_thresholds(model: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    tensors, made = trainer("sale")(model, on_progress=lambda done, total: seen.append((done, total)), **QUICK)
    assert seen == [(i, 6) for i in range(1, 7)]  # two layers, two prompts and the one that measures
    tau = tensors["tau"]
    assert tau.shape == (2, 4) and float(tau.max()) < 2.56 and float(tau.min()) >= 0
    assert made["heads_above_theta"].endswith(" of 8") and 0 < float(made["mean_density"]) < 1
    calibration.save("sale", model.fingerprint, tensors, made)
    method = SALE().bind(model)
    q, k = torch.randn(1, 4, 1600, 16), torch.randn(1, 2, 1600, 16)
    for layer in model.spec.layers:
        got, expected = (m.plan(q, k, layer) for m in (method, SALE().with_thresholds(tau)))
        assert got is not None and expected is not None
        assert torch.equal(got.to_dense_mask(), expected.to_dense_mask())


def test_a_stopped_calibration_goes_on_after_its_last_prompt(model: LoadedModel) -> None:
    whole, _ = trainer("sale")(model, **QUICK)
    forget("sale", model.fingerprint, **QUICK)

    def stop(done: int, total: int) -> None:
        if done == 3:  # in the second prompt
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("sale")(model, on_progress=stop, **QUICK)
    seen: list[int] = []
    again, _ = trainer("sale")(model, on_progress=lambda done, total: seen.append(done), **QUICK)
    assert seen == [3, 4, 5, 6]
    assert torch.equal(whole["tau"], again["tau"])


def test_other_seeds_draw_other_prompts_and_the_same_seed_the_same(model: LoadedModel) -> None:
    one, other, same = (retrieval_prompt(model.tokenizer, 1000, seed) for seed in (1, 2, 1))
    assert one == same != other
    assert 950 < len(one) <= 1000
    text = model.tokenizer.decode(one)
    asked = text.split('Key: "')[1].split('"')[0]
    assert text.count(f'"{asked}": "') == 1 and text.endswith('Its value: "')


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"theta": 0}, "theta"),
        ({"theta": "much"}, "theta"),
        ({"floor": 0.0}, "floor"),
        ({"start": 1e-6}, "start"),
        ({"prompts": 0}, "prompts"),
        ({"tokens": 1000}, "tokens"),
        ({"heads": 3}, "heads"),
    ],
)
def test_bad_options_are_refused_by_name(model: LoadedModel, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        trainer("sale")(model, **options)


def test_prompts_longer_than_the_context_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ContextTooLong, match="2048"):
        trainer("sale")(model, tokens=4096)
