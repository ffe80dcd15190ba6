"""Trains DHSA's border predictors: a gap is a border where later rows treat the keys on its two sides unequally."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.errors import ContextTooLong, Unsupported
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.prefill.chunk_borders import MOST_REACH, BorderPredictor, parameter_shapes
from winnow.workers.prefill.scoring import logits_of
from winnow.workers.prefill.training import OnProgress, texts
from winnow.workers.prefill.training.options import need, need_rate, need_seed, parse_options
from winnow.workers.prefill.training.state import TrainingState, pack, unpack

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

_METHOD = "dhsa-v1"
_TINY = 1e-6
_FOCUS = 2.0  # gamma of the focal loss
_SAVE_EVERY = 50
_STEPS_A_UNIT = 10  # of progress

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """How the predictors are trained.

    Attributes:
        tokens: of a passage. passages: to learn from. held_out: to measure on.
        epochs: passes over all gaps. batch: gaps of a step. rate: of Adam; published: 0.0001, over far more text.
        positive: weight of the borders in the loss; 0 = as much as there are fewer of them. Its size decides how many gaps
            score above the method's threshold: with 16, 30 to 100 of 2,048 tokens of real text; with 6 or less, hardly any.
        per_layer: 1 = a predictor for each layer without a window, 0 = one that all layers share.
        reach: tokens looked at on each side of a gap.
    """

    tokens: int = 1024
    passages: int = 8
    held_out: int = 2
    epochs: int = 2
    rate: float = 1e-3
    batch: int = 1024
    positive: float = 16.0
    per_layer: int = 0
    reach: int = 4

    def __post_init__(self) -> None:
        need(_METHOD, 1 <= self.reach <= MOST_REACH, f"reach must be 1 to {MOST_REACH} tokens", self.reach)
        need(_METHOD, self.tokens >= 8 * self.reach, f"tokens must be at least {8 * self.reach}", self.tokens)
        for name in ("passages", "held_out", "batch"):
            need(_METHOD, getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        need(_METHOD, self.epochs >= 0, "epochs must be 0 or more", self.epochs)
        need_rate(_METHOD, self.rate)
        need(_METHOD, self.positive >= 0.0, "positive must be 0 or more", self.positive)
        need(_METHOD, self.per_layer in (0, 1), "per_layer must be 0 or 1", self.per_layer)


def calibrate(
    model: LoadedModel, *, on_progress: OnProgress | None = None, seed: int = 0, **options: object
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Train the border predictors on what dense attention does with passages of real text, in the layers without a window.

    Args:
        model: frozen.
        on_progress: (done, total), one unit a passage read and one for ten steps.
        seed: of the order of texts, the initial parameters and the order of gaps.
        options: see `Options`.

    Returns:
        The tensors that `methods.dhsa_v1.Predictors.of` reads, parameters in float16, and how they were made, with figures on
        held-out passages: the loss, and how well scores rank gaps that the labels call borders (area under the ROC curve).

    Raises:
        InvalidRequest: an option or the seed, or a training that diverged.
        ContextTooLong: `tokens` beyond the model's context.
        Unsupported: every layer has a sliding window.

    Source: as `methods.dhsa_v1`; Adam, focal cross-entropy with gamma 2, two epochs. Deviation: general text only, where the
    published training adds question answering; one predictor shared by all layers unless per_layer is set.
    """
    chosen = parse_options(_METHOD, Options, options)
    need_seed(_METHOD, seed)
    spec = model.spec
    if chosen.tokens > spec.max_context:
        raise ContextTooLong(f"calibrate {_METHOD}: tokens={chosen.tokens} is beyond the model's context of {spec.max_context}")
    layers = [layer.idx for layer in spec.layers if not layer.window]
    if not layers:
        raise Unsupported(f"calibrate {_METHOD}: every layer has a window, and such layers stay dense")
    state = TrainingState(_METHOD, model.fingerprint, chosen, seed)
    stacks = len(layers) if chosen.per_layer else 1
    n_read = chosen.passages + chosen.held_out
    gaps = chosen.passages * len(layers) * len(usable_gaps(chosen.tokens, chosen.reach))
    n_steps = chosen.epochs * -(-gaps // (stacks * chosen.batch))
    total = n_read + -(-n_steps // _STEPS_A_UNIT)

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    unseen = read_examples(model, chosen, seed, state, report, held_out=True)
    seen = read_examples(model, chosen, seed, state, lambda done: report(chosen.held_out + done), held_out=False)
    device = model.decoder.device
    unseen, seen = ({name: tensor.to(device) for name, tensor in examples.items()} for examples in (unseen, seen))
    trainee = Trainee(seen, stacks, chosen, seed)
    before = measure(trainee, unseen)
    train(trainee, seen, chosen, seed, state, lambda step: report(n_read + step // _STEPS_A_UNIT))
    tensors = of_all_layers(trainee.tensors(), layers, spec.n_layers)
    state.need_finite(tensors, chosen.rate)
    after = measure(trainee, unseen)
    report(total)
    made = {
        "data": f"{chosen.passages} passages of {chosen.tokens} tokens, {chosen.held_out} held out, from {texts.ABOUT}",
        "options": " ".join(f"{key}={value}" for key, value in asdict(chosen).items()) + f" seed={seed}",
        "loss": f"before={before.loss:.4f} after={after.loss:.4f}",
        "roc_area": f"before={before.roc_area:.4f} after={after.roc_area:.4f}",
        "share_of_borders": f"{after.share:.4f}",
    }
    return tensors, made


def usable_gaps(tokens: int, reach: int) -> Tensor:
    """[G] int64: the gaps of a text that have `reach` tokens on both sides and later rows to judge them by."""
    return torch.arange(reach, tokens - reach - 1)


def mean_attention(q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
    """[N, N] float32: causal attention without a window, averaged over heads, head by head; q [Hq, N, D], k [Hkv, N, D]."""
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    key = torch.arange(n, device=q.device)
    forbidden = key > key[:, None]
    out = torch.zeros(n, n, device=q.device)
    for head in range(q.shape[0]):
        out += logits_of(q[head], k[head // group], layer).masked_fill_(forbidden, -torch.inf).softmax(-1)
    return out / q.shape[0]


def border_labels(attention: Tensor, gaps: Tensor, reach: int) -> Tensor:
    """How much a gap is a border, by what later rows give to the `reach` keys before and after it.

        r = (larger of the two + 1e-6) / (smaller + 1e-6);  label = sigmoid(2 (ln r - ln 2))

    Args:
        attention: [N, N], rows sum to 1. gaps: [G], as `usable_gaps`; rows > gap + reach judge.

    Returns:
        [G] float32 in 0.2 to 1; 0.5 where one side gets twice the other.
    """
    below = attention.flip(0).cumsum(0).flip(0)  # [i, j]: what rows i and later give to key j
    at = gaps[:, None] + torch.arange(-reach, reach, device=gaps.device)
    before, after = below[gaps[:, None] + reach + 1, at].view(len(gaps), 2, reach).sum(-1).unbind(1)
    ratio = (torch.maximum(before, after) + _TINY) / (torch.minimum(before, after) + _TINY)
    return torch.sigmoid(2 * (ratio / 2).log())


def focal_loss(scores: Tensor, labels: Tensor, positive: float) -> Tensor:
    """Mean of -positive y (1 - p)^2 ln p - (1 - y) p^2 ln(1 - p), p = sigmoid(score); labels y may be soft."""
    p = torch.sigmoid(scores)
    return (positive * labels * (1 - p) ** _FOCUS * F.softplus(-scores) + (1 - labels) * p**_FOCUS * F.softplus(scores)).mean()


@dataclass
class _Recorder:
    """Dense attention that keeps, of each layer without a window, its keys side by side and the labels of its gaps."""

    reach: int
    seen: list[Example] = field(default_factory=list)

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        if not layer.window:  # the others stay dense, and are never cut
            self.seen.append(example(q, k, layer, self.reach))
        out, _ = attend_plan(None, q[None], k[None], v[None], scale=layer.scale, softcap=layer.softcap, window=layer.window)
        return out[0]


def example(q: Tensor, k: Tensor, layer: LayerSpec, reach: int) -> Example:
    """What is learnt from one layer's q [Hq, T, D] and k [Hkv, T, D]: keys [T, C] float16 and labels [G] float32, on the CPU."""
    gaps = usable_gaps(q.shape[1], reach).to(q.device)
    labels = border_labels(mean_attention(q, k, layer), gaps, reach)
    return {"keys": k.transpose(0, 1).flatten(1).to("cpu", torch.float16), "labels": labels.cpu()}


def read_examples(
    model: LoadedModel, chosen: Options, seed: int, state: TrainingState, report: Callable[[int], None], *, held_out: bool
) -> Example:
    """Run the model over passages; those in `state` are not run again.

    Returns:
        keys [S, L, T, C] float16 and labels [S, L, G] float32, on the CPU, of the L layers without a window.
    """
    examples = []
    positions = torch.arange(chosen.tokens, device=model.decoder.device)
    source = texts.passages(model.tokenizer, chosen.tokens, seed, held_out=held_out)
    for i in range(chosen.held_out if held_out else chosen.passages):
        ids = next(source)
        name = f"{'unseen' if held_out else 'seen'}-{i:05d}"
        piece = state.read(name)
        if piece is None:
            recorder = _Recorder(chosen.reach)
            model.decoder.forward(torch.tensor(ids, device=model.decoder.device), positions, recorder)
            piece = {key: torch.stack([layer[key] for layer in recorder.seen]) for key in ("keys", "labels")}
            state.write(name, piece)
        examples.append(piece)
        report(i + 1)
    return {key: torch.stack([one[key] for one in examples]) for key in ("keys", "labels")}


class Trainee:
    """Predictors while they learn.

    Attributes:
        params: by the names of `parameter_shapes`, [stacks, ...] float32 each; stacks is 1 or L, the layers learnt from.
        mean, deviation: [L, C], of the keys of each of them.
    """

    def __init__(self, seen: Example, stacks: int, chosen: Options, seed: int) -> None:
        """
        Args:
            seen: as `read_examples`, where the predictors shall be; its keys set mean and deviation, its labels the weight of
                borders.
        """
        keys, labels = seen["keys"], seen["labels"]
        gen = torch.Generator().manual_seed(seed)
        self.reach = chosen.reach
        wide = keys.transpose(0, 1).flatten(1, 2).float()  # [L, S T, C]
        self.mean, self.deviation = wide.mean(1), wide.std(1).clamp(min=1e-3)
        self.positive = chosen.positive or float((1 - labels).sum() / labels.sum())
        self.params: dict[str, Tensor] = {}
        for name, shape in parameter_shapes(keys.shape[3]).items():
            start = torch.zeros(stacks, *shape)
            if not name.endswith("bias"):
                start = torch.ones_like(start) if name == "norm" else torch.randn(start.shape, generator=gen) / shape[0] ** 0.5
            self.params[name] = start.to(keys.device).requires_grad_()

    @property
    def stacks(self) -> int:
        return self.params["score_bias"].shape[0]

    def predictor(self, layer: int) -> BorderPredictor:
        """Of one layer, sharing memory with the parameters."""
        params = {name: tensor[layer % self.stacks] for name, tensor in self.params.items()}
        return BorderPredictor(params, self.mean[layer], self.deviation[layer], self.reach)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, of the layers learnt from."""
        params = {name: tensor.detach().half() for name, tensor in self.params.items()}
        return {**params, "mean": self.mean, "deviation": self.deviation, "reach": torch.tensor(self.reach)}


def of_all_layers(tensors: dict[str, Tensor], layers: list[int], n_layers: int) -> dict[str, Tensor]:
    """`Trainee.tensors` of some layers, by index, as tensors of a model of n_layers: the others get the first one's, unused."""
    at = torch.tensor([layers.index(i) if i in layers else 0 for i in range(n_layers)])
    own = {"mean", "deviation"}
    if tensors["score_bias"].shape[0] > 1:  # a predictor each
        own |= set(tensors) - {"reach"}
    return {name: tensor[at.to(tensor.device)] if name in own else tensor for name, tensor in tensors.items()}


def train(
    trainee: Trainee, seen: Example, chosen: Options, seed: int, state: TrainingState | None, report: Callable[[int], None]
) -> None:
    """Adam over all gaps in random order, on the trainee's device, where `seen` lies too; goes on where `state` stopped. A step
    takes gaps of one predictor. Mutates it."""
    keys, labels = seen["keys"], seen["labels"]
    n_passages, n_layers, n_gaps = labels.shape
    params = list(trainee.params.values())
    optimizer = torch.optim.Adam(params, lr=chosen.rate)
    piece = state.read("predictors") if state is not None else None
    done = unpack(piece, params, optimizer) if piece is not None else 0
    gaps = usable_gaps(keys.shape[2], chosen.reach).to(keys.device)
    near = torch.arange(-chosen.reach, chosen.reach, device=keys.device)
    per_stack = n_passages * n_layers * n_gaps // trainee.stacks
    steps = -(-per_stack // chosen.batch)  # of an epoch
    mean, deviation = trainee.mean, trainee.deviation
    for step in range(done, chosen.epochs * steps):
        gen = torch.Generator().manual_seed(seed * 1_000_003 + step // steps)  # of its own, so that a resumed run draws the same
        order = torch.randperm(per_stack, generator=gen)[step % steps * chosen.batch : (step % steps + 1) * chosen.batch]
        order = order.to(keys.device)
        optimizer.zero_grad()
        for stack in range(trainee.stacks):
            layers = torch.tensor([stack] if trainee.stacks > 1 else range(n_layers), device=keys.device)
            passage, rest = order // (len(layers) * n_gaps), order % (len(layers) * n_gaps)
            layer, gap = layers[rest // n_gaps], rest % n_gaps
            at = gaps[gap][:, None] + near
            windows = (keys[passage[:, None], layer[:, None], at].float() - mean[layer, None]) / deviation[layer, None]
            zero, one = windows.new_zeros(()), windows.new_ones(())
            blank = BorderPredictor(trainee.predictor(stack).params, zero, one, chosen.reach)
            scores = blank.window_scores(windows, torch.ones_like(at, dtype=torch.bool))
            focal_loss(scores, labels[passage, layer, gap], trainee.positive).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        report(step + 1)
        if state is not None and (step + 1) % _SAVE_EVERY == 0:
            state.write("predictors", pack(step + 1, params, optimizer))


@dataclass(frozen=True)
class Figures:
    """The loss, the area under the ROC curve of scores against labels above 0.5, and the share of those labels."""

    loss: float
    roc_area: float
    share: float


@torch.no_grad()
def measure(trainee: Trainee, unseen: Example) -> Figures:
    """Figures on the examples of `read_examples`, on the trainee's device."""
    keys, labels = unseen["keys"], unseen["labels"]
    gaps = usable_gaps(keys.shape[2], trainee.reach).to(keys.device)
    found: list[Tensor] = []
    for one in keys:
        for layer, text in enumerate(one):
            found.append(trainee.predictor(layer).scores(text)[gaps])
    scores, flat = torch.cat(found), labels.flatten()
    is_border = flat > 0.5
    loss = float(focal_loss(scores, flat, trainee.positive))
    return Figures(loss, roc_area(scores.cpu(), is_border.cpu()), float(is_border.float().mean()))


def roc_area(scores: Tensor, is_border: Tensor) -> float:
    """How often a border scores above another gap, ties counted half; 0.5 = by chance, nan where there is only one kind."""
    n_borders = int(is_border.sum())
    _, which, count = scores.unique(return_inverse=True, return_counts=True)  # sorted
    rank = (count.cumsum(0) - (count - 1) / 2).double()[which]  # the mean of the ranks that equal scores share
    pairs = n_borders * (len(scores) - n_borders)
    return float((rank[is_border].sum() - n_borders * (n_borders + 1) / 2) / pairs) if pairs else float("nan")
