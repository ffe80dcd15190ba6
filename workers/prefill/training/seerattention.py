"""Trains SeerAttention's gates: the frozen model shows what each tile gets, the gates learn to predict it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.prefill.methods.seerattention import BLOCK, gate_frequencies, gate_logits, largest_tiles, pool_keys
from winnow.workers.prefill.scoring import diagonal_tiles, forbidden_tiles, pool_mean
from winnow.workers.prefill.tile_truth import normalised, tile_probabilities
from winnow.workers.prefill.training import OnProgress, texts
from winnow.workers.prefill.training.options import need, need_rate, need_seed, parse_options
from winnow.workers.prefill.training.state import TrainingState, pack, unpack

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

DENSITIES = (0.1, 0.2, 0.3, 0.5)  # shares of the causal tiles at which the gates are measured
_METHOD = "seerattention"
_WARM_UP = 20
_LOSS_WEIGHT = 10.0
_SAVE_EVERY = 50
_STEPS_A_UNIT = 10  # of progress

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """How the gates are trained.

    Attributes:
        tokens: of a passage, whole tiles. passages: to learn from. held_out: to measure on.
        steps, batch, rate: of AdamW with a cosine schedule; a step sees `batch` passages.
        width: G, of the gates; even.
    """

    tokens: int = 1024
    passages: int = 128
    held_out: int = 8
    steps: int = 500
    batch: int = 16
    rate: float = 1e-3
    width: int = 24

    def __post_init__(self) -> None:
        whole = self.tokens % BLOCK == 0 and self.tokens >= 4 * BLOCK
        need(_METHOD, whole, f"tokens must be a multiple of {BLOCK} and at least {4 * BLOCK}", self.tokens)
        for name in ("passages", "held_out", "batch"):
            need(_METHOD, getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        need(_METHOD, self.steps >= 0, "steps must be 0 or more", self.steps)
        need_rate(_METHOD, self.rate, " (0.001 is published)")
        need(_METHOD, self.width >= 2 and self.width % 2 == 0, "width must be even and at least 2", self.width)


def calibrate(
    model: LoadedModel, *, on_progress: OnProgress | None = None, seed: int = 0, **options: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Train the gates of all layers at once: each sees its own layer's q and k only, so one pass of the model serves all.

    Args:
        model: frozen.
        on_progress: (done, total), one unit a passage read and one for ten steps.
        seed: of the order of texts, the initial gates and the batches.
        options: see `Options`.

    Returns:
        {"q": [L, Hq, D, G], "k": [L, Hkv, 3 D, G]} float16, and how they were made, with figures on held-out passages: loss in
        nats, and the attention mass kept at some densities, beside gates untrained, mean pooling, and the best tiles there are.

    Raises:
        InvalidRequest: an option or the seed, or a training that diverged.
        ContextTooLong: `tokens` beyond the model's context.
        Unsupported: every layer has a sliding window.

    Source: as `methods.seerattention`. The loss is KL(truth || softmax(S)) times 10 over all but the first quarter of the rows
    of tiles; truth is the largest probability in each tile, divided by its row's sum; AdamW, 20 steps of warm-up, cosine.
    Deviations: passages are short (published: 64K tokens), read once and their pooled q, k and truth kept, not read anew for
    every step; no weight decay.
    """
    chosen = parse_options(_METHOD, Options, options)
    need_seed(_METHOD, seed)
    if all(layer.window for layer in model.spec.layers):
        raise Unsupported(f"calibrate {_METHOD}: every layer has a window, and such layers stay dense")
    state = TrainingState(_METHOD, model.fingerprint, chosen, seed)
    n_read = chosen.passages + chosen.held_out
    total = n_read + -(-chosen.steps // _STEPS_A_UNIT)

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    sources = [texts.passages(model.tokenizer, chosen.tokens, seed, held_out=held_out) for held_out in (True, False)]
    unseen = read_examples(model, islice(sources[0], chosen.held_out), state, report, held_out=True)
    seen = read_examples(
        model, islice(sources[1], chosen.passages), state, lambda done: report(chosen.held_out + done), held_out=False
    )
    seen = {name: tensor.to(model.decoder.device) for name, tensor in seen.items()}  # small beside the model's passes
    gates = Trainee(model, chosen.width, seed)
    before = measure(gates, unseen)
    train(gates, seen, chosen, seed, state, lambda step: report(n_read + step // _STEPS_A_UNIT))
    tensors = {"q": gates.q.detach().half(), "k": gates.k.detach().half()}
    state.need_finite(tensors, chosen.rate)
    after = measure(gates, unseen)
    report(total)
    made = {
        "data": f"{chosen.passages} passages of {chosen.tokens} tokens, {chosen.held_out} held out, from {texts.ABOUT}",
        "options": " ".join(f"{key}={value}" for key, value in asdict(chosen).items()) + f" seed={seed}",
        "loss_before": f"{before.loss:.4f}",
        "loss_after": f"{after.loss:.4f}",
    }
    for density in DENSITIES:
        figures = {"gate": after.gate, "untrained": before.gate, "mean_pooling": after.mean_pooling, "oracle": after.oracle}
        made[f"recall_at_density_{density}"] = " ".join(f"{name}={recall[density]:.4f}" for name, recall in figures.items())
    return tensors, made


@dataclass
class _Recorder:
    """Dense attention that keeps, of each layer, what its gate sees and what it should say."""

    seen: list[Example] = field(default_factory=list)

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        rotated_q, rotated_k = q[None], k[None]
        largest, mass = tile_probabilities(rotated_q, rotated_k, layer, BLOCK)
        kept = {
            "q": pool_mean(raw.q[None], BLOCK),
            "k": pool_keys(raw.k[None], BLOCK),
            "truth": normalised(largest),
            "mass": mass,
            "mean_q": pool_mean(rotated_q, BLOCK) * layer.scale,
            "mean_k": pool_mean(rotated_k, BLOCK),
        }
        self.seen.append({name: x[0].to("cpu", torch.float16) for name, x in kept.items()})
        out, _ = attend_plan(None, rotated_q, rotated_k, v[None], scale=layer.scale, softcap=layer.softcap, window=layer.window)
        return out[0]


def read_examples(
    model: LoadedModel, passages: Iterable[list[int]], state: TrainingState, report: Callable[[int], None], *, held_out: bool
) -> Example:
    """Run the model over passages of equal length and keep pooled q, k and the tiles' truth.

    Passages that `state` knows under their number are not run again.

    Returns:
        q [S, L, Hq, nQ, D], k [S, L, Hkv, nK, 3 D], truth and mass [S, L, Hq, nQ, nK], and for held-out passages mean_q and
        mean_k, the means of rotated q (times the scale) and k; float16 on the CPU.
    """
    examples = []
    for i, ids in enumerate(passages):
        name = f"{'unseen' if held_out else 'seen'}-{i:05d}"
        example = state.read(name)
        if example is None:
            recorder = _Recorder()
            tokens = torch.tensor(ids, device=model.decoder.device)
            model.decoder.forward(tokens, torch.arange(len(ids), device=model.decoder.device), recorder)
            wanted = [key for key in recorder.seen[0] if held_out or not key.startswith("mean")]
            example = {key: torch.stack([layer[key] for layer in recorder.seen]) for key in wanted}
            state.write(name, example)
        examples.append(example)
        report(i + 1)
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class Trainee:
    """Gates of all layers while they learn.

    Attributes:
        q: [L, Hq, D, G], k: [L, Hkv, 3 D, G], float32 parameters on the model's device.
        active: [L] float32, 0 for layers whose window is shorter than a passage: they never use a gate.
    """

    def __init__(self, model: LoadedModel, width: int, seed: int) -> None:
        spec, device = model.spec, model.decoder.device
        gen = torch.Generator().manual_seed(seed)
        d = spec.head_size
        q = torch.randn(spec.n_layers, spec.n_q_heads, d, width, generator=gen) / d**0.5
        k = torch.randn(spec.n_layers, spec.n_kv_heads, 3 * d, width, generator=gen) / (3 * d) ** 0.5
        self.q, self.k = (x.to(device).requires_grad_() for x in (q, k))
        self.frequencies = torch.stack([gate_frequencies(spec.ropes[i], width) for i in spec.layer_ropes]).to(device)
        self.active = torch.tensor([0.0 if layer.window else 1.0 for layer in spec.layers], device=device)

    def logits(self, batch: Example) -> Tensor:
        """[S, L, Hq, nQ, nK] float32."""
        device = self.q.device
        q, k = batch["q"].to(device, torch.float32), batch["k"].to(device, torch.float32)
        return gate_logits(q, k, self.q, self.k, self.frequencies)

    def loss(self, batch: Example) -> Tensor:
        """Mean over active layers, heads and rows of tiles after the first quarter of KL(truth || softmax(S)), in nats."""
        logits = self.logits(batch)
        n_q = logits.shape[-2]
        truth = batch["truth"].to(logits)[..., n_q // 4 :, :]
        forbidden = forbidden_tiles(n_q * BLOCK, n_q * BLOCK, BLOCK, BLOCK, logits.device)[n_q // 4 :]
        log_share = logits[..., n_q // 4 :, :].masked_fill(forbidden, -torch.inf).log_softmax(-1).masked_fill(forbidden, 0.0)
        divergence = (torch.special.xlogy(truth, truth) - truth * log_share).sum(-1).mean((0, 2, 3))  # [L]
        mean: Tensor = (divergence * self.active).sum() / self.active.sum()
        return mean


def train(gates: Trainee, seen: Example, chosen: Options, seed: int, state: TrainingState, report: Callable[[int], None]) -> None:
    """AdamW on batches drawn from `seen`, quickest where that lies on the gates' device; goes on where `state` stopped. Mutates
    the gates."""
    params = (gates.q, gates.k)
    optimizer = torch.optim.AdamW(params, lr=chosen.rate, weight_decay=0.0)
    piece = state.read("gates")
    first = unpack(piece, params, optimizer) if piece is not None else 0
    for step in range(first, chosen.steps):
        gen = torch.Generator().manual_seed(seed * 1_000_003 + step)  # of its own, so that a resumed run draws the same
        pick = torch.randperm(chosen.passages, generator=gen)[: chosen.batch].to(seen["q"].device)
        warm = min(1.0, (step + 1) / _WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * warm * 0.5 * (1 + math.cos(math.pi * step / chosen.steps))
        optimizer.zero_grad()
        (_LOSS_WEIGHT * gates.loss({name: seen[name][pick] for name in ("q", "k", "truth")})).backward()
        optimizer.step()
        report(step + 1)
        if (step + 1) % _SAVE_EVERY == 0:
            state.write("gates", pack(step + 1, params, optimizer))


@dataclass(frozen=True)
class Figures:
    """On held-out passages: the loss in nats, and by density the mean over rows of the attention mass that tiles keep which
    were chosen by the gate, by mean-pooled rotated q and k, and by that mass itself."""

    loss: float
    gate: dict[float, float]
    mean_pooling: dict[float, float]
    oracle: dict[float, float]


@torch.no_grad()
def measure(gates: Trainee, unseen: Example) -> Figures:
    """Figures of gates on the examples of `read_examples(held_out=True)`, one passage at a time."""
    count, n_q = unseen["q"].shape[0], unseen["q"].shape[3]
    tokens = n_q * BLOCK
    device = gates.q.device
    forbidden, diagonal = (f(tokens, tokens, BLOCK, BLOCK, device) for f in (forbidden_tiles, diagonal_tiles))
    loss, recalls = 0.0, {name: dict.fromkeys(DENSITIES, 0.0) for name in ("gate", "mean_pooling", "oracle")}
    for i in range(count):
        one = {name: x[i : i + 1].to(device, torch.float32) for name, x in unseen.items()}
        loss += float(gates.loss(one)) / count
        mean_q = one["mean_q"].unflatten(2, (one["mean_k"].shape[2], -1))
        means = torch.matmul(mean_q, one["mean_k"].unsqueeze(3).transpose(-1, -2)).flatten(2, 3)
        scores = {"gate": gates.logits(one), "mean_pooling": means, "oracle": one["mass"]}
        for name, score in scores.items():
            for density in DENSITIES:
                kept = (one["mass"] * largest_tiles(score, density, forbidden, diagonal)).sum(-1).mean((0, 2, 3))  # [L]
                recalls[name][density] += float((kept * gates.active).sum() / gates.active.sum()) / count
    return Figures(loss, recalls["gate"], recalls["mean_pooling"], recalls["oracle"])
