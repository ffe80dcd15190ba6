"""Finds DuoAttention's retrieval heads: which KV heads must read everything for a hidden passkey to come out right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import ContextTooLong
from winnow.workers.prefill.methods.duoattention import counted_layers, streaming_heads
from winnow.workers.prefill.training import OnProgress, texts
from winnow.workers.prefill.training.attention_entropy import attention_entropies
from winnow.workers.prefill.training.mixed_heads import MixedHeads
from winnow.workers.prefill.training.options import need, need_rate, need_seed, parse_options
from winnow.workers.prefill.training.passkeys import Passkeys, passkey_prompts
from winnow.workers.prefill.training.state import TrainingState, pack, unpack

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

SPARSITIES = (0.25, 0.5)  # at which the choices of heads are measured
_METHOD = "duoattention"
_SAVE_EVERY = 2


@dataclass(frozen=True)
class Options:
    """How head scores are learnt.

    Attributes:
        tokens: of a prompt, answer included. keys, words: passkeys in it, and words of each.
        prompts: to learn from, taken in turn. held_out: to measure on.
        steps, rate: of AdamW; a fifth of the steps warm up, the last fifth slows down to a tenth.
        l1: weight of the mean score in the loss: the higher, the more heads stream.
        sink, recent: tokens that a streaming head reads while learning; fewer than when deployed where prompts are short.
    """

    tokens: int = 512
    keys: int = 3
    words: int = 6
    prompts: int = 32
    held_out: int = 4
    steps: int = 120
    rate: float = 0.02
    l1: float = 0.05
    sink: int = 16
    recent: int = 64

    def __post_init__(self) -> None:
        for name in ("keys", "words", "prompts", "held_out", "recent"):
            need(_METHOD, getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        need(_METHOD, self.steps >= 0, "steps must be 0 or more", self.steps)
        need(_METHOD, self.sink >= 0, "sink must be 0 or more", self.sink)
        need_rate(_METHOD, self.rate, " (0.02 is published)")
        need(_METHOD, self.l1 >= 0.0, "l1 must be 0 or more (0.05 is published)", self.l1)
        room = self.sink + self.recent
        need(_METHOD, self.tokens >= 2 * room, f"tokens must be at least {2 * room}, twice sink + recent", self.tokens)


def calibrate(
    model: LoadedModel, *, on_progress: OnProgress | None = None, seed: int = 0, **options: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Learn one score per KV head by letting every head mix full and streaming attention.

    Args:
        model: frozen.
        on_progress: (done, total), one unit a forward pass: a prompt read densely is one, a step is three.
        seed: of texts, passkeys, and the random heads that the found ones are compared with.
        options: see `Options`.

    Returns:
        {"scores": [L, Hkv]} float32 in [0, 1], high = retrieval, and how they were made, with the share of answer tokens that
        come out right on held-out prompts: dense, and with a quarter and a half of the heads streaming: those found, random
        ones, and those whose attention has the highest entropy on the first prompts.

    Raises:
        InvalidRequest: an option or the seed, or a training that diverged. ContextTooLong: `tokens` beyond the model's context.

    Source: as `methods.duoattention`. The loss is the mean squared difference between final hidden states with mixed and with
    full attention, over the rows that predict answer tokens, plus l1 times the mean score; AdamW without weight decay, scores
    begin at 1 and are clamped to [0, 1]. Deviations: prompts are short and few, and so are the steps (published: 2000), and
    their full hidden states are computed once and kept; streaming is exact to the token, not to blocks of 128; layers with a
    sliding window keep their heads as they are, unless every layer has one.
    """
    chosen = parse_options(_METHOD, Options, options)
    need_seed(_METHOD, seed)
    if chosen.tokens > model.spec.max_context:
        raise ContextTooLong(f"calibrate {_METHOD}: tokens is {chosen.tokens}, the model's context {model.spec.max_context}")
    state = TrainingState(_METHOD, model.fingerprint, chosen, seed)
    n_measured = chosen.held_out * (2 + 3 * len(SPARSITIES))
    total = chosen.prompts + 3 * chosen.steps + n_measured

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    mixed = MixedHeads(model.decoder, chosen.sink, chosen.recent)
    prompts = _prompts(model, chosen, chosen.prompts, seed, held_out=False)
    targets = _targets(mixed, prompts, state, report)
    scores, first_loss, last_loss = learn(
        model, mixed, prompts, targets, chosen, state, lambda step: report(chosen.prompts + 3 * step)
    )
    state.need_finite({"scores": scores}, chosen.rate)
    data = f"{chosen.prompts} prompts of {chosen.tokens} tokens, {chosen.keys} passkeys of {chosen.words} words each, in "
    made = {
        "data": f"{data}{texts.ABOUT}",
        "options": " ".join(f"{key}={value}" for key, value in asdict(chosen).items()) + f" seed={seed}",
        "loss_before": f"{first_loss:.4f}",
        "loss_after": f"{last_loss:.4f}",
        "retrieval_heads": f"{int((scores > 0.5).sum())} of {scores.numel()} KV heads have a score above 0.5",
    }
    unseen = _prompts(model, chosen, chosen.held_out, seed, held_out=True)
    made |= measure(model, mixed, prompts, unseen, scores, seed, lambda done: report(total - n_measured + done))
    return {"scores": scores}, made


def _prompts(model: LoadedModel, chosen: Options, count: int, seed: int, *, held_out: bool) -> list[Passkeys]:
    source = passkey_prompts(model.tokenizer, chosen.tokens, chosen.keys, chosen.words, seed, held_out=held_out)
    return list(itertools.islice(source, count))


def _predicting(prompt: Passkeys) -> slice:
    """The rows whose next token is of the answer."""
    return slice(prompt.answer - 1, len(prompt.ids) - 1)


@torch.no_grad()
def _targets(mixed: MixedHeads, prompts: list[Passkeys], state: TrainingState, report: Callable[[int], None]) -> list[Tensor]:
    """Final hidden states of the rows that predict the answers, all heads dense; those in `state` are not computed again."""
    targets = []
    for i, prompt in enumerate(prompts):
        piece = state.read(f"target-{i:05d}")
        if piece is None:
            piece = {"hidden": mixed.hidden(torch.tensor(prompt.ids), _predicting(prompt)).float()}
            state.write(f"target-{i:05d}", piece)
        targets.append(piece["hidden"])
        report(i + 1)
    return targets


def learn(
    model: LoadedModel, mixed: MixedHeads, prompts: list[Passkeys], targets: list[Tensor], chosen: Options, state: TrainingState,
    report: Callable[[int], None],
) -> tuple[Tensor, float, float]:  # fmt: skip
    """The optimisation; goes on where `state` stopped.

    Returns:
        scores [L, Hkv] float32 on the CPU; the mean loss of the first steps, and of the last, as many as there are prompts or
        a quarter of the steps.
    """
    spec, device = model.spec, model.decoder.device
    counted = counted_layers(spec).to(device)[:, None].expand(-1, spec.n_kv_heads)
    scores = torch.ones(spec.n_layers, spec.n_kv_heads, device=device).requires_grad_()
    losses = torch.zeros(chosen.steps)
    optimizer = torch.optim.AdamW([scores], lr=chosen.rate, weight_decay=0.0)
    piece = state.read("scores")
    first = 0
    if piece is not None:
        losses = piece.pop("losses")
        first = unpack(piece, [scores], optimizer)
    for step in range(first, chosen.steps):
        with torch.no_grad():
            scores.clamp_(0.0, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * _speed(step, chosen.steps)
        prompt, target = prompts[step % len(prompts)], targets[step % len(prompts)].to(device)
        mix = torch.where(counted, scores, 1.0)
        hidden = mixed.hidden(torch.tensor(prompt.ids), _predicting(prompt), mix).float()
        loss = (hidden - target).square().mean() + chosen.l1 * scores[counted].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        report(step + 1)
        if (step + 1) % _SAVE_EVERY == 0:
            state.write("scores", {**pack(step + 1, [scores], optimizer), "losses": losses})
    some = max(1, min(len(prompts), chosen.steps // 4))
    final = torch.where(counted, scores.detach().clamp(0.0, 1.0), 1.0).cpu()
    if not chosen.steps:
        return final, chosen.l1, chosen.l1
    return final, float(losses[:some].mean()), float(losses[-some:].mean())


def _speed(step: int, steps: int) -> float:
    """Factor on the learning rate: up over the first fifth, down to a tenth over the last."""
    fifth = max(1, steps // 5)
    return min(1.0, (step + 1) / fifth, 0.1 + 0.9 * (steps - step) / fifth)


@torch.no_grad()
def measure(
    model: LoadedModel, mixed: MixedHeads, seen: list[Passkeys], unseen: list[Passkeys], scores: Tensor, seed: int,
    report: Callable[[int], None],
) -> dict[str, str]:  # fmt: skip
    """Share of answer tokens of unseen prompts that are the most likely ones: dense, and with some heads streaming: those found,
    random ones, and those whose attention has the highest entropy on as many prompts that were seen. (A head that retrieves is
    sharp where it does; letting the lowest entropy stream did worse than chance.)"""
    gen, device, done = torch.Generator().manual_seed(seed), model.decoder.device, 0
    entropies = torch.zeros(scores.shape)
    for prompt in itertools.islice(itertools.cycle(seen), len(unseen)):
        entropies += attention_entropies(model.decoder, torch.tensor(prompt.ids), _predicting(prompt))
        done += 1
        report(done)
    right = dict.fromkeys(("dense", *(f"{who}@{share}" for share in SPARSITIES for who in ("found", "random", "entropy"))), 0)
    answers = 0
    for prompt in unseen:
        ids = torch.tensor(prompt.ids, device=device)
        answers += len(ids) - prompt.answer
        for name in right:
            mix = None
            if name != "dense":
                who, share = name.split("@")
                ranked = {"found": scores, "entropy": -entropies}.get(who)
                if ranked is None:
                    ranked = torch.rand(scores.shape, generator=gen)
                mix = (~streaming_heads(ranked, float(share), model.spec)).float().to(device)
            logits = model.decoder.logits(mixed.hidden(ids, _predicting(prompt), mix))
            right[name] += int((logits.argmax(-1) == ids[prompt.answer :]).sum())
            done += 1
            report(done)
    return {f"answer_tokens_right_{name}": f"{count / answers:.3f}" for name, count in right.items()}
