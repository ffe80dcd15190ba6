"""Distils SEA's networks: the frozen model's attention, cut into cells, is what each layer's network learns to draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import ContextTooLong, Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods.sea import SEA, cell_edges, running_mean
from winnow.workers.prefill.scoring import logits_of
from winnow.workers.prefill.sea_network import UPSAMPLE, Sizes, draw_map
from winnow.workers.prefill.training import OnProgress, texts
from winnow.workers.prefill.training.options import need, need_rate, need_seed, parse_options
from winnow.workers.prefill.training.state import TrainingState, pack, unpack

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

_METHOD = "sea"
_KL_WEIGHT = 0.1
_WARM_UP = 10
_SAVE_EVERY = 10
_TEACHER_BYTES = 256 << 20  # most float32 probabilities of the dense model held at once


@dataclass(frozen=True)
class Options:
    """How the networks are distilled.

    Attributes:
        tokens: of a passage, and the longest prompt the method can then be used for.
        steps, rate: of AdamW with a cosine schedule; a step is one passage that no other step sees.
        rows: of a passage, spread over it, whose dense attention is looked at; what precedes them is read all the same.
        held_out: passages to measure on.
        k: keys per head and row that the context's loss is about.
        columns: of the map, a multiple of 4. factor: random features are D ln D / factor.
        knots: rows of the position table.
    """

    tokens: int = 2048
    steps: int = 200
    rate: float = 1e-2
    rows: int = 512
    held_out: int = 4
    k: int = 64
    columns: int = 128
    factor: int = 8
    knots: int = 128

    def __post_init__(self) -> None:
        need(_METHOD, self.tokens >= 64, "tokens must be at least 64", self.tokens)
        need(_METHOD, self.steps >= 0, "steps must be 0 or more", self.steps)
        need_rate(_METHOD, self.rate)
        for name in ("rows", "held_out", "k", "factor", "knots"):
            need(_METHOD, getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        whole = self.columns >= UPSAMPLE and self.columns % UPSAMPLE == 0
        need(_METHOD, whole, f"columns must be a multiple of {UPSAMPLE} (128 and 256 are published)", self.columns)


def calibrate(
    model: LoadedModel, *, on_progress: OnProgress | None = None, seed: int = 0, **options: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distil the networks of all layers while the model reads: each learns from its own layer's q, k and v only.

    Args:
        model: frozen, read densely.
        on_progress: (done, total), one unit a passage.
        seed: of texts and initial networks.
        options: see `Options`.

    Returns:
        Each parameter of `Sizes.shapes`, [L, ...], as `calibration.rounded` stores it, and "longest"; and how they were made,
        with figures on held-out passages before and after, of the rounded ones: divergence from the dense model's cells in nats
        (beside that of a uniform map), share of the attention mass on the keys read, and the error of the layers' outputs.

    Raises:
        InvalidRequest: an option or the seed, or a training that diverged.
        ContextTooLong: `tokens` beyond the model's context.
        Unsupported: every layer has a sliding window.

    Source: as `methods.sea`. Of the published losses those of one layer: 0.1 KL(dense || map) + squared error of the map, summed
    over a row's cells + MSE of the layer's context over its mean square; means over heads and rows. Deviations: layers learn
    apart, from the dense model's own inputs, so the losses on hidden states, logits and task have no part; map and dense
    probabilities are compared in cells, not stretched to tokens; the map's error is summed over cells where the published one
    is a mean, so it weighs `columns` times as much; the choice of keys has no gradient, so the context teaches the gates and
    nothing before them; a higher rate, on a schedule.
    """
    chosen = parse_options(_METHOD, Options, options)
    need_seed(_METHOD, seed)
    spec = model.spec
    if chosen.tokens > spec.max_context:
        raise ContextTooLong(f"calibrate {_METHOD}: tokens is {chosen.tokens}, the model's context {spec.max_context}")
    if all(layer.window for layer in spec.layers):
        raise Unsupported(f"calibrate {_METHOD}: every layer has a window, and such layers stay dense")
    state = TrainingState(_METHOD, model.fingerprint, chosen, seed)
    total = chosen.steps + 2 * chosen.held_out

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    distiller = Distiller(model, chosen, seed)
    unseen = list(itertools.islice(texts.passages(model.tokenizer, chosen.tokens, seed, held_out=True), chosen.held_out))
    before = state.read("before")
    if before is None:
        before = distiller.measure(model, unseen, report)
        state.write("before", before)
    train(distiller, model, chosen, seed, state, lambda step: report(chosen.held_out + step))
    tensors = calibration.rounded(distiller.params)
    state.need_finite(tensors, chosen.rate)
    distiller.params = {name: tensor.to(model.decoder.device) for name, tensor in calibration.unrounded(tensors).items()}
    after = distiller.measure(model, unseen, lambda done: report(chosen.held_out + chosen.steps + done))
    made = {
        "data": f"{chosen.steps} passages of {chosen.tokens} tokens, {chosen.held_out} held out, from {texts.ABOUT}",
        "options": " ".join(f"{key}={value}" for key, value in asdict(chosen).items()) + f" seed={seed}",
        "divergence_uniform": f"{float(after['uniform']):.4f}",
    }
    for name in ("divergence", "recall", "context_error"):
        made |= {f"{name}_before": f"{float(before[name]):.4f}", f"{name}_after": f"{float(after[name]):.4f}"}
    return {**tensors, "longest": torch.tensor(chosen.tokens)}, made


@dataclass
class Distiller:
    """An attention backend that answers densely and, of each layer, trains or measures the network.

    Attributes:
        params: [L, ...] float32 on the model's device.
        is_learning: add each layer's gradient to its parameters'; False = measure only.
        figures: sums over the layers read that count, by name.
    """

    model: LoadedModel
    chosen: Options
    seed: int
    params: dict[str, Tensor] = field(init=False)
    is_learning: bool = False
    figures: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        spec = self.model.spec
        features = max(1, round(spec.head_size * math.log(spec.head_size) / self.chosen.factor))
        sizes = Sizes(spec.n_q_heads, spec.head_size, self.chosen.tokens, features, self.chosen.columns, self.chosen.knots)
        layers = [sizes.initial(self.seed * 1_000_003 + i) for i in range(spec.n_layers)]
        device = self.model.decoder.device
        self.params = {name: torch.stack([layer[name] for layer in layers]).to(device) for name in sizes.shapes()}
        self._method = SEA(k=self.chosen.k)

    @property
    def learnt(self) -> list[Tensor]:
        """All but the random features, which stay as they were drawn."""
        return [tensor for name, tensor in self.params.items() if name != "features"]

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See `AttentionBackend`: dense attention of one passage given whole. Mutates figures."""
        rows, keys, values = q[None], k[None], v[None]
        out, _ = attend_plan(None, rows, keys, values, scale=layer.scale, softcap=layer.softcap, window=layer.window)
        if not layer.window:
            with torch.inference_mode(False):  # a tensor made under inference mode can take no part in a gradient
                self._learn(layer, *(x.clone() for x in (rows, keys, values, out)))
        return out[0]

    def _learn(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> None:
        p = {name: tensor[layer.idx] for name, tensor in self.params.items()}
        rows = min(self.chosen.rows, q.shape[2])
        at = torch.arange(1, rows + 1, device=q.device) * q.shape[2] // rows - 1
        with torch.set_grad_enabled(self.is_learning):
            log_map, gates, _ = draw_map(p, q, k, 0, layer.scale, self.chosen.tokens)
            log_map, gates, dense = (x[:, :, at] for x in (log_map, gates, dense))
            with torch.no_grad():
                cells = self._method.choose(log_map, at)
                truth, sparse, recall = read_cells(q[:, :, at], k, v, layer, cells, at)
                mean = running_mean(v, v.shape[2])[:, :, at].repeat_interleave(q.shape[1] // k.shape[1], 1)
            scaled, mixed = torch.sigmoid(gates).unsqueeze(-1).unbind(-2)
            context = mixed * scaled * sparse + (1 - mixed) * mean
            divergence = (torch.special.xlogy(truth, truth) - truth * log_map).sum(-1).mean()
            error = (context - dense.float()).square().mean() / dense.float().square().mean()
            if self.is_learning:
                (_KL_WEIGHT * divergence + (log_map.exp() - truth).square().sum(-1).mean() + error).backward()  # type: ignore[no-untyped-call]
        edges = cell_edges(at + 1, self.chosen.columns)
        width = edges.diff().float() / edges[:, -1:]
        uniform = (torch.special.xlogy(truth, truth) - torch.special.xlogy(truth, width)).sum(-1).mean()
        found = {"divergence": divergence, "uniform": uniform, "recall": recall, "context_error": error.detach().sqrt()}
        for name, value in {**found, "layers": torch.ones_like(recall)}.items():
            self.figures[name] = self.figures.get(name, 0.0) + value.detach()

    def measure(self, model: LoadedModel, passages: Iterable[list[int]], report: Callable[[int], None]) -> dict[str, Tensor]:
        """Means over the layers that count and the passages. Leaves no figures behind."""
        self.is_learning, self.figures = False, {}
        for done, ids in enumerate(passages, 1):
            read(model, ids, self)
            report(done)
        layers = self.figures.pop("layers")
        return {name: (value / layers).cpu() for name, value in self.figures.items()}


def read(model: LoadedModel, ids: list[int], backend: Distiller) -> None:
    """One passage through the model."""
    device = model.decoder.device
    model.decoder.forward(torch.tensor(ids, device=device), torch.arange(len(ids), device=device), backend)


def train(
    distiller: Distiller, model: LoadedModel, chosen: Options, seed: int, state: TrainingState, report: Callable[[int], None]
) -> None:
    """A step of AdamW for each passage; goes on where `state` stopped. Mutates the distiller's parameters."""
    learnt = distiller.learnt
    for tensor in learnt:
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(learnt, lr=chosen.rate, weight_decay=0.0)
    piece = state.read("networks")
    first = unpack(piece, learnt, optimizer) if piece is not None else 0
    source = itertools.islice(texts.passages(model.tokenizer, chosen.tokens, seed), first, chosen.steps)
    for step, ids in enumerate(source, first):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / chosen.steps))
        distiller.is_learning = True
        optimizer.zero_grad()
        read(model, ids, distiller)
        optimizer.step()
        report(step + 1)
        if (step + 1) % _SAVE_EVERY == 0:
            state.write("networks", pack(step + 1, learnt, optimizer))
    for tensor in learnt:
        tensor.requires_grad_(False)


def read_cells(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec, cells: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the dense model does with the cells of a map.

    Args:
        q: [B, Hq, R, D], of the rows at positions [R] int64; k, v: [B, Hkv, T, D]; cells: [B, Hq, R, columns] bool, those kept.

    Returns:
        Its probabilities summed by cell [B, Hq, R, columns]; attention over the kept cells' keys and each row's own
        [B, Hq, R, D], as the method's plan computes it; and the mean share of the probabilities on those keys. Float32.
    """
    batch, hq, n, _ = q.shape
    hkv, tokens, columns = k.shape[1], k.shape[2], cells.shape[3]
    edges, key = cell_edges(positions + 1, columns), torch.arange(tokens, device=q.device)
    truth, sparse, recall = [], [], []
    step = max(1, _TEACHER_BYTES // (16 * batch * hq * tokens))
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        grouped = q[:, :, rows].unflatten(1, (hkv, -1)).flatten(2, 3)
        logits = logits_of(grouped, k, layer).view(batch, hq, -1, tokens)
        own = positions[rows][:, None]
        share = logits.masked_fill(key > own, -torch.inf).softmax(-1)
        upto = torch.nn.functional.pad(share.double().cumsum(-1), (1, 0))
        truth.append(upto.gather(-1, edges[rows].expand(*share.shape[:3], -1)).diff().float())
        cell_of = torch.searchsorted(edges[rows][:, 1:].contiguous(), key.expand(own.shape[0], -1).contiguous(), right=True)
        cell_of = cell_of.clamp(max=columns - 1).expand(batch, hq, -1, -1)
        share = share * (cells[:, :, rows].gather(-1, cell_of) | (key == own))
        kept = share.sum(-1, keepdim=True)
        context = torch.matmul((share / kept).unflatten(1, (hkv, -1)).flatten(2, 3), v.float())
        sparse.append(context.view(batch, hq, -1, v.shape[3]))
        recall.append(kept.squeeze(-1))
    return torch.cat(truth, 2), torch.cat(sparse, 2), torch.cat(recall, 2).mean()
