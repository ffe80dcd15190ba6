"""The index plug-in point: top-k keys by inner product, behind one interface and short spec strings as in FAISS."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from winnow.registry import Capabilities, Registry

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass
class IndexStats:
    """Work done since the index was built: searches and keys whose score was computed."""

    n_searches: int = 0
    keys_scanned: int = 0


class KeyIndex(ABC):
    """Searches the keys of one KV head of one layer by inner product. One writer, many readers.

    Keys are centred (their mean is subtracted) before they enter any index: this adds a constant per query to every
    score, so it changes neither ranking nor softmax, and approximate indexes find far more (see docs/facts).
    """

    name: ClassVar[str] = ""
    caps: ClassVar[Capabilities]
    stats: IndexStats

    @classmethod
    @abstractmethod
    def from_spec(cls, arg: str, params: dict[str, str]) -> KeyIndex:
        """An empty index. `arg` is what follows the name in the spec: "32" in "hnsw32"."""

    @abstractmethod
    def build(self, keys: Floats, queries_sample: Floats | None = None) -> None:
        """Index keys [n, D]. `queries_sample` [m, D] are real prefill queries, for indexes that train on them."""

    @abstractmethod
    def search(self, q: Floats, k: int) -> tuple[Ids, Floats]:
        """The k best keys of each query.

        Args:
            q: [nq, D].
            k: 1 <= k; more than the index holds is cut to that.

        Returns:
            ids [nq, k], best first, -1 where fewer were found; scores [nq, k] q.key (not centred), -inf for id -1.
        """

    @abstractmethod
    def append(self, keys: Floats) -> None:
        """Add keys [n, D]; their ids continue. They are searched exactly until the index is rebuilt."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write to one file with a format version."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> KeyIndex:
        """Read what `save` wrote. Raises CorruptBlock for damaged bytes or an unknown version."""

    @property
    @abstractmethod
    def n_keys(self) -> int: ...


indexes: Registry[KeyIndex] = Registry(
    kind="index",
    entry_points="winnow.indexes",
    modules=("winnow.index.flat", "winnow.index.ivf", "winnow.index.hnsw"),
)
