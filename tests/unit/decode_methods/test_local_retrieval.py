"""SegmentIndex: attention over what an index finds, against plain softmax over the same keys."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from winnow.errors import Cancelled, InvalidRequest, UnknownName, WorkerLost
from winnow.index.folder import make_private
from winnow.index.segment import KVSegment, SegmentLayout
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.decode.local_retrieval import LocalRetrieval, SegmentIndex

L, HQ, HKV, D = 2, 6, 2, 32
SINK, RECENT = 7, 20


def layer_spec(idx: int = 0, softcap: float = 0.0, window: int = 0) -> LayerSpec:
    return LayerSpec(idx, HQ, HKV, D, scale=D**-0.5, softcap=softcap, window=window)


def make_segment(n: int, dtype: str = "fp32", dir: Path | None = None, tail: int = 8) -> KVSegment:
    generator = torch.Generator().manual_seed(n)
    segment = KVSegment.create(SegmentLayout(L, HKV, D, dtype), n + tail, dir=dir)
    for layer in range(L):
        k, v = (torch.randn(HKV, n, D, generator=generator) for _ in range(2))
        segment.write(layer, 0, k + 1.0, v)
    segment.advance(list(range(n)))
    segment.seal()
    return segment


def query(seed: int = 0) -> torch.Tensor:
    return torch.randn(HQ, D, generator=torch.Generator().manual_seed(seed)) * 2


def expected(segment: KVSegment, spec: LayerSpec, q: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in float64 over the k best keys of each head between sink and recent."""
    end = segment.n_tokens - RECENT
    keys, values = segment.k(spec.idx)[:, SINK:end].double(), segment.v(spec.idx)[:, SINK:end].double()
    outs, lses = [], []
    for head in range(HQ):
        raw = keys[head // (HQ // HKV)] @ q[head].double()
        best = raw.topk(min(k, len(raw))).indices
        z = raw[best] * spec.scale
        if spec.softcap:
            z = spec.softcap * torch.tanh(z / spec.softcap)
        outs.append(torch.softmax(z, 0) @ values[head // (HQ // HKV)][best])
        lses.append(torch.logsumexp(z, 0))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 10, 273, 10_000])
def test_flat_equals_softmax_over_the_best_keys(dtype: str, softcap: float, top_k: int) -> None:
    segment = make_segment(300, dtype)
    index = SegmentIndex(segment, "flat", SINK, RECENT)
    assert (index.n_keys, index.spec) == (273, "flat")
    for layer in range(L):
        spec = layer_spec(layer, softcap)
        part = index.attend(spec, query(), top_k)
        out, lse = expected(segment, spec, query(), top_k)
        torch.testing.assert_close(part.out.double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.lse.double(), lse, rtol=1e-5, atol=1e-5)
        assert (part.out.dtype, part.lse.dtype) == (torch.float32, torch.float32)
        assert (part.keys_read, part.keys_scanned) == (HQ * min(top_k, 273), HQ * 273)


@pytest.mark.parametrize("spec_text", ["ivf8:nprobe=8", "hnsw16:ef=273"])
def test_exhaustive_indexes_equal_flat(spec_text: str) -> None:
    segment = make_segment(300)
    flat = SegmentIndex(segment, "flat", SINK, RECENT).attend(layer_spec(1), query(), 20)
    part = SegmentIndex(segment, spec_text, SINK, RECENT, threads=2).attend(layer_spec(1), query(), 20)
    torch.testing.assert_close(part.out, flat.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.lse, flat.lse, rtol=1e-4, atol=1e-4)
    assert part.keys_read == HQ * 20
    assert part.keys_scanned > 0


def test_an_index_that_finds_too_few_leaves_the_rest_out() -> None:
    part = SegmentIndex(make_segment(300), "ivf64:nprobe=1", SINK, RECENT).attend(layer_spec(), query(), 100)
    assert 0 < part.keys_read < HQ * 100
    assert part.out.isfinite().all() and part.lse.isfinite().all()


@pytest.mark.parametrize("n", [0, 1, SINK, SINK + RECENT - 1, SINK + RECENT])
def test_nothing_between_sink_and_recent_gives_an_empty_part(n: int) -> None:
    part = SegmentIndex(make_segment(n), "hnsw32", SINK, RECENT).attend(layer_spec(), query(), 5)
    assert part.out.tolist() == [[0.0] * D] * HQ
    assert part.lse.tolist() == [-torch.inf] * HQ
    assert (part.keys_read, part.keys_scanned) == (0, 0)


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_huge_logits_stay_finite(factor: float) -> None:
    part = SegmentIndex(make_segment(100), "flat", SINK, RECENT).attend(layer_spec(), query() * factor, 10)
    assert part.out.isfinite().all() and part.lse.isfinite().all()


def test_the_index_outlives_the_file_and_the_segment_object(tmp_path: Path) -> None:
    segment = make_segment(200, "bf16", make_private(tmp_path / "kv"))
    reader = KVSegment.open(tmp_path / "kv", segment.location, writable=False)
    index = SegmentIndex(reader, "flat", SINK, RECENT)
    before = index.attend(layer_spec(), query(), 10)
    segment.unlink()
    reader.close()
    segment.close()
    assert torch.equal(index.attend(layer_spec(), query(), 10).out, before.out)


@pytest.mark.parametrize("spec_text", ["flat", "ivf4"])
def test_progress_ends_at_all_heads_and_cancel_stops_the_build(spec_text: str) -> None:
    seen: list[tuple[int, int]] = []
    SegmentIndex(make_segment(100), spec_text, SINK, RECENT, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (L * HKV, L * HKV)
    assert seen == sorted(seen)
    with pytest.raises(Cancelled):
        SegmentIndex(make_segment(100), spec_text, SINK, RECENT, is_cancelled=lambda: True)


def test_only_the_layers_asked_for_are_indexed() -> None:
    index = SegmentIndex(make_segment(100), "flat", SINK, RECENT, layers=[1])
    index.attend(layer_spec(1), query(), 3)
    with pytest.raises(InvalidRequest, match="layer 0 was not indexed"):
        index.attend(layer_spec(0), query(), 3)


def test_what_cannot_be_built_or_asked_is_refused() -> None:
    segment = make_segment(100)
    with pytest.raises(UnknownName):
        SegmentIndex(segment, "nope", SINK, RECENT)
    with pytest.raises(InvalidRequest, match="at least 256 keys"):
        SegmentIndex(segment, "ivf256", SINK, RECENT)
    with pytest.raises(InvalidRequest, match="sink_tokens"):
        SegmentIndex(segment, "flat", -1, RECENT)
    index = SegmentIndex(segment, "flat", SINK, RECENT)
    with pytest.raises(InvalidRequest, match="top_k"):
        index.attend(layer_spec(), query(), 0)
    with pytest.raises(InvalidRequest, match="shape"):
        index.attend(layer_spec(), query()[:, :3], 1)


@pytest.mark.parametrize("with_pool", [False, True])
def test_a_local_session_answers_each_layer_once_and_is_lost_when_closed(with_pool: bool) -> None:
    index = SegmentIndex(make_segment(100), "flat", SINK, RECENT)
    with ThreadPoolExecutor(1) as pool:
        session = LocalRetrieval(index, pool if with_pool else None)
        assert (session.sink_tokens, session.recent_tokens) == (SINK, RECENT)
        for layer in range(L):
            session.submit(layer_spec(layer), query(layer), 5)
        for layer in range(L):
            assert torch.equal(session.collect(layer_spec(layer)).out, index.attend(layer_spec(layer), query(layer), 5).out)
        session.close()
        session.close()
        with pytest.raises(WorkerLost):
            session.submit(layer_spec(), query(), 5)
        with pytest.raises(WorkerLost):
            session.collect(layer_spec())


def test_a_pool_searches_while_the_caller_works() -> None:
    index = SegmentIndex(make_segment(100), "flat", SINK, RECENT)
    searched = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        session = LocalRetrieval(index, pool)
        session.submit(layer_spec(), query(), 5)
        pool.submit(searched.set)  # runs after the search, in the pool's only thread
        assert searched.wait(30), "the search ran before anybody collected it"
        session.collect(layer_spec())
