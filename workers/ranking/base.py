"""The ranker plug-in point: a query and documents in, every document once out, best first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from winnow.index.store import SegmentStore
from winnow.registry import Capabilities, Registry
from winnow.types import Document, RankedDocument, Ranking
from winnow.workers.model.loader import LoadedModel


@dataclass(frozen=True)
class RankContext:
    """What a ranker works with.

    Attributes:
        model: weights and tokenizer.
        store: keeps documents' KV between queries; rankers that cannot reuse it leave it alone.
        tenant: part of every cache key.
        on_progress: called with (documents done, documents) at least once a second of work.
        check_cancelled: raises Cancelled; called at least once a forward pass.
    """

    model: LoadedModel
    store: SegmentStore
    tenant: str = ""
    on_progress: Callable[[int, int], None] = lambda done, total: None
    check_cancelled: Callable[[], None] = lambda: None


class Ranker(ABC):
    """Subclasses are frozen dataclasses whose fields are parameters."""

    name: ClassVar[str] = ""
    caps: ClassVar[Capabilities]

    @abstractmethod
    def scores(self, query: str, documents: Sequence[Document], ctx: RankContext) -> list[tuple[float, bool]]:
        """(score, truncated) of each document, in the order given. Scores are finite."""

    def rank(self, query: str, documents: Sequence[Document], ctx: RankContext) -> Ranking:
        """Order documents by score, ties by input order."""
        scored = self.scores(query, documents, ctx)
        order = sorted(range(len(documents)), key=lambda i: -scored[i][0])  # sorted() is stable
        items = tuple(
            RankedDocument(documents[i].doc_id, scored[i][0], rank, scored[i][1]) for rank, i in enumerate(order, start=1)
        )
        return Ranking(items, self.name)


rankers: Registry[Ranker] = Registry(
    kind="ranker",
    entry_points="winnow.rankers",
    modules=("winnow.workers.ranking.likelihood", "winnow.workers.ranking.icr"),
)
