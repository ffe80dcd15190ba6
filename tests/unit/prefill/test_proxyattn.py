"""ProxyAttn against what its authors say it does: exact rankings where averaging is none, and where averaging must fail."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from selection import LAYER, plan_of, probabilities
from torch import Tensor
from workloads import WORKLOADS, Shape, s1_noise, s2_verticals, s6_needle, s7_mixture

from winnow.errors import InvalidRequest, Unsupported
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill import scoring
from winnow.workers.prefill.methods.proxyattn import ProxyAttn
from winnow.workers.prefill.scoring import forbidden_tiles, keep_top, logits_of, pool_mean

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32
SHAPES = [Shape(512, 512), LONG, Shape(300, 777)]


def tile_max(x: Tensor, b: int) -> Tensor:
    """[B, H, N, M] -> [B, H, nQ, nK]."""
    n, m = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (0, -m % b, 0, -n % b), value=-1.0)
    return padded.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).amax((-1, -3))


def recall(plan: TilePlan, p: Tensor) -> Tensor:
    return (p * plan.to_dense_mask()).sum(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_proxy_per_head_without_a_stride_ranks_as_the_exact_max_pooled_attention(shape: Shape) -> None:
    x = s7_mixture(shape, 2)
    method = ProxyAttn(gamma=0.8, groups=4, stride=1, min_budget=32, block=32)
    plan = plan_of(method, x.q, x.k)
    p = probabilities(x.q, x.k)
    forbidden = forbidden_tiles(shape.n, shape.m, 32, 32, "cpu")
    oracle = keep_top(tile_max(p, 32).masked_fill(forbidden, -torch.inf), method._budgets(x.q, x.k, LAYER))
    oracle[..., 0] = True
    best = TilePlan.from_mask(oracle, n_rows=shape.n, n_keys=shape.m, block_q=32, block_k=32)
    agreement = (plan.tile_mask() == best.tile_mask()).double().mean()
    assert float(agreement) > 0.999  # float32 against float64: neighbours within rounding may swap
    torch.testing.assert_close(recall(plan, p).mean(), recall(best, p).mean(), atol=1e-4, rtol=0)
    assert plan.density() < 0.9


@pytest.mark.parametrize("shape", [Shape(512, 512), Shape(301, 333), Shape(5, 300)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("stride", [1, 4, 32])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_proxys_scores_are_those_of_mean_heads_on_the_first_token_of_every_window(
    shape: Shape, softcap: float, stride: int, groups: int
) -> None:
    x, layer, b = s7_mixture(shape, 3), dataclasses.replace(LAYER, softcap=softcap), 32
    found = ProxyAttn(groups=groups, stride=stride, block=b, min_budget=32)._proxy_scores(x.q, x.k, layer)
    hq, hkv = x.q.shape[1], x.k.shape[1]
    rows, keys = torch.arange(0, shape.n, stride), torch.arange(0, shape.m, stride)
    for group in range(groups):
        heads = range(group * hq // groups, (group + 1) * hq // groups)
        q = torch.stack([x.q[0, head].double() for head in heads]).mean(0)[rows]
        k = torch.stack([x.k[0, head].double() for head in sorted({head * hkv // hq for head in heads})]).mean(0)[keys]
        logits = q @ k.T * layer.scale
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits
        logs = logits.masked_fill(keys > (rows + shape.m - shape.n)[:, None], -torch.inf).log_softmax(-1)
        for tile_q in range(found.shape[2]):
            for tile_k in range(found.shape[3]):
                best = logs[rows // b == tile_q][:, keys // b == tile_k].amax()
                assert float(found[0, group, tile_q, tile_k]) == pytest.approx(float(best), abs=1e-4)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("stride", [1, 4])
def test_with_all_heads_alike_one_proxy_gives_the_plan_of_many(groups: int, stride: int) -> None:
    x = s7_mixture(Shape(LONG.n, LONG.m, q_heads=1, kv_heads=1), 5)
    q, k = x.q.expand(-1, 4, -1, -1), x.k.expand(-1, 2, -1, -1)
    one = plan_of(ProxyAttn(gamma=0.8, stride=stride, min_budget=32, block=32), q, k)
    many = plan_of(ProxyAttn(gamma=0.8, stride=stride, min_budget=32, block=32, groups=groups), q, k)
    assert torch.equal(one.tile_mask(), many.tile_mask())


def test_a_concentrated_head_gets_a_smaller_budget_and_a_uniform_one_about_gamma() -> None:
    x = s1_noise(Shape(1024, 1024), 1)
    q, k = 0.0 * x.q, x.k.clone()
    k[:, 1, :32] += 10.0  # KV head 1: one tile that takes everything
    q[:, 2:] = 1.0
    budgets = ProxyAttn(gamma=0.9, min_budget=32, block=32)._budgets(q, k, LAYER)[0, :, -1]
    # the mean of the last tile's causal rows gives that tile half weight, so slightly less than all 32 count
    assert budgets[:2].tolist() == [29, 29]
    assert budgets[2:].tolist() == [1, 1]


def test_a_rows_budget_is_the_heads_share_of_the_tiles_it_may_read() -> None:
    x = s1_noise(Shape(1024, 1024), 1)
    scaled = ProxyAttn(gamma=0.5, min_budget=32, block=32)._budgets(x.q, x.k, LAYER)[0]
    fixed = ProxyAttn(gamma=0.5, min_budget=32, block=32, row_scaled=False)._budgets(x.q, x.k, LAYER)[0]
    assert torch.equal(scaled[:, -1], fixed[:, -1])
    assert torch.equal(fixed, fixed[:, -1:].expand(-1, 32))
    for head in range(4):
        share = int(scaled[head, -1])
        assert scaled[head].tolist() == [math.ceil(share * tiles / 32) for tiles in range(1, 33)]


@pytest.mark.parametrize("shape", [LONG, Shape(300, 777)], ids=str)
@pytest.mark.parametrize("workload", ["S1", "S4", "S7"])
def test_the_budget_is_read_off_the_last_block_of_rows_however_short_the_last_tile(shape: Shape, workload: str) -> None:
    """The last tiles hold 8 and 12 rows."""
    x = WORKLOADS[workload](shape, 4)
    budgets = ProxyAttn(gamma=0.8, min_budget=1, block=32)._budgets(x.q, x.k, LAYER)[0, :, -1]
    for head, weights in enumerate(probabilities(x.q, x.k)[0, :, -32:].mean(1)):
        mass = sorted((float(tile.sum()) for tile in weights.split(32)), reverse=True)
        assert int(budgets[head]) == next(count for count in range(1, 33) if sum(mass[:count]) >= 0.8)


def test_rows_before_a_short_last_tile_still_widen_its_plan() -> None:
    x = s1_noise(LONG, 1)
    q, k = 0.0 * x.q, x.k.clone()
    k[:, :, 320:352] += 10.0
    q[:, :, 992:] = 1.0  # the 8 rows of the last tile look at one tile, the 24 before them everywhere
    mask = plan_of(ProxyAttn(gamma=0.9, min_budget=32, block=32), q, k).tile_mask()
    assert bool((mask[:, :, -1].sum(-1) > 20).all())


def test_of_tiles_that_score_alike_the_lower_are_kept() -> None:
    x = s1_noise(LONG)
    mask = plan_of(ProxyAttn(gamma=0.01, min_budget=96, block=32, keep_first=False), 0.0 * x.q, x.k).tile_mask()
    for row in range(32):
        kept = {tile for tile in (0, 1, 2, row) if tile <= row}
        assert all(set(head.nonzero().flatten().tolist()) == kept for head in mask[0, :, row])


def test_averaging_cancels_heads_that_look_away_from_each_other_and_more_groups_bring_them_back() -> None:
    """The negative test: KV head 0 answers to +u at one tile, KV head 1 to -u at another; the mean query is noise."""
    shape = Shape(1024, 1024)
    x = s1_noise(shape, 7)
    u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(7)), dim=0)
    gain = math.sqrt(12 * math.sqrt(32))
    q, k = 0.1 * x.q, 0.1 * x.k
    q[:, :2] += gain * u
    q[:, 2:] -= gain * u
    k[:, 0, 256:288] += gain * u
    k[:, 1, 608:640] -= gain * u
    p = probabilities(q, k)[:, :, 700:]  # rows that see both

    def mean_recall(groups: int) -> float:
        plan = plan_of(ProxyAttn(gamma=0.95, groups=groups, min_budget=32, block=32), q, k)
        assert plan.density() < 0.4
        return float((p * plan.to_dense_mask()[:, :, 700:]).sum(-1).mean())

    assert mean_recall(1) < 0.6
    assert mean_recall(2) > 0.95


@pytest.mark.parametrize("phase", [0, 1, 2, 3])
def test_a_needle_as_wide_as_the_stride_is_kept_at_every_phase(phase: int) -> None:
    x = s6_needle(Shape(1024, 1024), 3, width=32)
    k = x.k.clone()
    first = x.planted["needle"][0]
    needle = k[:, :, first : first + 4].clone()
    k[:, :, first : first + 32] = s1_noise(Shape(1024, 1024), 4).k[:, :, first : first + 32]
    k[:, :, first + phase : first + phase + 4] = needle
    mask = plan_of(ProxyAttn(gamma=0.5, min_budget=64, block=32), x.q, k).tile_mask()
    assert bool(mask[:, :, -1, first // 32].all())


@pytest.mark.parametrize("phase", [0, 1, 2, 3])
def test_a_single_needle_key_is_kept_at_every_phase_without_a_stride_and_at_phase_0_with_one(phase: int) -> None:
    """The limit that the class states: at another phase a strided proxy does not see it."""
    x = s6_needle(Shape(1024, 1024), 3, width=32)
    k = x.k.clone()
    first = x.planted["needle"][0]
    needle = 1.5 * k[:, :, first].clone()
    k[:, :, first : first + 32] = 0.0
    k[:, :, first + phase] = needle
    tile = first // 32
    fine = plan_of(ProxyAttn(gamma=0.5, min_budget=64, block=32, stride=1), x.q, k).tile_mask()
    assert bool(fine[:, :, -1, tile].all())
    strided = plan_of(ProxyAttn(gamma=0.5, min_budget=64, block=32), x.q, k).tile_mask()
    assert bool(strided[:, :, -1, tile].all()) == (phase == 0)


def test_recall_beats_mean_pooling_at_equal_density_where_heads_share_structure() -> None:
    """A proxy per KV head: its group sees the same structure, of single keys, hence no stride. Controls with the same budgets
    are ranked by pooled q times pooled k, and by the true mass of a tile."""
    shape = Shape(768, 768)
    method = ProxyAttn(gamma=0.9, groups=2, stride=1, min_budget=64, block=32)
    forbidden = forbidden_tiles(shape.n, shape.m, 32, 32, "cpu")
    sums = torch.zeros(3, 2)  # proxies, pooled, oracle: recall and density
    for seed in range(6):
        x = s7_mixture(shape, seed)
        p, budgets = probabilities(x.q, x.k), method._budgets(x.q, x.k, LAYER)
        pooled = logits_of(pool_mean(x.q, 32), pool_mean(x.k, 32).repeat_interleave(2, 1), LAYER)
        mass = p.unflatten(-1, (-1, 32)).unflatten(-3, (-1, 32)).sum((-1, -3)).float()
        plans = [plan_of(method, x.q, x.k)]
        for scores in (pooled, mass):
            mask = keep_top(scores.masked_fill(forbidden, -torch.inf), budgets)
            mask[..., 0] = True
            plans.append(TilePlan.from_mask(mask, n_rows=shape.n, n_keys=shape.m, block_q=32, block_k=32))
        sums += torch.tensor([[float(recall(plan, p).mean()), plan.density()] for plan in plans])
    (mine, density), (pooled_recall, pooled_density), (best, _) = (sums / 6).tolist()
    assert density == pytest.approx(pooled_density, abs=0.02)
    assert mine > pooled_recall + 0.01
    assert mine > 0.9 * best


def test_the_layers_scale_and_softcap_enter_the_selection() -> None:
    x = s7_mixture(LONG, 4)
    method = ProxyAttn(gamma=0.7, min_budget=32, block=32, groups=2)
    plain = plan_of(method, x.q, x.k).tile_mask()
    assert torch.equal(plain, plan_of(method, x.q * 2, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 2)).tile_mask())
    assert not torch.equal(plain, plan_of(method, x.q, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 8)).tile_mask())
    assert not torch.equal(plain, plan_of(method, x.q, x.k, dataclasses.replace(LAYER, softcap=1.0)).tile_mask())


def test_slabs_give_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(Shape(500, 1000), 6)
    method = ProxyAttn(gamma=0.8, min_budget=32, block=32, groups=2)
    whole = plan_of(method, x.q, x.k).tile_mask()
    monkeypatch.setattr(scoring, "SLAB_BYTES", 1)
    assert torch.equal(whole, plan_of(method, x.q, x.k).tile_mask())


def test_short_prompts_stay_dense() -> None:
    x = s2_verticals(LONG)
    assert ProxyAttn().plan(x.q, x.k, LAYER) is None  # 1,000 tokens, min_budget 2,048
    assert ProxyAttn(min_budget=64, block=32).plan(x.q, x.k, LAYER) is not None


@pytest.mark.parametrize("groups", [3, 8, 5])
def test_groups_that_do_not_fit_the_heads_are_refused_with_those_that_do(groups: int) -> None:
    x = s1_noise(LONG)
    with pytest.raises(Unsupported, match=r"use one of \[1, 2, 4\]"):
        ProxyAttn(groups=groups, min_budget=64, block=32).plan(x.q, x.k, LAYER)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"groups": 0}, "groups"),
        ({"stride": 3}, "stride"),
        ({"stride": 0}, "stride"),
        ({"block": 48}, "block"),
        ({"min_budget": 0}, "min_budget"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        ProxyAttn(**params)
