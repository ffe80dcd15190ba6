"""Short strings that name an index: "flat", "ivf256", "hnsw32:ef=400", "auto"."""

from __future__ import annotations

import re
from pathlib import Path

from winnow.errors import InvalidRequest
from winnow.index.base import KeyIndex, indexes
from winnow.index.faiss_index import set_threads
from winnow.registry import parse_spec

__all__ = ["FLAT_BELOW_KEYS", "load_index", "make_index", "resolve", "set_threads"]

FLAT_BELOW_KEYS = 16384  # exact scoring is faster in wall time below this (measured, 26 against 95 us a head and query at 16K)


def resolve(spec: str, n_keys: int) -> str:
    """The spec that will be built: "auto" becomes "flat" below 16,384 keys, else "hnsw32"; others stay."""
    name, params = parse_spec(spec)
    if name != "auto":
        return spec
    if params:
        raise InvalidRequest("index auto takes no parameters; name the index you want")
    return "flat" if n_keys < FLAT_BELOW_KEYS else "hnsw32"


def make_index(spec: str, n_keys: int) -> KeyIndex:
    """An empty index.

    Args:
        spec: a name with its number, then parameters: `name[number][:key=value,...]`.
        n_keys: keys it is going to hold, for "auto".

    Raises:
        UnknownName: no such index; the message lists the known ones.
        InvalidRequest: a missing, superfluous or unfit number or parameter.
    """
    text, params = parse_spec(resolve(spec, n_keys))
    match = re.fullmatch(r"([A-Za-z]+(?:-[A-Za-z]+)*)(\S*)", text)
    if match is None:
        raise InvalidRequest(f"index spec {spec!r:.40}: expected a name and a number, e.g. hnsw32 (known: {_known()})")
    return indexes.get(match[1]).from_spec(match[2], params)


def _known() -> str:
    return ", ".join(["auto", *indexes.names()])


def load_index(name: str, path: Path) -> KeyIndex:
    """Read an index file of a known kind. Raises UnknownName, CorruptBlock."""
    return indexes.get(name).load(path)
