"""Which cached entry a prompt can start from: chained block hashes, keyed by tenant, model, layout and method."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


def _hash(before: bytes, tokens: Tokens) -> bytes:
    h = xxhash.xxh3_128(before)
    h.update(tokens.data)
    return h.digest()


@dataclass(frozen=True)
class ReuseKey:
    """What besides the tokens decides whether KV may be reused.

    Attributes:
        method: "" = an exact one, for which tenant alone counts.
        context_tokens, chunk_tokens, is_apart: see `SegmentStore.acquire`.
    """

    tenant: str
    method: str = ""
    context_tokens: int = 0
    chunk_tokens: int = 0
    is_apart: bool = True

    @classmethod
    def of(cls, tenant: str, method: str, context_tokens: int, chunk_tokens: int, is_apart: bool) -> ReuseKey:
        return cls(tenant, method, context_tokens, chunk_tokens, is_apart) if method else cls(tenant)


class PrefixIndex:
    """Maps prefixes to entries. Not thread-safe: the store's lock guards it.

    A sequence of an exact method is found by any whole number of its blocks, or as a whole whatever its length. One of another
    method is found by any whole number of the chunks of its context, by its exact context where that was computed apart from
    what follows it, or by its exact whole.
    """

    def __init__(self, model_fingerprint: str, kv_layout: str, block_tokens: int) -> None:
        self._model = model_fingerprint
        self._layout = kv_layout
        self._block_tokens = block_tokens
        self._at_block: dict[bytes, dict[Hashable, None]] = {}
        self._exact: dict[bytes, dict[Hashable, int]] = {}
        self._odd_lengths: dict[bytes, dict[int, int]] = {}  # chained hash -> length of the rest -> entries that end so

    def _root(self, key: ReuseKey) -> bytes:
        # Every field is preceded by its length: "a" + "bc" and "ab" + "c" are different keys.
        text = "".join(
            f"{len(part)}:{part}" for part in (key.tenant, self._model, self._layout, key.method, str(key.chunk_tokens))
        )
        return xxhash.xxh3_128_digest(text.encode())

    def _chain(self, tokens: Tokens, root: bytes, size: int = 0) -> list[bytes]:
        """Hash after 0, 1, 2 … whole blocks, or pieces of `size` tokens."""
        chain, size = [root], size or self._block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            chain.append(_hash(chain[-1], tokens[start : start + size]))
        return chain

    def _whole(self, chain: list[bytes], tokens: Tokens) -> bytes:
        return _hash(b"end" + chain[-1], tokens[(len(chain) - 1) * self._block_tokens :])

    def add(self, entry: Hashable, tokens: Tokens, key: ReuseKey) -> None:
        """Make an entry findable."""
        root = self._root(key)
        if key.method:
            for n, at in self._method_hashes(root, tokens, key):
                self._exact.setdefault(at, {})[entry] = n
            for at in self._chunks(root, tokens, key)[1:]:
                self._at_block.setdefault(at, {})[entry] = None
            return
        chain = self._chain(tokens, root)
        for at in chain[1:]:
            self._at_block.setdefault(at, {})[entry] = None
        rest = len(tokens) % self._block_tokens
        self._exact.setdefault(self._whole(chain, tokens), {})[entry] = len(tokens)
        if rest:
            lengths = self._odd_lengths.setdefault(chain[-1], {})
            lengths[rest] = lengths.get(rest, 0) + 1

    def remove(self, entry: Hashable, tokens: Tokens, key: ReuseKey) -> None:
        """Undo `add` with the same arguments."""
        root = self._root(key)
        if key.method:
            for _, at in self._method_hashes(root, tokens, key):
                _drop(self._exact, at, entry)
            for at in self._chunks(root, tokens, key)[1:]:
                _drop(self._at_block, at, entry)
            return
        chain = self._chain(tokens, root)
        for at in chain[1:]:
            _drop(self._at_block, at, entry)
        _drop(self._exact, self._whole(chain, tokens), entry)
        rest = len(tokens) % self._block_tokens
        if rest:
            lengths = self._odd_lengths[chain[-1]]
            lengths[rest] -= 1
            if not lengths[rest]:
                del lengths[rest]
            if not lengths:
                del self._odd_lengths[chain[-1]]

    def find(self, tokens: Tokens, key: ReuseKey) -> tuple[Hashable, int] | None:
        """The entry that shares the most leading tokens, and how many; None where there is none. Latest entry on ties."""
        root = self._root(key)
        if key.method:
            for n, found in reversed(self._method_hashes(root, tokens, key)):
                if found in self._exact:
                    return next(reversed(self._exact[found])), n
            chunks = self._chunks(root, tokens, key)
            for i in range(len(chunks) - 1, 0, -1):
                if chunks[i] in self._at_block:
                    return next(reversed(self._at_block[chunks[i]])), i * key.chunk_tokens
            return None
        chain = self._chain(tokens, root)
        for b in range(len(chain) - 1, -1, -1):
            at = b * self._block_tokens
            for rest in sorted(self._odd_lengths.get(chain[b], ()), reverse=True):
                end = _hash(b"end" + chain[b], tokens[at : at + rest])
                if at + rest <= len(tokens) and end in self._exact:
                    return next(reversed(self._exact[end])), at + rest
            if b and chain[b] in self._at_block:
                return next(reversed(self._at_block[chain[b]])), at
        return None

    def find_whole(self, tokens: Tokens, key: ReuseKey) -> Hashable | None:
        """An entry of exactly these tokens (in the same chunks, if a method made it), or None."""
        root = self._root(key)
        chain = [] if key.method else self._chain(tokens, root)
        found = self._exact.get(self._whole(chain, tokens) if chain else self._method_hashes(root, tokens, key)[-1][1])
        return next(reversed(found)) if found else None

    def _method_hashes(self, root: bytes, tokens: Tokens, key: ReuseKey) -> list[tuple[int, bytes]]:
        """The context (or, without one, the whole as its own context), if apart; then the whole under that context."""
        n = key.context_tokens or len(tokens)
        context = (n, _hash(b"context" + root, tokens[:n]))
        if n == len(tokens):
            return [context]
        kind = b"whole" if key.is_apart else b"joined"
        whole = (len(tokens), _hash(b"%b %d" % (kind, n) + root, tokens))
        return [context, whole] if key.is_apart else [whole]

    def _chunks(self, root: bytes, tokens: Tokens, key: ReuseKey) -> list[bytes]:
        """The root, then the hash after each whole chunk of the context (the whole, without one); chunks of 0 tokens = none."""
        if not key.chunk_tokens:
            return [root]
        return self._chain(tokens[: key.context_tokens or len(tokens)], root, key.chunk_tokens)

    def entries(self) -> set[Hashable]:
        """Every entry that can be found; for `check`."""
        return {entry for table in (self._at_block, self._exact) for found in table.values() for entry in found}


def _drop(table: dict[bytes, dict[Hashable, None]] | dict[bytes, dict[Hashable, int]], key: bytes, entry: Hashable) -> None:
    found = table[key]
    del found[entry]
    if not found:
        del table[key]
