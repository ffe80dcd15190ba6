"""hnsw<M>: a navigable graph over the keys, built by key-key similarity."""

from __future__ import annotations

import threading
from typing import Any

from winnow.index.base import Floats, Ids, indexes
from winnow.index.faiss_index import FaissIndex, faiss, number, take
from winnow.registry import Capabilities

_meter_lock = threading.Lock()
_in_flight = 0
_overlaps = 0


@indexes.register("hnsw")
class HnswIndex(FaissIndex):
    """Graph search over centred keys, inner product. Spec: "hnsw32" or "hnsw32:ef=200,efc=80".

    Args:
        m: links of a node on upper levels, 2 to 128; twice as many on level 0.
        ef: length of the search queue, at least the k asked for; default 200.
        efc: length of the queue while building; default 80.

    Scanned per search: FAISS counts distances in one counter of the process. It is read around a search that ran alone;
    where searches overlapped, this index's own mean of the measured ones is used instead of locking them apart.
    Memory: 4 D + 8 M bytes a key. Source: FAISS IndexHNSWFlat; centring as described in `faiss_index`.
    """

    caps = Capabilities(exact=False, fallback="flat", notes="graph; scans a few percent of the keys above 16K")

    def __init__(self, m: int, ef: int, efc: int) -> None:
        super().__init__()
        self.m, self.ef, self.efc = m, ef, efc
        self._measured, self._measured_queries = 0, 0

    @classmethod
    def from_spec(cls, arg: str, params: dict[str, str]) -> HnswIndex:
        m = number("hnsw", "M", arg, 2, 128)
        take("hnsw", params, ("ef", "efc"))
        ef = number("hnsw", "ef", params.get("ef", "200"), 1, 1 << 20)
        return cls(m, ef, number("hnsw", "efc", params.get("efc", "80"), 1, 1 << 20))

    def _make(self, n: int, d: int) -> Any:
        index = faiss.IndexHNSWFlat(d, self.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.efc
        return index

    def _search(self, q: Floats, k: int) -> tuple[Ids, Floats, int]:
        global _in_flight, _overlaps
        params = faiss.SearchParametersHNSW(efSearch=max(self.ef, k))
        with _meter_lock:
            alone, before, overlaps = _in_flight == 0, int(faiss.cvar.hnsw_stats.ndis), _overlaps
            _overlaps += not alone
            _in_flight += 1
        try:
            scores, ids = self._faiss.search(q, k, params=params)
        finally:
            with _meter_lock:
                _in_flight -= 1
                counted = int(faiss.cvar.hnsw_stats.ndis) - before
                alone = alone and _overlaps == overlaps
                if alone:
                    self._measured += counted
                    self._measured_queries += len(q)
        if not alone:
            mean = self._measured / self._measured_queries if self._measured_queries else self.ef * self.m
            counted = round(mean * len(q))
        return ids, scores, counted

    def _spec(self) -> tuple[str, dict[str, str]]:
        return str(self.m), {"ef": str(self.ef), "efc": str(self.efc)}
