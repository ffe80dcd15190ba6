"""Query likelihood: how probable is the query as a continuation of the document?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from winnow.errors import ContextTooLong, InvalidRequest
from winnow.registry import Capabilities
from winnow.types import Document
from winnow.workers.ranking.base import RankContext, Ranker, rankers
from winnow.workers.ranking.documents import Span, batches, cut, document_leases, forward_packed


@rankers.register("likelihood")
@dataclass(frozen=True)
class QueryLikelihood(Ranker):
    """Score = mean over the query's tokens of log P(token | document, bridge, earlier query tokens), natural log.

    Source: the query-likelihood model of retrieval (Ponte and Croft 1998) with a language model as in UPR (arXiv 2204.07496).
    The document and the bridge are a prefix whose KV the store keeps, so a second query costs its own tokens only. All
    documents' query tokens run packed in one forward pass.

    Attributes:
        bridge: text between document and query; says what kind of text the query is.
        max_document_tokens: longer documents are cut from their end and flagged; 0 = what fits the model.
        wave_documents: documents whose KV is held at once.
    """

    caps: ClassVar[Capabilities] = Capabilities(
        exact=True, notes="log P(query | document); documents' KV is reused across queries"
    )
    bridge: str = "\n\nIn one sentence, this does the following:"
    max_document_tokens: int = 0
    wave_documents: int = 64

    def __post_init__(self) -> None:
        if self.max_document_tokens < 0 or self.wave_documents < 1:
            raise InvalidRequest("ranker likelihood: max_document_tokens must be >= 0 and wave_documents >= 1")
        if not self.bridge:
            raise InvalidRequest("ranker likelihood: bridge must not be empty, since its last token predicts the query's first")

    def scores(self, query: str, documents: Sequence[Document], ctx: RankContext) -> list[tuple[float, bool]]:
        """See `Ranker.scores`. Scores of different queries are comparable only per token; documents' lengths do not matter."""
        tokenizer, context = ctx.model.tokenizer, ctx.model.spec.max_context
        bridge = tokenizer.encode(self.bridge)
        ids = tokenizer.encode(" " + query.strip())
        room = context - len(bridge) - len(ids)
        if room < 1:
            raise ContextTooLong(f"query: {len(ids)} tokens leave no room for a document in {context}; shorten the query")
        limit = min(room, self.max_document_tokens or room)
        cuts = [cut(tokenizer.encode(d.text), limit) for d in documents]
        prefixes = [doc + bridge for doc, _ in cuts]
        scores: list[float] = []
        for first in range(0, len(prefixes), self.wave_documents):
            scores += self._wave(prefixes[first : first + self.wave_documents], ids, ctx)
            ctx.on_progress(len(scores), len(documents))
        return [(score, was_cut) for score, (_, was_cut) in zip(scores, cuts, strict=True)]

    def _wave(self, prefixes: Sequence[Sequence[int]], query: list[int], ctx: RankContext) -> list[float]:
        # The bridge's last token predicts the query's first one, so it is fed again in front of the query.
        heads = [p[:-1] for p in prefixes]
        with torch.inference_mode(), document_leases(ctx, heads) as leases:
            scores: list[float] = []
            for batch in batches([len(query)] * len(prefixes)):
                spans = [Span(leases[i].segment, len(heads[i]), len(query)) for i in batch]
                hidden = forward_packed(ctx, spans, [[prefixes[i][-1], *query[:-1]] for i in batch], keep=False)
                scores += self._mean_logprobs(hidden, query, ctx)
            return scores

    def _mean_logprobs(self, hidden: torch.Tensor, query: list[int], ctx: RankContext) -> list[float]:
        """hidden [n * len(query), hidden] -> n means. A few documents at a time: logits are [rows, vocabulary] float32."""
        target = torch.tensor(query, device=hidden.device)
        scores: list[float] = []
        rows = max(1, 256 // len(query)) * len(query)
        for part in hidden.split(rows):
            logits = ctx.model.decoder.logits(part).view(-1, len(query), ctx.model.spec.vocab_size)
            picked = logits.gather(-1, target.expand(logits.shape[0], -1)[..., None])[..., 0] - logits.logsumexp(-1)
            scores += picked.mean(-1).tolist()
        return scores
