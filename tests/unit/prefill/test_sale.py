"""SALE against its definition, written out in float64, and against what its authors say 4-bit scores can and cannot do."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from selection import LAYER, plan_of
from torch import Tensor
from workloads import WORKLOADS, Shape, Workload, s1_noise, s4_segments, s6_needle, s7_mixture

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill import calibration, scoring
from winnow.workers.prefill.methods.sale import BLOCK_K, BLOCK_Q, SALE
from winnow.workers.prefill.scoring import pool_mean

pytestmark = pytest.mark.slow

SMALL = {"local": 64, "segment": 64, "dense_below": 64}
SHAPES = [Shape(512, 512), Shape(700, 700), Shape(300, 777)]


def logits(q: Tensor, k: Tensor, layer: LayerSpec = LAYER) -> Tensor:
    raw = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * layer.scale
    return torch.tanh(raw / layer.softcap) * layer.softcap if layer.softcap else raw


def causal(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def known_pairs(method: SALE, n: int, m: int) -> Tensor:
    """[N, M] bool: sink and local window as the class says it, row by row."""
    key, allowed = torch.arange(m), torch.zeros(n, m, dtype=torch.bool)
    for row in range(n):
        position, first = row + m - n, row // BLOCK_Q * BLOCK_Q + m - n
        start = max(0, first + 1 - method.local) // method.segment * method.segment
        allowed[row] = ((key < method.sink) | (key >= start)) & (key <= position)
    return allowed


def relative_scores(method: SALE, x: Workload, layer: LayerSpec = LAYER) -> Tensor:
    """[B, Hq, N, M]: exp of the exact logit over the sum of the known pairs; 0 where forbidden."""
    s = logits(x.q, x.k, layer)
    n, m = s.shape[-2:]
    known = s.masked_fill(~known_pairs(method, n, m), -torch.inf).logsumexp(-1, keepdim=True)
    return (s - known).exp().masked_fill(~causal(n, m), 0.0)


def tile_max(x: Tensor) -> Tensor:
    n, m = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -m % BLOCK_K, 0, -n % BLOCK_Q))
    return padded.unflatten(-1, (-1, BLOCK_K)).unflatten(-3, (-1, BLOCK_Q)).amax((-1, -3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_with_exact_scores_the_plan_is_the_definition(shape: Shape, softcap: float) -> None:
    layer = dataclasses.replace(LAYER, softcap=softcap)
    method = SALE(tau=0.3, bits=0, **SMALL)
    x = s7_mixture(shape, 3)
    wanted = (tile_max(relative_scores(method, x, layer)) > 0.3) | method.forced_tiles(shape.n, shape.m, x.q.device)
    expected = TilePlan.from_mask(wanted, n_rows=shape.n, n_keys=shape.m, block_q=BLOCK_Q, block_k=BLOCK_K)
    got = plan_of(method, x.q, x.k, layer)
    assert torch.equal(got.tile_mask(), expected.tile_mask())
    assert got.density() < 0.95


def test_the_scores_of_four_bits_are_near_the_exact_ones_and_eight_bits_are_nearer() -> None:
    x = s7_mixture(Shape(700, 700), 4)
    exact = SALE(tau=0.1, bits=0, **SMALL).tile_scores(x.q, x.k, LAYER)
    seen = exact.isfinite()
    assert float(seen.double().mean()) > 0.3
    errors = []
    for bits, token_scales in ((3, False), (4, False), (4, True), (8, False)):
        scores = SALE(tau=0.1, bits=bits, token_scales=token_scales, **SMALL).tile_scores(x.q, x.k, LAYER)
        assert torch.equal(scores.isfinite(), seen)
        errors.append(float((scores - exact)[seen].abs().mean()))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2] > 5 * errors[3]
    assert errors[1] < 0.5 and errors[3] < 0.03  # of logits up to 24


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_dropped_key_has_at_most_tau_of_the_mass(shape: Shape) -> None:
    """Its relative score is at most tau and the true denominator at least the known one: exact scores only."""
    tau = 0.05
    x = s4_segments(shape, 6)
    plan = plan_of(SALE(tau=tau, bits=0, **SMALL), x.q, x.k)
    p = logits(x.q, x.k).masked_fill(~causal(shape.n, shape.m), -torch.inf).softmax(-1)
    dropped = causal(shape.n, shape.m) & ~plan.to_dense_mask()
    assert float(dropped.double().mean()) > 0.02
    assert float(p[dropped].max()) <= tau
    assert bool(((p * dropped).sum(-1) <= dropped.sum(-1) * tau + 1e-9).all())


def test_the_kept_set_shrinks_as_tau_grows() -> None:
    x = s7_mixture(Shape(700, 700), 8)
    masks = [plan_of(SALE(tau=tau, **SMALL), x.q, x.k).tile_mask() for tau in (1e-4, 1e-3, 1e-2, 0.1, 0.5)]
    for more, fewer in itertools.pairwise(masks):
        assert bool((more | ~fewer).all())
    assert int(masks[0].sum()) > 1.5 * int(masks[-1].sum())


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_smoothing_keeps_the_order_of_tile_maxima_where_a_shared_mean_would_drown_it() -> None:
    shape = Shape(512, 512)
    x = s1_noise(shape, 9)
    gen = torch.Generator().manual_seed(9)
    shift_q, shift_k = (20 * torch.randn(1, 1, 1, 32, generator=gen) for _ in range(2))
    method = SALE(tau=0.1, **SMALL)
    q, k = x.q + shift_q, x.k + shift_k

    def correlation(scores: Tensor) -> float:
        exact = dataclasses.replace(method, bits=0).tile_scores(q, k, LAYER)
        seen = exact.isfinite()
        return spearman(scores[seen], exact[seen])

    codes_q, unit_q = method._coded(q.unsqueeze(2), (2, 8), torch.float32)
    codes_k, unit_k = method._coded(k.unsqueeze(2), (4, 4, 2), torch.float32)
    values_q, values_k = (codes_q * unit_q[..., 0]).squeeze(2), (codes_k * unit_k[..., 0]).squeeze(2)
    known = logits(q, k).masked_fill(~known_pairs(method, 512, 512), -torch.inf).logsumexp(-1, keepdim=True)
    coarse = tile_max((logits(values_q, values_k) - known).exp().masked_fill(~causal(512, 512), 0.0)).log().float()
    assert correlation(method.tile_scores(q, k, LAYER)) >= 0.95
    assert correlation(coarse) < 0.5


@pytest.mark.parametrize("cell", [(2, 8), (4, 4, 2)])
def test_codes_are_small_whole_numbers_of_the_scale_their_group_shares(cell: tuple[int, ...]) -> None:
    x = torch.randn(1, 1, 1, 64, 16, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 30, 64)[:, None]
    values, unit = SALE(tau=0.1)._coded(x, cell, torch.float32)
    back = (values * unit[..., 0])[0, 0, 0]
    group = (
        torch.arange(64) // 16 * 8 + torch.arange(64) % 8
        if len(cell) == 2
        else torch.arange(64) // 32 * 4 + torch.arange(64) % 8 // 2
    )
    for g in group.unique():
        scale = x[0, 0, 0][group == g].abs().max() / 7
        codes = back[group == g] / scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert float(codes.abs().max()) == pytest.approx(7)
        assert float((back[group == g] - x[0, 0, 0][group == g]).abs().max()) <= scale / 2 + 1e-5
    assert float(values.abs().max()) <= 7 and float(torch.log2(unit)) % 1 == 0


def test_a_strong_key_among_others_that_cancel_its_mean_is_kept() -> None:
    """What a pooled tile cannot show: the mean of the needle's tile points away from its query."""
    shape = Shape(1024, 1024)
    x = s6_needle(shape, 2, width=64)
    tile = x.planted["needle"][0] // BLOCK_K
    k = x.k.clone()
    spot = slice(tile * BLOCK_K, (tile + 1) * BLOCK_K)
    needle = k[:, :, spot.start].clone()
    k[:, :, spot] = -needle[:, :, None] / 20
    k[:, :, spot.start + 13] = needle
    pooled = (pool_mean(x.q, BLOCK_Q)[:, ::2] @ pool_mean(k, BLOCK_K).transpose(-1, -2))[:, :, -1]
    assert bool((pooled[..., tile] < pooled.median(-1).values).all())
    plan = plan_of(SALE(tau=0.3, **SMALL), x.q, k)
    assert bool(plan.tile_mask()[:, :, -1, tile].all())
    assert plan.density() < 0.5


@pytest.mark.parametrize(("n", "m"), [(2000, 2000), (1000, 2000), (640, 1000)])
def test_the_local_window_is_128_to_255_keys_before_its_tile(n: int, m: int) -> None:
    method = SALE(tau=0.1, dense_below=32)
    forced = TilePlan.from_mask(
        method.forced_tiles(n, m, torch.device("cpu"))[None, None], n_rows=n, n_keys=m, block_q=64, block_k=32
    )
    forced.check()
    pairs = forced.to_dense_mask()[0, 0]
    first = torch.arange(0, n, BLOCK_Q)
    position = first + m - n
    before = pairs[first].sum(-1) - 32  # less the sink; the row's own key counts among the local ones
    far = position > 400
    assert int(far.sum()) > 5
    assert bool((before[far] >= 128).all()) and bool((before[far] <= 255).all())
    assert torch.equal(pairs[:, 32:], known_pairs(method, n, m)[:, 32:])


def test_each_head_has_its_own_threshold_and_those_below_the_floor_are_dense() -> None:
    x = s7_mixture(Shape(700, 700), 5)
    method = SALE(**SMALL)
    scores = method.tile_scores(x.q, x.k, LAYER)
    tau = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.01, 0.05]])
    bound = method.with_thresholds(tau)
    assert bound.plan(x.q, x.k, LAYER) is None  # layer 0: all heads dense
    plan = plan_of(bound, x.q, x.k, dataclasses.replace(LAYER, idx=1))
    assert plan.head_class.tolist() == [[HeadClass.CSR, HeadClass.DENSE, HeadClass.CSR, HeadClass.CSR]]
    mask = plan.tile_mask()
    for head in (0, 2, 3):
        one = SALE.plan_of(scores[:, head : head + 1] > tau[1, head].log(), torch.ones(1), 700, 700)
        assert torch.equal(mask[:, head], one.tile_mask()[:, 0])
    assert torch.equal(plan.to_dense_mask()[:, 1], causal(700, 700)[None])


def model_named(fingerprint: str, layers: int = 2, heads: int = 4) -> LoadedModel:
    return cast(LoadedModel, SimpleNamespace(fingerprint=fingerprint, spec=SimpleNamespace(n_layers=layers, n_q_heads=heads)))


def test_thresholds_come_from_the_models_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    x = s7_mixture(Shape(700, 700), 5)
    tau = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    calibration.save("sale", "f00d" * 8, {"tau": tau}, {})
    method = SALE(**SMALL)
    bound = method.bind(model_named("f00d" * 8))
    assert torch.equal(
        plan_of(bound, x.q, x.k, dataclasses.replace(LAYER, idx=1)).tile_mask(),
        plan_of(method.with_thresholds(tau), x.q, x.k, dataclasses.replace(LAYER, idx=1)).tile_mask(),
    )
    assert bound.calibration_id and method.calibration_id == ""
    calibration.save("sale", "f00d" * 8, {"tau": tau / 2}, {})
    assert method.bind(model_named("f00d" * 8)).calibration_id != bound.calibration_id
    with pytest.raises(CorruptBlock, match="threshold per layer and head"):
        method.bind(model_named("f00d" * 8, layers=3))


def test_without_a_calibration_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    x = s7_mixture(Shape(700, 700), 5)
    with pytest.raises(Unsupported, match=r"winnow calibrate sale.*tau="):
        SALE().bind(model_named("beef" * 8))
    given = SALE(tau=0.01)
    assert given.bind(model_named("beef" * 8)) is given
    with pytest.raises(Unsupported, match="no thresholds"):
        SALE(**SMALL).plan(x.q, x.k, LAYER)


def test_the_layers_scale_enters_the_selection() -> None:
    x = s7_mixture(Shape(700, 700), 4)
    method = SALE(tau=0.1, **SMALL)
    plain = plan_of(method, x.q, x.k).tile_mask()
    assert torch.equal(plain, plan_of(method, x.q * 2, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 2)).tile_mask())
    assert not torch.equal(plain, plan_of(method, x.q, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 8)).tile_mask())


@pytest.mark.parametrize("tau", [0.001, 0.004])
def test_heads_without_any_contrast_keep_what_exact_scores_keep(tau: float) -> None:
    """Their codes have no scale: queries that are zero, keys that are all alike."""
    x = s7_mixture(Shape(700, 700), 1)
    q, k = x.q.clone(), x.k.clone()
    q[:, :2], k[:, :1] = 0.0, 0.0  # pruned heads beside others
    for queries, keys in ((q, k), (torch.ones_like(q), torch.ones_like(k)), (1e-6 * x.q, torch.zeros_like(k))):
        exact, coded = (SALE(tau=tau, bits=bits, **SMALL) for bits in (0, 4))
        plain = [plan_of(method, queries, keys).tile_mask()[:, :2] for method in (exact, coded)]
        assert torch.equal(*plain)
        scores = [method.tile_scores(queries, keys, LAYER)[:, :2] for method in (exact, coded)]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_sums_of_codes_fit_the_dtype_they_are_multiplied_in() -> None:
    for bits in range(2, 9):
        top = 2 ** (bits - 1) - 1
        dtype = SALE(tau=0.1, bits=bits)._product_dtype(torch.device("cuda"))
        assert top * top * 256 <= torch.finfo(dtype).max
        assert (dtype == torch.float16) == (bits <= 5)


def test_slabs_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(Shape(500, 1000), 6)
    method = SALE(tau=0.1, **SMALL)
    whole = plan_of(method, x.q, x.k).tile_mask()
    monkeypatch.setattr(scoring, "SLAB_BYTES", 1)
    assert torch.equal(whole, plan_of(method, x.q, x.k).tile_mask())


@pytest.mark.parametrize("workload", ["S1", "S4", "S7"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chunks_of_a_prompt_get_the_scores_and_plans_of_the_whole(workload: str, seed: int) -> None:
    """Rounding to 4 bits shows in the scores any shift of keys or queries that depends on later tokens."""
    x = WORKLOADS[workload](Shape(640, 640), seed)
    for tau in (0.02, 0.1, 0.3):
        method = SALE(tau=tau, **SMALL)
        scores, mask = method.tile_scores(x.q, x.k, LAYER), plan_of(method, x.q, x.k).tile_mask()
        assert float(scores.isfinite().double().mean()) > 0.3
        for end in range(128, 641, 128):
            q, k = x.q[:, :, end - 128 : end], x.k[:, :, :end]
            rows, keys = slice((end - 128) // BLOCK_Q, end // BLOCK_Q), slice(end // BLOCK_K)
            torch.testing.assert_close(method.tile_scores(q, k, LAYER), scores[:, :, rows, keys], atol=1e-4, rtol=1e-4)
            assert torch.equal(plan_of(method, q, k).tile_mask(), mask[:, :, rows, keys])


def test_early_rows_short_prompts_and_layers_with_a_window_are_dense() -> None:
    x = s6_needle(Shape(1200, 1200))
    method = SALE(tau=0.5)
    assert method.plan(x.q[:, :, :1024], x.k[:, :, :1024], LAYER) is None
    mask = plan_of(method, x.q, x.k).to_dense_mask()
    assert torch.equal(mask[:, :, :1024], causal(1200, 1200)[:1024].expand(1, 4, -1, -1))
    assert not bool(mask[:, :, 1024:].sum(-1).eq(torch.arange(1025, 1201)).all())
    assert method.plan(x.q, x.k, dataclasses.replace(LAYER, window=500)) is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"tau": -0.5}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"sink": 30}, "sink"),
        ({"local": 0}, "local"),
        ({"segment": 48}, "segment"),
        ({"dense_below": 0}, "dense_below"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        SALE(**params)
