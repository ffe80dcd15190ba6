"""Reading many short texts at once: each document is a sequence of its own, packed with others into one forward pass.

A document's KV does not depend on its neighbours, so it is an ordinary prefix: it goes into the segment store under the
same keys as a prompt's and is there for the next query. BlockRank's documents are the same thing with a longer frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.errors import LeaseLost
from winnow.index.segment import KVSegment
from winnow.index.store import Lease
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.ranking.base import RankContext

BATCH_TOKENS = 2048  # tokens of one packed forward: bounds activations and the time until a cancellation is seen


@dataclass(frozen=True)
class Span:
    """`n_tokens` new tokens of one sequence, which follow the first `start` tokens of `segment`."""

    segment: KVSegment
    start: int
    n_tokens: int


class PackedBackend:
    """Causal attention of many sequences in one forward pass; every sequence reads its own segment and its own new tokens.

    Args:
        spans: the sequences, in the order of the packed tokens.
        keep: write the new K and V into the segments; otherwise they are gone after their layer.
    """

    def __init__(self, spans: Sequence[Span], *, keep: bool) -> None:
        self.spans, self.keep = spans, keep
        self._masks: dict[int, Tensor] = {}

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See AttentionBackend; T is the sum of the spans' lengths."""
        if not self.keep and not layer.softcap and len({span.n_tokens for span in self.spans}) == 1:
            return self._attend_equal(layer, q, k, v)
        out = torch.empty_like(q)
        row = 0
        for span in self.spans:
            rows = slice(row, row := row + span.n_tokens)
            keys, values = k[:, rows], v[:, rows]
            if self.keep:
                span.segment.write(layer.idx, span.start, keys, values)
            if span.start:
                keys = torch.cat([span.segment.k(layer.idx)[:, : span.start], keys], 1)
                values = torch.cat([span.segment.v(layer.idx)[:, : span.start], values], 1)
            part, _ = attend_plan(
                None, q[None, :, rows], keys[None], values[None], scale=layer.scale, softcap=layer.softcap, window=layer.window
            )
            out[:, rows] = part[0]
        return out

    def _attend_equal(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same number of new tokens for every document: one call over right-aligned, left-padded keys.

        A hundred short documents are three thousand attention calls a query otherwise, and those cost as much as the matrix
        products. Padding is masked, so a document's result does not depend on the others.
        """
        n, n_docs = self.spans[0].n_tokens, len(self.spans)
        width = max(span.start for span in self.spans)
        kv = torch.stack((k, v)).unflatten(2, (n_docs, n)).permute(2, 0, 1, 3, 4)  # [docs, 2, Hkv, n, D]
        padded = kv.new_zeros(n_docs, 2, layer.n_kv_heads, width + n, layer.head_size)
        padded[..., width:, :] = kv
        for i, span in enumerate(self.spans):
            padded[i, :, :, width - span.start : width] = span.segment.kv[layer.idx, :, :, : span.start]
        # The query heads of a group share their keys: as rows of one tall head they read them once, and nothing is repeated.
        group = layer.n_q_heads // layer.n_kv_heads
        rows = q.unflatten(1, (n_docs, n)).unflatten(0, (layer.n_kv_heads, group)).permute(2, 0, 1, 3, 4).flatten(2, 3)
        mask = self._mask(layer.window, q.device).repeat(1, 1, group, 1)
        keys, values = padded.unbind(1)  # [docs, Hkv, width + n, D]
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=layer.scale)  # [docs, Hkv, g n, D]
        return out.unflatten(2, (group, n)).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1, 2)

    def _mask(self, window: int, device: torch.device) -> Tensor:
        """[docs, 1, n, width + n] bool: not padding, not later, not before the window. The same for all layers of a window."""
        if window not in self._masks:
            n, width = self.spans[0].n_tokens, max(span.start for span in self.spans)
            key = torch.arange(width + n, device=device)
            row = torch.arange(width, width + n, device=device)[:, None]
            first = torch.tensor([width - span.start for span in self.spans], device=device)[:, None, None]
            seen = (key <= row) & (key >= first)
            self._masks[window] = (seen & (key > row - window) if window else seen)[:, None]
        return self._masks[window]


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> Iterator[range]:
    """Consecutive ranges of sequences whose lengths sum to at most `limit`; a longer one stands alone."""
    first, total = 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + length > limit:
            yield range(first, i)
            first, total = i, 0
        total += length
    if first < len(lengths):
        yield range(first, len(lengths))


def forward_packed(ctx: RankContext, spans: Sequence[Span], tokens: Sequence[Sequence[int]], *, keep: bool) -> Tensor:
    """Run the spans' tokens through the model (see PackedBackend). Returns hidden states [T, hidden]."""
    device = ctx.model.decoder.device
    flat = torch.tensor([t for one in tokens for t in one], dtype=torch.int64, device=device)
    positions = torch.cat([torch.arange(s.start, s.start + s.n_tokens, device=device) for s in spans])
    ctx.check_cancelled()
    return ctx.model.decoder.forward(flat, positions, PackedBackend(spans, keep=keep))


@contextmanager
def document_leases(ctx: RankContext, prefixes: Sequence[Sequence[int]]) -> Iterator[list[Lease]]:
    """Leases on the KV of each prefix, from the store where it is known and computed where it is not. They are read-only.

    Args:
        prefixes: token ids of each document with its frame; none empty.

    Raises:
        Overloaded: the store's budget cannot hold the prefixes at once.
    """
    leases: list[Lease] = []
    try:
        for prefix in prefixes:
            leases.append(ctx.store.acquire(prefix, 0, tenant=ctx.tenant))
        missing = [i for i, lease in enumerate(leases) if not lease.is_shared]
        for batch in batches([len(prefixes[i]) - leases[i].cached_tokens for i in missing]):
            chosen = [missing[j] for j in batch]
            rest = [prefixes[i][leases[i].cached_tokens :] for i in chosen]
            spans = [Span(leases[i].segment, leases[i].cached_tokens, len(r)) for i, r in zip(chosen, rest, strict=True)]
            kept = [(s, r) for s, r in zip(spans, rest, strict=True) if r]
            if kept:
                forward_packed(ctx, [s for s, _ in kept], [r for _, r in kept], keep=True)
            for i, r in zip(chosen, rest, strict=True):
                leases[i].segment.advance(r)
        for i in missing:
            ctx.store.publish(leases[i], is_given_away=False)  # a long list takes longer than one lease's time
        yield leases
    finally:
        for lease in leases:
            with suppress(LeaseLost):  # the store was closed; whatever ended the ranking is what its caller must see
                ctx.store.release(lease.handle)


def cut(ids: Sequence[int], limit: int) -> tuple[list[int], bool]:
    """The first `limit` tokens, and whether any were lost."""
    return list(ids[:limit]), len(ids) > limit
