"""The first half of the demo: rank real documents, with BM25 beside it, and measure what the ranking is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from winnow.client import Client
from winnow.orchestration.demo.baseline import BM25, hit_at_1, mrr_at_10
from winnow.orchestration.demo.documents import QUESTIONS, KnownItem
from winnow.types import Document

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Ranked:
    """One query: who came first, for the ranker and for BM25, with seconds of wall time.

    Attributes:
        meant: id of the right document; "" = unknown, not among the documents.
        top, bm25_top: (document id, score) of the first five.
        place, bm25_place: rank of the right document from 1; 0 = there is none.
    """

    query: str
    meant: str
    method: str
    top: list[tuple[str, float]]
    place: int
    seconds: float
    bm25_top: list[tuple[str, float]]
    bm25_place: int
    bm25_seconds: float


@dataclass(frozen=True)
class Measured:
    """Known-item queries: first sentence -> the rest of the docstring."""

    n_queries: int
    n_documents: int
    method: str
    hit_at_1: float
    mrr_at_10: float
    seconds: float
    bm25_hit_at_1: float
    bm25_mrr_at_10: float
    bm25_seconds: float


@dataclass
class RankingPart:
    """Documents indexed for both rankers, and the client to ask."""

    client: Client
    items: Sequence[KnownItem]
    documents: list[Document] = field(init=False)
    bm25: BM25 = field(init=False)

    def __post_init__(self) -> None:
        self.documents = [item.document for item in self.items]
        self.bm25 = BM25(self.documents)

    def questions(self) -> list[tuple[str, str]]:
        """The plain-language queries with the id each one means, "" where it is not among the documents."""
        ids = {document.doc_id for document in self.documents}
        return [(query, meant if meant in ids else "") for query, meant in QUESTIONS]

    def ask(self, query: str, meant: str, on_progress: OnProgress) -> Ranked:
        """One query to both. The first one pays for reading the documents; later ones reuse their KV."""
        started = time.perf_counter()
        ranking = self.client.rank(query, self.documents, on_progress=lambda done, total: on_progress("rank", done, total))
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        other = self.bm25.rank(query)
        bm25_seconds = time.perf_counter() - started
        pairs = [(item.doc_id, item.score) for item in ranking.items]
        places = [[doc_id for doc_id, _ in ranked].index(meant) + 1 if meant else 0 for ranked in (pairs, other)]
        return Ranked(query, meant, ranking.method, pairs[:5], places[0], seconds, other[:5], places[1], bm25_seconds)

    def measure(self, n: int, on_progress: OnProgress) -> Measured:
        """hit@1 and MRR@10 of n known-item queries, 1 <= n, spread evenly over the documents."""
        n = min(n, len(self.items))
        chosen = [self.items[i * len(self.items) // n] for i in range(n)]
        ours: list[list[str]] = []
        method = ""
        started = time.perf_counter()
        for done, item in enumerate(chosen):
            on_progress("queries", done, n)
            ranking = self.client.rank(item.query, self.documents)
            method = ranking.method
            ours.append([entry.doc_id for entry in ranking.items])
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        theirs = [[doc_id for doc_id, _ in self.bm25.rank(item.query)] for item in chosen]
        bm25_seconds = time.perf_counter() - started
        right = [item.document.doc_id for item in chosen]
        return Measured(
            n_queries=n,
            n_documents=len(self.documents),
            method=method,
            hit_at_1=hit_at_1(ours, right),
            mrr_at_10=mrr_at_10(ours, right),
            seconds=seconds,
            bm25_hit_at_1=hit_at_1(theirs, right),
            bm25_mrr_at_10=mrr_at_10(theirs, right),
            bm25_seconds=bm25_seconds,
        )
