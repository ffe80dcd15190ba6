"""ivf<nlist>: keys in lists around k-means centroids; a search scores the centroids and the lists of the best few."""

from __future__ import annotations

from typing import Any

import numpy as np

from winnow.errors import InvalidRequest
from winnow.index.base import Floats, Ids, indexes
from winnow.index.faiss_index import FaissIndex, faiss, number, take
from winnow.registry import Capabilities


@indexes.register("ivf")
class IvfIndex(FaissIndex):
    """Inverted lists over centred keys, inner product. Spec: "ivf256" or "ivf256:nprobe=32".

    Args:
        nlist: centroids, 1 to 65,536, at most the number of keys.
        nprobe: lists scored in a search; default nlist / 8, because decode queries lie off the keys' distribution and
            the keys a query wants are spread over many lists (16-28% of the keys for recall@100 of .90-.97 on real keys).

    Scanned per search: nlist centroids and the keys of the probed lists, counted exactly from the list sizes.
    Source: FAISS IndexIVFFlat; k-means seed fixed, so builds are reproducible.
    """

    caps = Capabilities(exact=False, fallback="flat", notes="inverted lists; scans nprobe/nlist of the keys")

    def __init__(self, nlist: int, nprobe: int) -> None:
        super().__init__()
        self.nlist, self.nprobe = nlist, nprobe
        self._sizes: Ids = np.zeros(0, np.int64)

    @classmethod
    def from_spec(cls, arg: str, params: dict[str, str]) -> IvfIndex:
        nlist = number("ivf", "nlist", arg, 1, 65536)
        take("ivf", params, ("nprobe",))
        nprobe = number("ivf", "nprobe", params["nprobe"], 1, nlist) if "nprobe" in params else max(1, nlist // 8)
        return cls(nlist, nprobe)

    def _make(self, n: int, d: int) -> Any:
        if n < self.nlist:
            raise InvalidRequest(f"index ivf{self.nlist}: needs at least {self.nlist} keys, got {n}; use fewer lists or flat")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, self.nlist, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 1234
        index.cp.min_points_per_centroid = 1  # FAISS would print a warning below 39
        return index

    def _restore(self) -> None:
        self._faiss.nprobe = self.nprobe
        self._sizes = np.array([self._faiss.get_list_size(i) for i in range(self.nlist)], np.int64)

    def _search(self, q: Floats, k: int) -> tuple[Ids, Floats, int]:
        near, lists = self._faiss.quantizer.search(q, self.nprobe)
        scores, ids = self._faiss.search_preassigned(q, k, lists, near)
        return ids, scores, len(q) * self.nlist + int(self._sizes[lists[lists >= 0]].sum())

    def _spec(self) -> tuple[str, dict[str, str]]:
        return str(self.nlist), {"nprobe": str(self.nprobe)}
