"""Distilling SEA: what the dense model says about cells, that a network learns it, that the model reads on as well by it, and
that an interrupted run goes on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from workloads import Shape, s7_mixture

from winnow.errors import ContextTooLong, InvalidRequest, Unsupported
from winnow.index.layout import SegmentLayout
from winnow.index.segment import KVSegment
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.backend import PrefillBackend, Tally
from winnow.workers.prefill.methods.sea import SEA, Mix, Network
from winnow.workers.prefill.sea_network import draw_map
from winnow.workers.prefill.training import sea, trainer
from winnow.workers.prefill.training.sea import calibrate, read_cells

pytestmark = pytest.mark.slow

QUICK = {"tokens": 192, "steps": 100, "rows": 96, "held_out": 2, "k": 16, "columns": 128, "rate": 2e-2}
WORDS, RECENT = 64, 16  # of `recurring` text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Random, but its queries and keys are mostly their bias, so that attention has a shape as in trained models: peaks at some
    distances, which contents move a little."""
    torch.set_num_threads(1)
    loaded = load_model(
        str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "qwen2", "qwen2", seed=3)), dtype="fp32", device="cpu"
    )
    for layer in loaded.decoder.layers:
        assert layer.qkv_bias is not None
        layer.qkv_bias[: 6 * 16] *= 20.0
        layer.qkv[: 6 * 16] *= 0.1
    return loaded


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cells_hold_the_dense_models_mass_and_the_plan_reads_the_same_keys(
    softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = s7_mixture(Shape(150, 150), 1)
    layer = LayerSpec(0, 4, 2, 32, 1 / math.sqrt(32), softcap=softcap)
    tensors = {name: tensor[None] for name, tensor in sea.Sizes(4, 32, 150, 20, 16).initial(0).items()}
    tensors["longest"] = torch.tensor(150)
    spec = ModelSpec("llama", 1, 128, 128, 4, 2, 32, 8, 4096, (), (RopeSpec((1.0,)),), (0,))
    method = SEA(k=6).with_network(Network.of(tensors, spec, torch.device("cpu")))
    assert method.network is not None
    plan = method.plan(x.q, x.k, layer)
    cells, _ = method._cells(method.network, x.q, x.k, layer)
    assert plan is not None and isinstance(plan.residual, Mix)
    monkeypatch.setattr(sea, "_TEACHER_BYTES", 16 * 4 * 150 * 40)  # 40 rows at a time
    truth, sparse, recall = read_cells(x.q, x.k, x.v, layer, cells, torch.arange(150))
    some = torch.tensor([3, 64, 149])
    for one, of_all in zip(read_cells(x.q[:, :, some], x.k, x.v, layer, cells[:, :, some], some), (truth, sparse), strict=False):
        torch.testing.assert_close(one, of_all[:, :, some])
    logits = x.q.double() @ x.k.double().repeat_interleave(2, 1).transpose(-1, -2) * layer.scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    share = logits.masked_fill(~torch.ones(150, 150, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    for i in (0, 1, 7, 16, 77, 149):
        expected = torch.zeros(4, 16, dtype=torch.float64)
        for j in range(i + 1):
            expected[:, (2 * j + 1) * 16 // (2 * (i + 1))] += share[0, :, i, j]
        torch.testing.assert_close(truth[0, :, i].double(), expected, atol=1e-6, rtol=1e-4)
    out, _ = attend_plan(plan.residual.plan, x.q, x.k, x.v, scale=layer.scale, softcap=softcap)
    torch.testing.assert_close(sparse, out, atol=1e-5, rtol=1e-4)
    assert float(recall) == pytest.approx(float((share * plan.to_dense_mask()).sum(-1).mean()), abs=1e-5)


def test_the_loss_is_its_formula(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 KL(dense || map) + squared error of the map summed over a row's cells + squared error of the context over its mean
    square; and the parameters get its gradient."""
    n, n_rows, columns = 96, 24, 16
    chosen = sea.Options(tokens=n, rows=n_rows, k=4, columns=columns)
    distiller = sea.Distiller(model, chosen, 5)
    for tensor in distiller.learnt:
        tensor.requires_grad_()
    seen: list[tuple[LayerSpec, Tensor, Tensor, Tensor]] = []
    losses: list[float] = []

    class Seen:
        def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
            with torch.inference_mode(False):  # only a copy made outside it can take part in a gradient
                seen.append((layer, q.clone(), k.clone(), v.clone()))
            return distiller.attend(layer, q, k, v, raw)

    def backward(loss: Tensor, *args: Any, original: Any = Tensor.backward) -> None:
        losses.append(float(loss.detach()))
        original(loss, *args)

    distiller.is_learning = True
    ids = torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(6))
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "backward", backward)
        model.decoder.forward(ids, torch.arange(n), Seen())

    params = {name: tensor.detach().clone().requires_grad_(name != "features") for name, tensor in distiller.params.items()}
    rows = [(r + 1) * n // n_rows - 1 for r in range(n_rows)]
    expected = []
    for layer, q, k, v in seen:
        hq, hkv = q.shape[0], k.shape[0]
        own = {name: tensor[layer.idx] for name, tensor in params.items()}
        log_map, gates, _ = draw_map(own, q[None], k[None], 0, layer.scale, n)
        kept = SEA(k=4).choose(log_map.detach()[:, :, rows], torch.tensor(rows))[0]
        divergence, map_error, outputs, targets = [], [], [], []
        for head, (at, i) in itertools.product(range(hq), enumerate(rows)):
            keys, values = (x[head // (hq // hkv), : i + 1] for x in (k, v))
            logits = keys @ q[head, i] * layer.scale
            share, cell = logits.softmax(0), torch.tensor([(2 * j + 1) * columns // (2 * (i + 1)) for j in range(i + 1)])
            truth = torch.zeros(columns).index_add_(0, cell, share)
            drawn = log_map[0, head, i]
            divergence.append((truth * (truth.clamp(min=1e-30).log() - drawn)).sum())
            map_error.append(((drawn.exp() - truth) ** 2).sum())
            reads = kept[head, at][cell] | (torch.arange(i + 1) == i)
            sparse = logits[reads].softmax(0) @ values[reads]
            scaled, mixed = torch.sigmoid(gates[0, head, i])
            outputs.append(mixed * scaled * sparse + (1 - mixed) * values.mean(0))
            targets.append(share @ values)
        context, dense = torch.stack(outputs), torch.stack(targets)
        error = (context - dense).square().mean() / dense.square().mean()
        expected.append(0.1 * torch.stack(divergence).mean() + torch.stack(map_error).mean() + error)
    assert losses == pytest.approx(torch.stack(expected).detach().tolist(), rel=1e-3)
    torch.stack(expected).sum().backward()
    for name, tensor in params.items():
        torch.testing.assert_close(distiller.params[name].grad, tensor.grad, atol=1e-5, rtol=1e-3)


def test_distillation_halves_the_divergence_and_the_result_is_used(model: LoadedModel) -> None:
    done: list[tuple[int, int]] = []
    tensors, made = trainer("sea")(model, on_progress=lambda *at: done.append(at), **QUICK)
    before, after, uniform = (float(made[f"divergence_{name}"]) for name in ("before", "after", "uniform"))
    assert after <= 0.5 * before
    assert after < uniform
    assert float(made["recall_after"]) > float(made["recall_before"])
    assert float(made["context_error_after"]) < float(made["context_error_before"])
    assert done[-1] == (104, 104) and [at for at, _ in done] == sorted(at for at, _ in done)
    calibration.save("sea", model.fingerprint, tensors, made)
    method = SEA(k=16).bind(model)
    assert method.calibration_id
    layer = model.spec.layers[0]
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 192, layer.head_size, generator=gen) for heads in (layer.n_q_heads, layer.n_kv_heads))
    plan = method.plan(q, k, layer)
    assert plan is not None
    plan.check()
    with pytest.raises(ContextTooLong, match="at most 192"):
        method.plan(q, k.repeat(1, 1, 2, 1), layer)


def recurring(tokenizer: object, n_tokens: int, seed: int, *, held_out: bool = False) -> Iterator[list[int]]:
    """In place of `texts.passages`: nine tokens in ten are one of the last `RECENT` again, the others any of `WORDS`. The
    perplexity of who knows this is 5, that of who sees the current token alone, as without attention, 25."""
    draw = random.Random(f"{seed} {held_out}")
    while True:
        ids = [draw.randrange(WORDS)]
        while len(ids) < n_tokens:
            ids.append(draw.choice(ids[-RECENT:]) if draw.random() < 0.9 else draw.randrange(WORDS))
        yield ids


def train_teacher(folder: Path, n_tokens: int) -> LoadedModel:
    """A tiny model that has learnt `recurring` text. It begins with biases that look at what is near, or it would take long."""
    torch.set_num_threads(1)
    make_tiny_model(folder, "qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    net = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    for name, tensor in net.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            tensor.data.view(-1, 2, 8)[:, 0] = 2.5
    steps, source = 180, recurring(None, n_tokens, 1)
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        ids = torch.tensor(list(islice(source, 2)))
        optimizer.zero_grad()
        net(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
    net.save_pretrained(str(folder))
    return load_model(str(folder), dtype="fp32", device="cpu")


def perplexity(model: LoadedModel, method: SEA | None, n_tokens: int, first: int) -> float:
    """Of the tokens after the rows from `first` on, in held-out text that the method, None = dense, prefills."""
    spec, losses = model.spec, []
    for ids in islice(recurring(None, n_tokens, 2, held_out=True), 6):
        segment = KVSegment.create(SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, "fp32"), n_tokens)
        tokens = torch.tensor(ids)
        hidden = model.decoder.forward(tokens, torch.arange(n_tokens), PrefillBackend(segment, 0, method, Tally()))
        losses.append(F.cross_entropy(model.decoder.logits(hidden[first:-1]), tokens[first + 1 :]))
    return float(torch.stack(losses).mean().exp())


def test_a_distilled_network_keeps_the_perplexity_at_64_keys_and_an_untrained_one_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over the rows of which 64 keys are an eighth or less."""
    tokens, first = 1024, 512
    monkeypatch.setattr(sea.texts, "passages", recurring)
    teacher = train_teacher(tmp_path / "teacher", tokens)
    dense = perplexity(teacher, None, tokens, first)
    assert dense < 16, "the teacher makes little use of its attention: the comparison says nothing"
    ratio = {}
    for steps in (0, 100):
        tensors, made = calibrate(teacher, tokens=tokens, steps=steps, rows=128, held_out=2, k=64, rate=2e-2)
        method = SEA(k=64).with_network(Network.of(tensors, teacher.spec, torch.device("cpu")))
        ratio[steps] = perplexity(teacher, method, tokens, first) / dense
    assert float(made["divergence_after"]) <= 0.5 * float(made["divergence_before"])
    assert ratio[100] <= 1.3
    assert ratio[0] > 1.3


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {**QUICK, "steps": 6, "tokens": 64}
    whole, made = calibrate(model, seed=4, **quick)
    monkeypatch.setattr(sea, "_SAVE_EVERY", 2)

    def stop(done: int, total: int) -> None:
        if done == 2 + 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, on_progress=stop, seed=4, **quick)
    read: list[int] = []
    monkeypatch.setattr(sea, "read", lambda *args, original=sea.read: (read.append(1), original(*args))[1])
    again, made_again = calibrate(model, seed=4, **quick)
    assert len(read) == 2 + 2  # the two steps that were not saved, and the last measurement
    assert made_again == made
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tokens": 63}, "tokens"),
        ({"steps": -1}, "steps"),
        ({"rate": 0.0}, "rate"),
        ({"held_out": 0}, "held_out"),
        ({"rows": 0}, "rows"),
        ({"columns": 30}, "columns"),
        ({"factor": 0}, "factor"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_options_are_refused_by_name(model: LoadedModel, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        calibrate(model, **options)


def test_more_tokens_than_the_model_reads_and_windows_everywhere_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ContextTooLong, match="tokens is 4096"):
        calibrate(model, tokens=4096)
    windowed = load_model(str(make_tiny_model(tmp_path / "mistral", "mistral")), dtype="fp32", device="cpu")
    with pytest.raises(Unsupported, match="window"):
        calibrate(windowed, tokens=256)
