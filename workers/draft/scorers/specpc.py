"""SpecPC: a small draft model reads the whole prompt; its attention says which tokens the target needs to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.draft.base import DraftContext, PromptReducer, draft_scorers
from winnow.workers.model.loader import make_current


@draft_scorers.register("specpc")
@dataclass(frozen=True)
class SpecPC(PromptReducer):
    """Keep the prompt tokens that the draft's last queries, and the token it would say next, attend to most.

    Source: Draft-based Approximate Inference for LLMs (arXiv 2506.08373), SpecPC. Per layer from `first_layer` on, the softmax
    rows of the last `window` queries (weighted 0..1 from oldest to newest) and of `lookahead` greedily drafted tokens (weight
    1) are reduced by maximum over heads, rows and layers, max-pooled over `pool` tokens; the best tokens and their
    neighbours are kept, at most `capacity` in all, and the last `window` tokens always.

    Deviations: a chosen token's neighbours are added in order of score until the capacity is full, so the result never exceeds
    it; the first `sink` tokens are kept too (templates begin with them); scores are computed one layer at a time while the
    draft runs, so that no attention map is held.

    Attributes:
        capacity: tokens to keep; a prompt no longer than this is left unchanged.
        window: last tokens whose queries score the rest; they are always kept.
        pool: tokens of the max-pool, and of the span kept around a chosen token.
        first_layer: layers below are not scored; cut to half the draft's layers when it has fewer than twice as many.
        lookahead: tokens the draft generates greedily.
        sink: first tokens that are always kept.
        reduction: over heads and layers; "max" as in the authors' code, "mean" as in parts of their text.
    """

    caps: ClassVar[Capabilities] = Capabilities(
        prefix_safe=False,
        needs=frozenset({"draft"}),
        fallback="none",
        notes="shortens the prompt to `capacity` tokens; positions are renumbered",
    )
    capacity: int = 2048
    window: int = 64
    pool: int = 32
    first_layer: int = 8
    lookahead: int = 1
    sink: int = 4
    reduction: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        for name in ("capacity", "window", "pool", "lookahead"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"reducer specpc: {name} must be at least 1, got {getattr(self, name)}")
        if min(self.first_layer, self.sink) < 0:
            raise InvalidRequest("reducer specpc: first_layer and sink must not be negative")
        if self.capacity < self.window + self.sink:
            raise InvalidRequest(
                f"reducer specpc: capacity must be at least window + sink = {self.window + self.sink}, got {self.capacity}"
            )
        if self.reduction not in ("max", "mean"):
            raise InvalidRequest(f"reducer specpc: reduction must be max or mean, got {self.reduction!r:.20}")

    def keep(self, token_ids: Tensor, ctx: DraftContext) -> Tensor:
        """See `PromptReducer.keep`. Cost: one draft prefill, plus window * n * D per scored head."""
        n = token_ids.numel()
        if n <= self.capacity:
            return torch.arange(n)
        return choose(self._scores(token_ids, ctx), self.capacity, self.window, self.pool, self.sink)

    def _scores(self, token_ids: Tensor, ctx: DraftContext) -> Tensor:
        """Importance of each prompt token: [n] float32 on the CPU."""
        decoder, n = ctx.draft.decoder, token_ids.numel()
        make_current(decoder.device)
        first = min(self.first_layer, decoder.spec.n_layers // 2)
        backend = _ScoringBackend(n, self.lookahead, self.window, first, self.reduction)
        tokens = token_ids.to(decoder.device)
        hidden = tokens.new_empty(0)
        with torch.inference_mode():
            for start in range(0, n, _CHUNK):
                ctx.check_cancelled()
                chunk = tokens[start : start + _CHUNK]
                hidden = decoder.forward(chunk, torch.arange(start, start + chunk.numel(), device=decoder.device), backend)
                ctx.on_progress(min(start + _CHUNK, n), n)
            for step in range(self.lookahead):  # the token that would follow, then those after it
                ctx.check_cancelled()
                token = decoder.logits(hidden[-1:]).argmax(-1)
                hidden = decoder.forward(token, torch.tensor([n + step], device=decoder.device), backend)
        return backend.scores()[:n].cpu()


_CHUNK = 1024  # tokens of a draft forward: bounds memory and the time until a cancellation is seen


def choose(scores: Tensor, capacity: int, window: int, pool: int, sink: int) -> Tensor:
    """Turn token scores [n] into kept indices.

    Returns:
        int64, strictly ascending, exactly min(n, capacity) of them; the first `sink` and the last `window` are among them.
    """
    n = scores.numel()
    if n <= capacity:
        return torch.arange(n)
    left = pool // 2
    padded = F.pad(scores.float()[None, None], (left, pool - 1 - left), value=float("-inf"))
    pooled = F.max_pool1d(padded, pool, stride=1)[0, 0]
    kept = torch.zeros(n, dtype=torch.bool)
    kept[:sink] = True
    kept[n - window :] = True
    room = capacity - int(kept.sum())
    # Best spans first; a stable sort gives ties to the lower index.
    for centre in torch.sort(pooled, descending=True, stable=True).indices.tolist():
        if room == 0:
            break
        span = torch.arange(max(0, centre - left), min(n, centre - left + pool))
        new = span[~kept[span]]
        if new.numel() > room:  # the last span is cut around its centre, nearest tokens first
            new = new[torch.sort((new - centre).abs(), stable=True).indices[:room]]
        kept[new] = True
        room -= new.numel()
    return kept.nonzero()[:, 0]


class _ScoringBackend:
    """Dense attention with its own K/V buffers; as the last queries pass through a layer it scores the keys they read."""

    def __init__(self, n: int, lookahead: int, window: int, first_layer: int, reduction: str) -> None:
        self.n, self.total = n, n + lookahead
        self.window, self.first_layer, self.reduction = min(window, n), first_layer, reduction
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.filled: dict[int, int] = {}
        self.total_scores: Tensor | None = None

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See AttentionBackend."""
        if layer.idx not in self.k:
            shape = (layer.n_kv_heads, self.total, layer.head_size)
            self.k[layer.idx], self.v[layer.idx] = k.new_zeros(shape), v.new_zeros(shape)
        start = self.filled.get(layer.idx, 0)
        end = start + k.shape[1]
        self.k[layer.idx][:, start:end], self.v[layer.idx][:, start:end] = k, v
        self.filled[layer.idx] = end
        keys, values = self.k[layer.idx][:, :end], self.v[layer.idx][:, :end]
        out, _ = attend_plan(
            None, q[None], keys[None], values[None], scale=layer.scale, softcap=layer.softcap, window=layer.window
        )
        if layer.idx >= self.first_layer and end > self.n - self.window:
            self._score(layer, q, keys, start)
        return out[0]

    def _score(self, layer: LayerSpec, q: Tensor, keys: Tensor, start: int) -> None:
        first = max(0, self.n - self.window - start)  # first row of this chunk that belongs to the window
        end = keys.shape[1]
        rows = torch.arange(start + first, end, device=q.device)
        weight = ((rows - (self.n - self.window)).float() / max(1, self.window - 1)).clamp(max=1.0)  # linspace(0, 1); drafted = 1
        forbidden = torch.arange(end, device=q.device)[None] > rows[:, None]
        group = layer.n_q_heads // layer.n_kv_heads
        for head in range(layer.n_kv_heads):  # one KV head at a time: [g, W, n] float32 is all that is held
            logits = q[head * group : (head + 1) * group, first:].float() @ keys[head].float().T * layer.scale
            if layer.softcap:
                logits = layer.softcap * torch.tanh(logits / layer.softcap)
            mask = forbidden
            if layer.window:
                mask = mask | (torch.arange(end, device=q.device)[None] <= rows[:, None] - layer.window)
            probs = logits.masked_fill(mask, float("-inf")).softmax(-1) * weight[:, None]
            if self.total_scores is None:
                self.total_scores = probs.new_zeros(self.total)
            seen = self.total_scores[:end]
            if self.reduction == "max":
                torch.maximum(seen, probs.amax((0, 1)), out=seen)
            else:
                seen += probs.sum((0, 1))

    def scores(self) -> Tensor:
        """[total] float32; a mean is left unnormalised, since only the order matters."""
        assert self.total_scores is not None
        return self.total_scores
