"""BM25, the control beside the ranker, and the two measures of a known-item test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from winnow.errors import Unsupported
from winnow.types import Document


class BM25:
    """Lucene's BM25 (k1 1.5, b 0.75) with English stop words and stemming, by bm25s.

    Raises:
        Unsupported: the demo extra is not installed.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise Unsupported(f"BM25 needs the demo extra ({error}): pip install 'winnow-llm[demo]'") from None
        self._tokenize: Any = bm25s.tokenize
        self._stemmer: Any = Stemmer.Stemmer("english")
        self._ids = [document.doc_id for document in documents]
        self._index: Any = bm25s.BM25(k1=1.5, b=0.75)
        self._index.index(self._tokens([document.text for document in documents]), show_progress=False)

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)

    def rank(self, query: str) -> list[tuple[str, float]]:
        """(document id, score) of every document, best first."""
        order, scores = self._index.retrieve(self._tokens([query]), k=len(self._ids), show_progress=False)
        return [(self._ids[int(i)], float(score)) for i, score in zip(order[0], scores[0], strict=True)]


def hit_at_1(ranked: Sequence[Sequence[str]], right: Sequence[str]) -> float:
    """Share of queries whose first document is the right one."""
    return sum(ids[0] == wanted for ids, wanted in zip(ranked, right, strict=True)) / len(right)


def mrr_at_10(ranked: Sequence[Sequence[str]], right: Sequence[str]) -> float:
    """Mean of 1 / rank of the right document, 0 where it is not among the first ten."""
    total = 0.0
    for ids, wanted in zip(ranked, right, strict=True):
        top = list(ids[:10])
        total += 1.0 / (top.index(wanted) + 1) if wanted in top else 0.0
    return total / len(right)
