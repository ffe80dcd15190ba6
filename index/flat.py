"""flat: every key is scored. The ground truth for all other indexes, and the fastest below about 16K keys."""

from __future__ import annotations

from typing import Any

from winnow.errors import InvalidRequest
from winnow.index.base import Floats, Ids, indexes
from winnow.index.faiss_index import FaissIndex, faiss, take
from winnow.registry import Capabilities


@indexes.register("flat")
class FlatIndex(FaissIndex):
    """Exact inner products. Scanned per search: all keys. Memory: 4 D bytes a key. Source: FAISS IndexFlatIP."""

    caps = Capabilities(exact=True, notes="exact; every key is scored")

    @classmethod
    def from_spec(cls, arg: str, params: dict[str, str]) -> FlatIndex:
        """Spec: "flat"."""
        if arg:
            raise InvalidRequest(f"index flat takes no number, got {arg!r:.20}")
        take("flat", params, ())
        return cls()

    def _make(self, n: int, d: int) -> Any:
        return faiss.IndexFlatIP(d)

    def _search(self, q: Floats, k: int) -> tuple[Ids, Floats, int]:
        scores, ids = self._faiss.search(q, k)
        return ids, scores, len(q) * int(self._faiss.ntotal)

    def _spec(self) -> tuple[str, dict[str, str]]:
        return "", {}
