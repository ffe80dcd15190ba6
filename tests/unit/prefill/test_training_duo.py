"""Finding retrieval heads: the mixed forward pass against the decoder, and the optimisation on a model with a planted head."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_models import induction_model
from torch import Tensor

from winnow.errors import ContextTooLong, InvalidRequest
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.spec import FAMILIES
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill.methods.duoattention import DuoAttention, HeadClasses
from winnow.workers.prefill.training import forget, mixed_heads
from winnow.workers.prefill.training.duoattention import Options, _speed, calibrate, learn
from winnow.workers.prefill.training.mixed_heads import MixedHeads
from winnow.workers.prefill.training.passkeys import WORDS, Passkeys, passkey_prompts
from winnow.workers.prefill.training.state import TrainingState

pytestmark = pytest.mark.slow

QUICK = {"tokens": 512, "keys": 2, "words": 2, "prompts": 3, "held_out": 1, "sink": 4, "recent": 32}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tiny(folder: Path, family: str = "llama") -> LoadedModel:
    return load_model(str(make_tiny_model(folder, family)), device="cpu", dtype="fp32")


class Planned:
    """The decoder's own pass, with the plans of a method."""

    def __init__(self, method: DuoAttention | None) -> None:
        self.method = method

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        plan = self.method.plan(q[None], k[None], layer, raw) if self.method is not None else None
        return attend_plan(plan, q[None], k[None], v[None], scale=layer.scale, softcap=layer.softcap, window=layer.window)[0][0]


def random_ids(n: int) -> Tensor:
    return torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ones", [False, True])
def test_with_every_head_full_it_is_the_decoder(tmp_path: Path, family: str, ones: bool) -> None:
    model, ids = tiny(tmp_path, family), random_ids(100)
    expected = model.decoder.forward(ids, torch.arange(100), Planned(None))
    found = MixedHeads(model.decoder, 4, 16).hidden(ids, slice(None), torch.ones(2, 2) if ones else None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("streaming", [[[1, 0], [0, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]])
def test_with_a_mix_of_zeros_and_ones_it_is_the_deployed_method(tmp_path: Path, family: str, streaming: list[list[int]]) -> None:
    model, ids = tiny(tmp_path, family), random_ids(150)
    classes = torch.tensor(streaming, dtype=torch.bool)
    method = DuoAttention(sink=4, recent=16).with_classes(HeadClasses.of(classes))
    expected = model.decoder.forward(ids, torch.arange(150), Planned(method))
    dense = model.decoder.forward(ids, torch.arange(150), Planned(None))
    found = MixedHeads(model.decoder, 4, 16).hidden(ids, slice(100, 150), (~classes).float())
    torch.testing.assert_close(found, expected[100:], atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, dense[100:], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("saving_memory", [False, True])
def test_its_gradient_is_the_slope_of_the_output(
    tmp_path: Path, family: str, saving_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saving_memory:
        monkeypatch.setattr(mixed_heads, "_CHECKPOINT_TOKENS", 8)
    model, ids = tiny(tmp_path, family), random_ids(80)
    mixed, rows = MixedHeads(model.decoder, 2, 8), slice(60, 80)
    direction = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    mix = torch.full((2, 2), 0.5, requires_grad=True)
    (mixed.hidden(ids, rows, mix) * direction).sum().backward()
    assert mix.grad is not None
    step = 1e-2
    for layer, head in itertools.product(range(2), range(2)):
        values = []
        for sign in (1, -1):
            moved = mix.detach().clone()
            moved[layer, head] += sign * step
            values.append(float((mixed.hidden(ids, rows, moved) * direction).sum()))
        assert float(mix.grad[layer, head]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize(("n_keys", "n_words"), [(1, 4), (3, 2)])
def test_passkey_prompts_hide_what_they_ask_for(tmp_path: Path, n_keys: int, n_words: int) -> None:
    tokenizer = tiny(tmp_path).tokenizer
    prompts = list(itertools.islice(passkey_prompts(tokenizer, 700, n_keys, n_words, 5), 4))
    assert prompts == list(itertools.islice(passkey_prompts(tokenizer, 700, n_keys, n_words, 5), 4))
    assert prompts[0] != next(passkey_prompts(tokenizer, 700, n_keys, n_words, 5, held_out=True))
    for prompt in prompts:
        assert len(prompt.ids) == 700
        text, answer = tokenizer.decode(prompt.ids[: prompt.answer]), tokenizer.decode(prompt.ids[prompt.answer :])
        keys = [line.split(": ")[1].rstrip(".") for line in answer.strip().splitlines()]
        assert len(keys) == n_keys and all(len(key.split()) == n_words and set(key.split()) <= set(WORDS) for key in keys)
        places = [text.index(f"passkey number {i + 1} is: {key}.") / len(text) for i, key in enumerate(keys)]
        assert places == sorted(places) and places[0] < (0.2 if n_keys > 1 else 0.6) and places[-1] > 0.3


def test_too_many_passkeys_for_the_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="give more tokens, fewer keys or fewer words"):
        next(passkey_prompts(tiny(tmp_path).tokenizer, 200, 4, 4, 0))


@pytest.mark.slow
def test_the_planted_retrieval_head_is_found_and_local_heads_are_let_go(tmp_path: Path) -> None:
    model = induction_model(tmp_path / "model")
    tensors, made = calibrate(model, steps=80, rate=0.04, **QUICK)
    scores = tensors["scores"]
    assert float(scores[1, 0]) >= 0.9, made
    assert float(scores.flatten()[[0, 1, 3]].max()) <= 0.2, made
    assert float(made["loss_after"]) < float(made["loss_before"])
    method = DuoAttention(sparsity=0.75).with_classes(HeadClasses.of(scores < 0.5))
    assert method.classes is not None and method.classes.counts == (2, 1)


@pytest.mark.parametrize("steps", [20, 120, 2000])
def test_the_rate_rises_over_the_first_fifth_and_falls_to_a_tenth_over_the_last(steps: int) -> None:
    fifth = steps // 5
    assert _speed(0, steps) == pytest.approx(1 / fifth)  # the first step is one of those that warm up, and moves
    assert _speed(fifth // 2, steps) == pytest.approx((fifth // 2 + 1) / fifth)
    assert [_speed(at, steps) for at in range(fifth, 4 * fifth + 1)] == [1.0] * (3 * fifth + 1)
    assert _speed(4 * fifth + fifth // 2, steps) == pytest.approx(1 - 0.9 * (fifth // 2) / fifth)
    assert _speed(steps, steps) == pytest.approx(0.1)


def test_every_step_goes_by_that_rate_and_begins_with_scores_from_0_to_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads whose loss always pulls their score beyond 1 or below 0."""
    model, chosen = tiny(tmp_path), Options(steps=40, rate=0.2, l1=0.0)
    pull = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    scores_seen: list[Tensor] = []
    rates: list[float] = []

    class Pulled(MixedHeads):
        def hidden(self, tokens: Tensor, rows: slice, mix: Tensor | None = None) -> Tensor:
            assert mix is not None
            scores_seen.append(mix.detach().clone())
            return mix

    class Recorded(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    state = TrainingState("test", model.fingerprint, "", 0)
    prompts = [Passkeys([0, 1, 2, 3], 2)]
    scores, _, _ = learn(model, Pulled(model.decoder, 4, 16), prompts, [pull], chosen, state, lambda done: None)
    assert rates == pytest.approx([0.2 * _speed(step, 40) for step in range(40)])
    assert torch.equal(scores_seen[0], torch.ones(2, 2)) and len(scores_seen) == 40
    assert all(float(seen.min()) >= 0.0 and float(seen.max()) <= 1.0 for seen in scores_seen)
    assert torch.equal(scores_seen[-1], (pull > 0).float()) and torch.equal(scores, (pull > 0).float())


@pytest.mark.slow
def test_more_weight_on_the_scores_lets_more_heads_stream(tmp_path: Path) -> None:
    model = induction_model(tmp_path / "model")
    counts = [int((calibrate(model, steps=40, rate=0.05, l1=l1, **QUICK)[0]["scores"] > 0.5).sum()) for l1 in (0.0, 0.05, 50.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1] == 1 and counts[2] == 0


def test_a_stopped_training_goes_on_and_ends_the_same(tmp_path: Path, own_home: Path) -> None:
    model = tiny(tmp_path / "model")
    expected, made = calibrate(model, steps=23, **QUICK)
    forget("duoattention", model.fingerprint, steps=23, **QUICK)
    assert not list((own_home / "calibration").glob("*.training"))
    seen: list[int] = []

    def stop_at(limit: int) -> None:
        def on_progress(done: int, total: int) -> None:
            seen.append(done)
            if done >= limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(model, steps=23, on_progress=on_progress, **QUICK)

    stop_at(2)  # while prompts are read
    stop_at(3 + 3 * 12)  # in the twelfth step; ten are kept
    assert len(list((own_home / "calibration").glob("*.training"))) == 1
    seen.clear()
    again, made_again = calibrate(model, steps=23, on_progress=lambda done, total: seen.append(done), **QUICK)
    assert min(done for done in seen if done > 3) == 3 + 3 * 11
    assert torch.equal(again["scores"], expected["scores"]) and made_again == made
    other, _ = calibrate(model, steps=23, seed=1, **QUICK)
    assert not torch.equal(other["scores"], expected["scores"])


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tensors, made = calibrate(tiny(tmp_path), steps=2, on_progress=lambda *now: seen.append(now), **QUICK)
    assert seen == sorted(seen) and seen[-1] == (3 + 3 * 2 + 8, 3 + 3 * 2 + 8)
    assert tensors["scores"].shape == (2, 2) and "answer_tokens_right_found@0.5" in made


def test_layers_with_a_window_keep_their_heads(tmp_path: Path) -> None:
    tensors, _ = calibrate(tiny(tmp_path, "gemma3"), steps=3, l1=5.0, **QUICK)
    assert torch.equal(tensors["scores"][0], torch.ones(2)) and bool((tensors["scores"][1] < 1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, "tokens must be at least 160"),
        ({"rate": 0}, "rate must be above 0"),
        ({"keys": 0}, "keys must be at least 1"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"stepz": 1}, "no option 'stepz'"),
        ({"l1": "nan"}, "l1 must be a finite number"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"calibrate duoattention: .*{message}"):
        calibrate(tiny(tmp_path), **options)
    with pytest.raises(ContextTooLong, match="tokens is 4096"):
        calibrate(tiny(tmp_path), tokens="4096")
