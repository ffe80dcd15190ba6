"""What a method keeps of earlier chunks' keys changes no plan, and saves the work of computing it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from method_matrix import seerattention
from selection import LAYER
from workloads import Shape, s7_mixture

from winnow.index.key_tiles import KeyTiles
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill import scoring
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods.dhsa import DHSA
from winnow.workers.prefill.methods.flashprefill import FlashPrefill
from winnow.workers.prefill.methods.flexprefill import FlexPrefill
from winnow.workers.prefill.methods.prism import Prism
from winnow.workers.prefill.methods.xattention import XAttention

pytestmark = pytest.mark.slow

N = 512


METHODS_WITH_STATE: dict[str, Callable[[], PrefillMethod]] = {
    "flashprefill": lambda: FlashPrefill(dense_tail=0, block=32, sink_tiles=1, window_tiles=1, alpha=0.5),
    "flashprefill, per KV head": lambda: FlashPrefill(
        dense_tail=0, block=32, sink_tiles=1, window_tiles=1, alpha=0.5, per_kv_head=True
    ),
    "flexprefill": lambda: FlexPrefill(gamma=0.7, tau=0.9, min_budget=32, block=32),
    "prism": lambda: Prism(threshold=0.7, block=32),
    "dhsa, mean keys": lambda: DHSA(mask="topk", block_q=32),
    "dhsa, sums of keys": lambda: DHSA(mask="vsb", block_q=32),
    "seerattention": lambda: seerattention({"density": 0.4}, range(4), range(2)),
}
CHUNKS = {
    "whole tiles": [(0, 128), (128, 256), (256, 384), (384, 512)],
    "a ragged end": [(0, 192), (192, 384), (384, 509)],
    "ragged chunks": [(0, 200), (200, 301), (301, 302), (302, 512)],
    "after a prefix of 300 from the cache": [(300, 400), (400, 512)],
    "with a chunk that ran dense": [(0, 128), (384, 512)],
}


def same(a: TilePlan | None, b: TilePlan | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.to_dense_mask(), b.to_dense_mask())


@pytest.mark.parametrize("slab_bytes", [1 << 30, 1], ids=["one slab", "a head a slab"])
@pytest.mark.parametrize("cut", CHUNKS)
@pytest.mark.parametrize("make", METHODS_WITH_STATE.values(), ids=METHODS_WITH_STATE)
def test_plans_are_the_same_with_and_without_state_chunk_by_chunk(
    make: Callable[[], PrefillMethod], cut: str, slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [s7_mixture(Shape(N, N), seed) for seed in (1, 2)]
    plain = make()
    mine, other = plain.for_prompt(), plain.for_prompt()
    sparse = 0
    for number, (start, end) in enumerate(CHUNKS[cut]):
        monkeypatch.setattr(scoring, "SLAB_BYTES", slab_bytes if number != 1 else 1 << 30)  # slabs may change on the way
        for idx, x in enumerate(layers):  # one layer in both: gates are there for one
            layer = replace(LAYER, idx=0)
            method = (mine, other)[idx]
            args = x.q[:, :, start:end], x.k[:, :, :end], layer
            found, expected = method.plan(*args), plain.plan(*args)
            assert same(found, expected)
            sparse += expected is not None and expected.density() < 1.0
    assert sparse >= 2, "nothing was chosen: the comparison says nothing"


def test_layers_do_not_share_what_they_know() -> None:
    x, y = (s7_mixture(Shape(N, N), seed) for seed in (3, 4))
    plain = METHODS_WITH_STATE["flashprefill"]()
    mine = plain.for_prompt()
    for end in (256, 512):
        for idx, z in enumerate((x, y)):
            args = z.q[:, :, end - 256 : end], z.k[:, :, :end], replace(LAYER, idx=idx)
            assert same(mine.plan(*args), plain.plan(*args))


def test_only_new_tiles_are_computed() -> None:
    seen: list[tuple[int, int]] = []

    def sums(keys: torch.Tensor, first: int) -> torch.Tensor:
        seen.append((first, keys.shape[2]))
        return scoring.pool_mean(keys, 32)

    k, tiles = torch.randn(1, 2, 500, 8), KeyTiles()
    for m in (100, 300, 300, 320, 320, 500):
        assert torch.equal(tiles.extended("a", k[:, :, :m], 32, sums), scoring.pool_mean(k[:, :, :m], 32))
    assert seen == [(0, 100), (96, 204), (288, 12), (288, 32), (320, 180)]
    assert torch.equal(tiles.extended("b", k, 32, sums), scoring.pool_mean(k, 32)) and seen[-1] == (0, 500)
    one = k[:, :1]
    assert torch.equal(tiles.extended("a", one, 32, sums), scoring.pool_mean(one, 32)) and seen[-1] == (0, 500)


def test_tiles_of_forgotten_tokens_are_forgotten() -> None:
    k, other, tiles = torch.randn(1, 2, 128, 8), torch.randn(1, 2, 128, 8), KeyTiles()
    tiles.extended("a", k, 32, lambda keys, _: scoring.pool_mean(keys, 32))
    for kept in (70, 0):  # two whole tiles, none
        tiles.truncate(kept)
        now = torch.cat((k[:, :, :kept], other[:, :, kept:]), 2)
        assert torch.equal(tiles.extended("a", now, 32, lambda keys, _: scoring.pool_mean(keys, 32)), scoring.pool_mean(now, 32))


def test_a_copy_for_a_prompt_is_the_same_method_with_a_memory_of_its_own() -> None:
    plain = FlashPrefill(dense_tail=0)
    one, two = plain.for_prompt(), plain.for_prompt()
    assert one == two == plain and one is not plain
    assert one._state is not None and one._state is not two._state and plain._state is None
    assert XAttention().for_prompt() == XAttention()
