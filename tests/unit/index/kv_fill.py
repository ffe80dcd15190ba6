"""KV whose every value says which tokens it was computed from, so that a wrong reuse shows in the numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import xxhash

from winnow.index.layout import SegmentLayout
from winnow.index.segment import KVSegment

# What KV depends on besides the tokens up to its own: one text, or (end, text) for the tokens before each end; the last one holds
# for the rest.
Salt = str | tuple[tuple[int, str], ...]

TINY = SegmentLayout(n_layers=2, n_kv_heads=2, head_size=16, dtype="fp32")


def rows(layout: SegmentLayout, tokens: Sequence[int], salt: Salt = "") -> torch.Tensor:
    """[L, 2, Hkv, n, D]: row i depends on tokens 0..i and on salt, and differs by layer, K or V, and head. Not to be written."""
    return _rows(layout, tuple(tokens), salt)


@functools.lru_cache(512)
def _rows(layout: SegmentLayout, tokens: tuple[int, ...], salt: Salt) -> torch.Tensor:
    h, seeds = xxhash.xxh3_64(), []
    pieces = ((len(tokens), salt),) if isinstance(salt, str) else salt
    for i, token in enumerate(tokens):
        h.update(token.to_bytes(4, "little"))
        own = next((text for end, text in pieces if i < end), pieces[-1][1])
        seeds.append(xxhash.xxh3_64_intdigest(h.digest() + own.encode()) % 9973)
    base = torch.tensor(seeds, dtype=torch.float32).view(1, 1, 1, -1, 1)
    places = layout.n_layers * 2 * layout.n_kv_heads
    place = torch.arange(places, dtype=torch.float32).view(layout.n_layers, 2, layout.n_kv_heads, 1, 1) / 64
    column = torch.arange(layout.head_size, dtype=torch.float32) / 4096
    return (base + place + column).to(layout.torch_dtype)


def fill(segment: KVSegment, tokens: Sequence[int], salt: Salt = "") -> None:
    """Write and make valid what the segment does not hold yet of `tokens`."""
    start = segment.n_total
    kv = rows(segment.layout, tokens, salt)
    for layer in range(segment.layout.n_layers):
        segment.write(layer, start, kv[layer, 0, :, start:], kv[layer, 1, :, start:])
    segment.advance(list(tokens[start:]))


def assert_holds(segment: KVSegment, tokens: Sequence[int], salt: Salt = "") -> None:
    """The first len(tokens) tokens of the segment are these, with the KV `rows` gives."""
    n = len(tokens)
    assert segment.token_ids[:n].tolist() == list(tokens)
    assert torch.equal(segment.kv[:, :, :, :n], rows(segment.layout, tokens, salt))
