"""Finds SALE's thresholds: each head's is halved until what it drops changes its output little enough."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import ContextTooLong, Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.tokenizer import Tokenizer
from winnow.workers.prefill.methods.sale import DENSE_TAU, SALE
from winnow.workers.prefill.training import OnProgress
from winnow.workers.prefill.training.options import need, need_seed, parse_options
from winnow.workers.prefill.training.state import TrainingState

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

_METHOD = "sale"
_LEAST_TOKENS = 1536


@dataclass(frozen=True)
class Options:
    """How thresholds are found.

    Attributes:
        theta: most that a head's output may change: sum of |difference| over its D numbers, mean over rows. Published: 0.4 for
            Llama-3.1-8B, 2.0 for Qwen2.5-32B; it depends on the size of a model's values.
        start: first threshold. floor: a threshold below it becomes 0, a dense head.
        prompts, tokens: key-value retrieval prompts and their length; one more prompt measures the result.
    """

    theta: float = 0.4
    start: float = 0.008
    floor: float = 1e-4
    prompts: int = 5
    tokens: int = 4096

    def __post_init__(self) -> None:
        need(_METHOD, self.theta > 0.0, "theta must be above 0 (0.4 is published for Llama-3.1-8B)", self.theta)
        need(_METHOD, self.floor >= DENSE_TAU, f"floor must be at least {DENSE_TAU} (0.0001 is published)", self.floor)
        need(_METHOD, self.start >= self.floor, f"start must be at least floor={self.floor} (0.008 is published)", self.start)
        need(_METHOD, self.prompts >= 1, "prompts must be at least 1 (5 is published)", self.prompts)
        need(_METHOD, self.tokens >= _LEAST_TOKENS, f"tokens must be at least {_LEAST_TOKENS}: early rows are dense", self.tokens)


def calibrate(
    model: LoadedModel, *, on_progress: OnProgress | None = None, seed: int = 0, **options: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find a threshold for each head: from `start` on, halved while the head's output error is theta or more.

    Every layer sees the inputs of the dense model. Prompts follow each other and thresholds only decrease.

    Args:
        on_progress: (done, total), one unit a layer of a prompt.
        seed: of the prompts.
        options: see `Options`.

    Returns:
        {"tau": [L, Hq] float32, "error": [L, Hq] and "density": [L, Hq] float32 on one more prompt}, and how they were made.

    Raises:
        InvalidRequest: an option or the seed.
        ContextTooLong: `tokens` beyond the model's context.
        Unsupported: every layer has a sliding window.

    Source: as `methods.sale`, section 3.4. Each finished prompt is kept: a second call goes on after the last one.
    """
    chosen = parse_options(_METHOD, Options, options)
    need_seed(_METHOD, seed)
    spec = model.spec
    if chosen.tokens > spec.max_context:
        raise ContextTooLong(f"calibrate {_METHOD}: tokens={chosen.tokens} is beyond the model's context of {spec.max_context}")
    if all(layer.window for layer in spec.layers):
        raise Unsupported(f"calibrate {_METHOD}: every layer has a window, and such layers stay dense")
    state = TrainingState(_METHOD, model.fingerprint, chosen, seed)
    total = (chosen.prompts + 1) * spec.n_layers
    tau = torch.full((spec.n_layers, spec.n_q_heads), chosen.start)
    for i in range(chosen.prompts + 1):
        is_last = i == chosen.prompts
        kept = None if is_last else state.read(f"prompt-{i}")
        if kept is not None:
            tau = kept["tau"]
            continue
        ids = torch.tensor(retrieval_prompt(model.tokenizer, chosen.tokens, seed * 1_000_003 + i), device=model.decoder.device)
        search = Search(tau, chosen.theta, 0.0 if is_last else chosen.floor, is_fixed=is_last)
        for layer in model.decoder.iter_forward(ids, torch.arange(len(ids), device=ids.device), search):
            if on_progress is not None:
                on_progress(i * spec.n_layers + layer + 1, total)
        if not is_last:
            state.write(f"prompt-{i}", {"tau": tau})
    is_dense = tau < DENSE_TAU
    made = {
        "data": f"{chosen.prompts} key-value retrieval prompts of up to {chosen.tokens} tokens, one more to measure",
        "options": " ".join(f"{key}={value}" for key, value in asdict(chosen).items()) + f" seed={seed}",
        "dense_heads": f"{int(is_dense.sum())} of {tau.numel()}",
        "mean_density": f"{float(search.density.mean()):.4f}",
        "mean_error": f"{float(search.error.mean()):.4f}",
        "heads_above_theta": f"{int((search.error >= chosen.theta).sum())} of {tau.numel()}",
    }
    return {"tau": tau, "error": search.error, "density": search.density}, made


class Search:
    """Runs a prompt densely and lowers the thresholds of the heads whose sparse output differs too much on the way.

    Attributes:
        tau: [L, Hq] float32 on the CPU, mutated.
        error: [L, Hq], of this prompt with the thresholds it left; 0 for layers that stay dense.
        density: [L, Hq], measured where thresholds are fixed; 1 elsewhere.
    """

    def __init__(self, tau: Tensor, theta: float, floor: float, *, is_fixed: bool = False) -> None:
        self.tau = tau
        self.error = torch.zeros_like(tau)
        self.density = torch.ones_like(tau)
        self._theta = theta
        self._floor = floor
        self._is_fixed = is_fixed
        self._method = SALE(tau=0.0)

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See `AttentionBackend`: dense attention of one prompt given whole."""
        rows, keys, values = q[None], k[None], v[None]
        out, _ = attend_plan(None, rows, keys, values, scale=layer.scale, softcap=layer.softcap, window=layer.window)
        if not layer.window:
            self._lower(layer, rows, keys, values, out)
        return out[0]

    def _lower(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> None:
        n, group = q.shape[2], layer.n_q_heads // layer.n_kv_heads
        scores = self._method.tile_scores(q, k, layer)
        tau, open_groups = self.tau[layer.idx], torch.arange(layer.n_kv_heads)
        while len(open_groups):
            heads = (open_groups[:, None] * group + torch.arange(group)).flatten()
            limit = tau[heads].clamp(min=DENSE_TAU).log().to(q.device)
            at, kv_at = heads.to(q.device), open_groups.to(q.device)
            plan = SALE.plan_of(scores[:, at] > limit[:, None, None], tau[heads], n, k.shape[2])
            out, _ = attend_plan(plan, q[:, at], k[:, kv_at], v[:, kv_at], scale=layer.scale, softcap=layer.softcap)
            error = (out.float() - dense[:, at].float()).abs().sum(-1).mean((0, 2)).cpu()
            self.error[layer.idx, heads] = error
            too_much = (error >= self._theta) & (tau[heads] >= DENSE_TAU)
            if self._is_fixed:
                one_by_one = [
                    SALE.plan_of(scores[:, [h]] > limit[h].view(1, 1, 1), tau[[h]], n, k.shape[2]) for h in heads.tolist()
                ]
                self.density[layer.idx] = torch.tensor([plan.density() for plan in one_by_one])
                break
            if not bool(too_much.any()):
                break
            lower = tau[heads] / 2
            tau[heads] = torch.where(too_much, torch.where(lower < self._floor, 0.0, lower), tau[heads])
            open_groups = open_groups[too_much.view(-1, group).any(-1)]


def retrieval_prompt(tokenizer: Tokenizer, n_tokens: int, seed: int) -> list[int]:
    """A JSON object full of random keys and values, then one of its keys again: at most n_tokens tokens, less than a pair short.

    Source: the key-value retrieval of "Lost in the Middle" (arXiv 2307.03172), with 12 hexadecimal digits for a UUID.
    """
    draw = random.Random(seed)
    key, value = (f"{draw.getrandbits(48):012x}" for _ in range(2))
    opening = tokenizer.encode_prompt("Extract the value of a key from this JSON object.\n\n{")
    ending = tokenizer.encode(f'"end": ""}}\n\nKey: "{key}"\nIts value: "')
    lines = [tokenizer.encode(f'"{key}": "{value}",\n')]
    used = len(opening) + len(lines[0]) + len(ending)
    while True:
        line = tokenizer.encode(f'"{draw.getrandbits(48):012x}": "{draw.getrandbits(48):012x}",\n')
        if used + len(line) > n_tokens:
            break
        lines.append(line)
        used += len(line)
    draw.shuffle(lines)
    return [*opening, *(token for line in lines for token in line), *ending]
