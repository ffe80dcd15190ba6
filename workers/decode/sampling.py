"""Choosing the next token of every sequence of a batch from one [B, V] tensor of logits.

Order of the filters as in transformers: temperature, top-k, top-p, min-p, each on what the one before left. A sequence's
draw depends on its own logits and its own generator only, never on its batch mates, so the same seed gives the same text
alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.types import Sampling

# Tokens looked at before a whole row is sorted: sorting 50K logits costs 3 ms a row on a CPU core, these 0.2 ms.
CANDIDATES = 1024


@dataclass(frozen=True)
class Draw:
    """One step's outcome for one sequence.

    Attributes:
        token_id: the chosen token.
        is_finite: False when the logits held NaN or infinity; token_id then means nothing.
        logprobs: (token id, log-probability) of the unmodified distribution, the chosen token first, then the most
            likely ones; empty unless asked for.
    """

    token_id: int
    is_finite: bool
    logprobs: tuple[tuple[int, float], ...] = ()


def new_generator(sampling: Sampling) -> torch.Generator:
    """A generator of one request, always on the CPU so that a seed gives the same draws on every device."""
    generator = torch.Generator()
    if sampling.seed >= 0:
        generator.manual_seed(sampling.seed)
    else:
        generator.seed()
    return generator


def draw(logits: Tensor, sampling: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[Draw]:
    """Choose a token for each row. One device-to-host copy for the whole batch (two with logprobs).

    Args:
        logits: [B, V] float32, any device.
        sampling, generators: B each; a generator is advanced by one draw a call unless its row is greedy.
    """
    ids = logits.argmax(dim=-1)  # [B]
    plain = [b for b, s in enumerate(sampling) if s.temperature > 0 and not _is_filtered(s)]
    filtered = [b for b, s in enumerate(sampling) if s.temperature > 0 and _is_filtered(s)]
    for rows, choose in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if rows:
            at = torch.tensor(rows, device=logits.device)
            u = torch.cat([torch.rand(1, generator=generators[b], dtype=torch.float64) for b in rows]).to(logits.device)
            temperature = torch.tensor([sampling[b].temperature for b in rows], device=logits.device)
            scaled = logits[at] / temperature[:, None]
            ids[at] = choose(scaled, [sampling[b] for b in rows], u)
    finite = logits.amax(dim=-1).isfinite()  # amax passes NaN on
    picked, is_finite = torch.stack([ids, finite.long()]).tolist()
    logprobs = _logprobs(logits, ids, [s.logprobs for s in sampling]) if any(s.logprobs for s in sampling) else None
    return [
        Draw(token_id, bool(good), logprobs[b] if logprobs else ())
        for b, (token_id, good) in enumerate(zip(picked, is_finite, strict=True))
    ]


def _is_filtered(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Column of each row of weights [R, n] where the running sum passes u [R] of the total: int64 [R]."""
    running = weights.double().cumsum(dim=-1)
    at = torch.searchsorted(running, (u * running[:, -1])[:, None], right=True)[:, 0]
    last = (weights > 0).long().mul(torch.arange(1, weights.shape[1] + 1, device=weights.device)).amax(dim=-1) - 1
    return torch.minimum(at, last.clamp(min=0))  # rounding of u * total may step past the last token that has weight


def _draw_plain(scaled: Tensor, sampling: list[Sampling], u: Tensor) -> Tensor:
    return _invert(torch.softmax(scaled, dim=-1), u)


def keep_mask(ordered: Tensor, log_total: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Which tokens the filters leave.

    Args:
        ordered: [R, n] logits after temperature, descending; the first n of the vocabulary's.
        log_total: [R] log-sum-exp over the whole vocabulary.

    Returns:
        bool [R, n]; the first column is always True.
    """
    device = ordered.device
    n = ordered.shape[1]
    top_k = torch.tensor([min(s.top_k, n) if s.top_k else 0 for s in sampling], device=device)
    top_p = torch.tensor([s.top_p for s in sampling], device=device, dtype=torch.float64)
    min_p = torch.tensor([s.min_p for s in sampling], device=device, dtype=torch.float64)
    kth = ordered.gather(1, (top_k.clamp(min=1) - 1)[:, None])
    keep = (ordered >= kth) | (top_k == 0)[:, None]  # ties with the k-th stay, as in transformers
    # top-p works on the distribution that top-k left
    left = torch.where(top_k > 0, ordered.masked_fill(~keep, -torch.inf).logsumexp(dim=-1), log_total)
    probs = (ordered.double() - left[:, None]).exp().masked_fill(~keep, 0.0)  # float32 sums misplace the border of top_p near 1
    before = probs.cumsum(dim=-1) - probs
    keep &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    keep &= probs >= min_p[:, None] * probs[:, :1]
    keep[:, 0] = True
    return keep


def _draw_filtered(scaled: Tensor, sampling: list[Sampling], u: Tensor) -> Tensor:
    log_total = scaled.logsumexp(dim=-1)
    n_vocab = scaled.shape[1]
    need = max(s.top_k for s in sampling)
    n = n_vocab if scaled.device.type != "cpu" else min(n_vocab, max(CANDIDATES, need + 1))
    # Ties go to the lower id on both paths, so that a row's text does not depend on which one its batch mates asked for.
    order = scaled.topk(n, dim=-1).indices.sort(dim=-1).values
    ordered, inner = scaled.gather(1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(1, inner)
    keep = keep_mask(ordered, log_total, sampling)
    if n < n_vocab and bool(keep[:, -1].any()):  # a filter reaches past the candidates: look at everything
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        keep = keep_mask(ordered, log_total, sampling)
    weights = (ordered - ordered[:, :1]).exp().masked_fill(~keep, 0.0)
    return order.gather(1, _invert(weights, u)[:, None])[:, 0]


def _logprobs(logits: Tensor, ids: Tensor, wanted: list[int]) -> list[tuple[tuple[int, float], ...]]:
    normal = torch.log_softmax(logits, dim=-1)
    most, most_ids = normal.topk(min(max(wanted), logits.shape[1]), dim=-1)
    values = torch.cat([normal.gather(1, ids[:, None]), most], dim=1).tolist()
    token_ids = torch.cat([ids[:, None], most_ids], dim=1).tolist()
    return [tuple(zip(token_ids[b][: n + 1], values[b][: n + 1], strict=True)) if n else () for b, n in enumerate(wanted)]
