"""Training SeerAttention's gates: what they learn from, that they learn it, and that what is trained is what is used."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from planted_models import topic_model, topical_passages
from torch import Tensor

from winnow.errors import ContextTooLong, InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods.seerattention import BLOCK, SeerAttention, largest_tiles
from winnow.workers.prefill.scoring import diagonal_tiles, forbidden_tiles
from winnow.workers.prefill.training import forget, seerattention, texts
from winnow.workers.prefill.training.seerattention import Options, Trainee, calibrate, measure, read_examples, train
from winnow.workers.prefill.training.state import TrainingState

pytestmark = pytest.mark.slow

QUICK = {"tokens": 256, "passages": 4, "held_out": 2, "batch": 2, "width": 8}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(str(make_tiny_model(tmp_path / "model")), device="cpu", dtype="fp32")


def nothing(done: int) -> None:
    """No report."""


def test_what_is_trained_is_what_is_used(model: LoadedModel) -> None:
    """The trainee's logits, from pre-RoPE vectors that the model handed out, and the bound method's plan, which gets rotated
    keys only, choose the same tiles."""
    calibrated, _ = calibrate(model, steps=5, **QUICK)
    calibration.save("seerattention", model.fingerprint, calibrated, {})
    ids = next(texts.passages(model.tokenizer, 640, 7))
    examples = read_examples(model, [ids], TrainingState("test", model.fingerprint, "", 0), nothing, held_out=True)
    gates = Trainee(model, 8, 0)
    with torch.no_grad():
        gates.q.copy_(calibrated["q"])
        gates.k.copy_(calibrated["k"])
        logits = gates.logits(examples)[0]
    n_tiles = 640 // BLOCK
    forbidden, diagonal = (f(640, 640, BLOCK, BLOCK, "cpu") for f in (forbidden_tiles, diagonal_tiles))
    expected = largest_tiles(logits, 0.4, forbidden, diagonal)
    method = SeerAttention(density=0.4).bind(model)
    same: list[float] = []

    class Planned:
        def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
            plan = method.plan(q[None], k[None], layer, raw)
            assert plan is not None
            same.append(float((plan.tile_mask()[0] == expected[layer.idx]).float().mean()))
            return attend_plan(None, q[None], k[None], v[None], scale=layer.scale)[0][0]

    model.decoder.forward(torch.tensor(ids), torch.arange(640), Planned())
    assert expected.shape == (2, 4, n_tiles, n_tiles)
    assert min(same) > 0.99, same  # examples are kept in half precision: a near tie may turn


def test_the_loss_is_the_divergence_from_the_truth_after_the_first_quarter_of_rows(model: LoadedModel) -> None:
    source = texts.passages(model.tokenizer, 512, 0)
    examples = read_examples(model, islice(source, 2), TrainingState("test", model.fingerprint, "", 0), nothing, held_out=False)
    gates = Trainee(model, 8, 0)
    with torch.no_grad():
        logits, truth = gates.logits(examples).double(), examples["truth"].double()
        rows = [
            float((p * (p / s).log()).nan_to_num(0.0).sum())
            for i in range(2, 8)
            for p, s in zip(
                truth[..., i, : i + 1].reshape(-1, i + 1), logits[..., i, : i + 1].softmax(-1).reshape(-1, i + 1), strict=True
            )
        ]
        assert float(gates.loss(examples)) == pytest.approx(sum(rows) / len(rows), rel=1e-3)
    torch.testing.assert_close(truth.sum(-1), torch.ones(truth.shape[:-1]).double(), atol=2e-3, rtol=0)


def test_the_truth_is_each_tiles_largest_probability_over_its_rows_sum(model: LoadedModel) -> None:
    """From the q and k that the model hands to a backend of its own, row by row."""
    n, ids = 256, next(texts.passages(model.tokenizer, 256, 3))
    seen: list[tuple[LayerSpec, Tensor, Tensor]] = []

    class Seen:
        def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
            seen.append((layer, q.double(), k.double()))
            return attend_plan(None, q[None], k[None], v[None], scale=layer.scale)[0][0]

    model.decoder.forward(torch.tensor(ids), torch.arange(n), Seen())
    truth = read_examples(model, [ids], TrainingState("test", model.fingerprint, "", 0), nothing, held_out=False)["truth"]
    assert truth.shape == (1, 2, 4, n // BLOCK, n // BLOCK)
    for layer, q, k in seen:
        for head in range(4):
            largest = torch.zeros(n // BLOCK, n // BLOCK, dtype=torch.float64)
            for i in range(n):
                shares = (k[head // 2, : i + 1] @ q[head, i] * layer.scale).softmax(0)
                for j, tile in enumerate(shares.split(BLOCK)):
                    largest[i // BLOCK, j] = max(largest[i // BLOCK, j], tile.max())
            expected = largest / largest.sum(1, keepdim=True)
            torch.testing.assert_close(truth[0, layer.idx, head].double(), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_gates_learn_what_topics_attend_to(tmp_path: Path) -> None:
    """On held-out passages: the loss falls five times, and at a fifth of the tiles gates keep 0.9 of what the best tiles hold;
    untrained ones keep less than mean pooling."""
    model = topic_model(tmp_path / "topics")
    state = TrainingState("test", model.fingerprint, "", 0)
    unseen = read_examples(model, islice(topical_passages(1024, 1), 4), state, nothing, held_out=True)
    seen = read_examples(model, islice(topical_passages(1024, 2), 64), state, nothing, held_out=False)
    chosen = Options(passages=64, steps=400, batch=8, rate=1e-2, width=16)
    gates = Trainee(model, chosen.width, seed=0)
    before = measure(gates, unseen)
    train(gates, seen, chosen, 0, state, nothing)
    after = measure(gates, unseen)
    assert after.loss <= before.loss / 5
    assert after.gate[0.2] / after.oracle[0.2] >= 0.9
    assert before.gate[0.2] < after.mean_pooling[0.2] - 0.1


def test_a_stopped_training_goes_on_and_ends_the_same(
    model: LoadedModel, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seerattention, "_SAVE_EVERY", 10)
    expected, made = calibrate(model, steps=37, **QUICK)
    forget("seerattention", model.fingerprint, steps=37, **QUICK)
    assert not list((own_home / "calibration").glob("*.training"))
    for limit in (1, 4, 6 + 2):  # reading what is held out, reading what is learnt from, training

        def on_progress(done: int, total: int, limit: int = limit) -> None:
            if done >= limit:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(model, steps=37, on_progress=on_progress, **QUICK)
    assert len(list((own_home / "calibration").glob("*.training"))) == 1
    passes: list[int] = []
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    again, made_again = calibrate(model, steps=37, **QUICK)
    assert not passes  # nothing is read twice
    assert torch.equal(again["q"], expected["q"]) and torch.equal(again["k"], expected["k"]) and made_again == made


def test_a_damaged_piece_of_state_is_made_again(model: LoadedModel) -> None:
    state = TrainingState("test", model.fingerprint, "", 0)
    state.write("piece", {"x": torch.ones(3)})
    assert torch.equal((state.read("piece") or {})["x"], torch.ones(3))
    (state.folder / "piece.safetensors").write_bytes(b"torn")
    assert state.read("piece") is None and state.read("other") is None
    assert TrainingState("test", model.fingerprint, "", 1).folder != state.folder


def test_figures_and_tensors_are_those_of_the_model(model: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    tensors, made = calibrate(model, steps=30, on_progress=lambda *now: seen.append(now), **QUICK)
    assert tensors["q"].shape == (2, 4, 16, 8) and tensors["k"].shape == (2, 2, 48, 8) and tensors["q"].dtype == torch.float16
    assert float(made["loss_after"]) < float(made["loss_before"])
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    recalls = dict(pair.split("=") for pair in made["recall_at_density_0.5"].split())
    assert all(float(recalls[name]) <= float(recalls["oracle"]) <= 1.0 for name in ("gate", "untrained", "mean_pooling"))


def test_layers_with_a_window_are_left_alone(tmp_path: Path) -> None:
    mixed = load_model(str(make_tiny_model(tmp_path / "mixed", "gemma3")), device="cpu", dtype="fp32")
    start = Trainee(mixed, 8, 0)
    assert start.active.tolist() == [0.0, 1.0]
    tensors, _ = calibrate(mixed, steps=5, **QUICK)
    assert torch.equal(tensors["q"][0], start.q[0].detach().half()) and not torch.equal(tensors["q"][1], start.q[1].half())
    windowed = load_model(str(make_tiny_model(tmp_path / "windowed", "mistral")), device="cpu", dtype="fp32")
    with pytest.raises(Unsupported, match="every layer has a window"):
        calibrate(windowed, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, "tokens must be a multiple of 64"),
        ({"width": 7}, "width must be even"),
        ({"passages": 0}, "passages must be at least 1"),
        ({"rate": -1.0}, "rate must be above 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"gamma": 1}, "no option 'gamma'"),
    ],
)
def test_options_are_checked(model: LoadedModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"calibrate seerattention: .*{message}"):
        calibrate(model, **options)


def test_passages_longer_than_the_context_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ContextTooLong):
        calibrate(model, **{**QUICK, "tokens": 4096})


def test_held_out_text_is_never_learnt_from(model: LoadedModel) -> None:
    """Nor is the order of documents anything but the seed's."""
    tokenizer = model.tokenizer
    seen = list(islice(texts.passages(tokenizer, 300, 3), 5))
    assert seen == list(islice(texts.passages(tokenizer, 300, 3), 5)) != list(islice(texts.passages(tokenizer, 300, 4), 5))
    assert all(len(ids) == 300 for ids in seen)
    unseen = next(texts.passages(tokenizer, 2000, 3, held_out=True))
    learnt = tokenizer.decode([i for ids in islice(texts.passages(tokenizer, 20_000, 3), 10) for i in ids])
    pieces = [piece for piece in tokenizer.decode(unseen).split("\n") if len(piece) > 60]
    assert pieces and sum(piece in learnt for piece in pieces) <= len(pieces) / 4  # the same sentence in two documents
