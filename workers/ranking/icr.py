"""ICR: documents are ranked by the attention that the query's tokens pay to them, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from winnow.errors import ContextTooLong, InvalidRequest
from winnow.index.store import Lease
from winnow.registry import Capabilities
from winnow.types import Document
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.ranking.base import RankContext, Ranker, rankers
from winnow.workers.ranking.documents import cut, document_leases


@rankers.register("icr")
@dataclass(frozen=True)
class InContextRanker(Ranker):
    """Score = attention from the query's tokens to the document's tokens, less the same for a query without content.

    Source: ICR (arXiv 2410.02642), calibration included; `first` and `last` choose layers as in Selective-ICR (2602.22591).
    Deviation: the prompt is read block by block, as BlockRank (2510.05396) reads it: every document sees the instruction and
    itself only and takes the same positions, and the query block sees everything. So documents' KV is reused across
    queries, the cost grows linearly with the documents, and their order does not matter.

    Attributes:
        instruction: text before every document.
        question: text before the query in the last block.
        empty_query: the query without content.
        first, last: share of the layers' depth whose attention counts, 0 <= first < last <= 1.
        max_document_tokens: longer documents are cut from their end and flagged; 0 = what fits the model.
    """

    caps: ClassVar[Capabilities] = Capabilities(
        exact=False, notes="attention of query to document tokens; wants a model larger than 1B"
    )
    instruction: str = "Here are some paragraphs:\n\n"
    question: str = "\n\nPlease find information that is relevant to the following query in the paragraphs above.\n\nQuery:"
    empty_query: str = " N/A"
    first: float = 0.0
    last: float = 1.0
    max_document_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.first < self.last <= 1.0:
            raise InvalidRequest(f"ranker icr: need 0 <= first < last <= 1, got first={self.first}, last={self.last}")
        if self.max_document_tokens < 0:
            raise InvalidRequest("ranker icr: max_document_tokens must be >= 0")

    def scores(self, query: str, documents: Sequence[Document], ctx: RankContext) -> list[tuple[float, bool]]:
        """See `Ranker.scores`. Two short forward passes over all documents' keys, whatever their number."""
        encode, context = ctx.model.tokenizer.encode, ctx.model.spec.max_context
        frame, question, asked, empty = (
            encode(t) for t in (self.instruction, self.question, " " + query.strip(), self.empty_query)
        )
        room = context - len(frame) - len(question) - len(asked)
        if room < 1:
            raise ContextTooLong(f"query: {len(asked)} tokens leave no room for a document in {context}; shorten the query")
        cuts = [cut(encode(d.text), min(room, self.max_document_tokens or room)) for d in documents]
        with torch.inference_mode(), document_leases(ctx, [frame + doc for doc, _ in cuts]) as leases:
            ctx.on_progress(0, len(documents))
            keys = _BlockKeys(leases, len(frame), [len(doc) for doc, _ in cuts])
            attention = self._read(question, asked, keys, ctx) - self._read(question, empty, keys, ctx)
        ctx.on_progress(len(documents), len(documents))
        totals = [_document_score(part) for part in attention.cpu().split(keys.lengths)]
        return [(total, was_cut) for total, (_, was_cut) in zip(totals, cuts, strict=True)]

    def _read(self, question: list[int], query: list[int], keys: _BlockKeys, ctx: RankContext) -> Tensor:
        """Attention of the query's tokens to each document token: mean over them, sum over heads and chosen layers. [M]."""
        decoder = ctx.model.decoder
        ctx.check_cancelled()
        layers = range(round(self.first * decoder.spec.n_layers), max(1, round(self.last * decoder.spec.n_layers)))
        tokens = torch.tensor(question + query, device=decoder.device)
        start = keys.n_frame + max(keys.lengths)  # after the longest document: every document ends before the question
        backend = _QuestionBackend(keys, len(query), layers)
        decoder.forward(
            tokens, torch.arange(start, start + tokens.numel(), device=decoder.device), backend, n_layers=layers[-1] + 1
        )
        assert backend.scores is not None
        return backend.scores


class _BlockKeys:
    """The K and V that the last block reads: the frame once, then every document's own tokens."""

    def __init__(self, leases: Sequence[Lease], n_frame: int, lengths: list[int]) -> None:
        self.leases, self.n_frame, self.lengths = leases, n_frame, lengths

    def of_layer(self, idx: int) -> tuple[Tensor, Tensor]:
        """[Hkv, n_frame + sum(lengths), D] each."""
        first = self.leases[0].segment
        keys, values = [first.k(idx)[:, : self.n_frame]], [first.v(idx)[:, : self.n_frame]]
        for lease, length in zip(self.leases, self.lengths, strict=True):
            own = slice(self.n_frame, self.n_frame + length)
            keys.append(lease.segment.k(idx)[:, own])
            values.append(lease.segment.v(idx)[:, own])
        return torch.cat(keys, 1), torch.cat(values, 1)


class _QuestionBackend:
    """The last block's attention over all documents, with the probabilities of its last n_query rows summed up."""

    def __init__(self, keys: _BlockKeys, n_query: int, layers: range) -> None:
        self.keys, self.n_query, self.layers = keys, n_query, layers
        self.scores: Tensor | None = None

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See AttentionBackend. A layer's window is not applied: positions of different documents overlap."""
        block_k, block_v = self.keys.of_layer(layer.idx)
        all_k, all_v = torch.cat([block_k, k], 1), torch.cat([block_v, v], 1)
        out, lse = attend_plan(None, q[None], all_k[None], all_v[None], scale=layer.scale, softcap=layer.softcap)
        if layer.idx in self.layers:
            group = layer.n_q_heads // layer.n_kv_heads
            rows = q[:, -self.n_query :].float().unflatten(0, (layer.n_kv_heads, group))  # [Hkv, g, T, D]
            logits = rows @ block_k[:, None, self.keys.n_frame :].float().transpose(-1, -2) * layer.scale
            if layer.softcap:
                logits = layer.softcap * torch.tanh(logits / layer.softcap)
            probs = (logits.flatten(0, 1) - lse[0, :, -self.n_query :, None]).exp()  # [Hq, T, M]
            total = probs.mean(1).sum(0)
            self.scores = total if self.scores is None else self.scores + total
        return out[0]


def _document_score(tokens: Tensor) -> float:
    """Sum of a document's calibrated token scores [n] without outliers below mean - 2 std; an empty document has 0."""
    if tokens.numel() == 0:
        return 0.0
    floor = tokens.mean() - 2 * tokens.std(correction=0)
    return float(tokens[tokens >= floor].sum())
