"""HyperAttention against its steps written out query by query, and against what its authors say it does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from workloads import Shape, s1_noise, s7_mixture

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.hyper_squares import Squares, gray_rank
from winnow.workers.prefill.methods.hyperattention import HyperAttention

pytestmark = pytest.mark.slow

D = 32
LAYER = LayerSpec(3, 4, 2, D, 1 / math.sqrt(D))
SMALL = {"block": 16, "samples": 16, "min_seq_len": 64, "tile": 16}


def plan_of(method: HyperAttention, q: Tensor, k: Tensor) -> tuple[TilePlan, Squares]:
    plan = method.plan(q, k, LAYER)
    assert plan is not None and isinstance(plan.residual, Squares)
    plan.check()
    return plan, plan.residual


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attend_plan(None, q, k, v, scale=LAYER.scale)


def below_pieces(m: int, piece: int) -> Tensor:
    position = torch.arange(m)
    return position[:, None] // piece > position // piece


@functools.cache
def gray_words(bits: int) -> dict[str, int]:
    """Rank of every word in the reflected Gray code, built by reflection."""
    words = [""]
    for _ in range(bits):
        words = ["0" + word for word in words] + ["1" + word for word in reversed(words)]
    return {word: rank for rank, word in enumerate(words)}


def naive_ranks(x: Tensor, directions: Tensor) -> list[int]:
    words = gray_words(directions.shape[1])
    return [words["".join("01"[positive] for positive in row)] for row in (x @ directions > 0).tolist()]


def naive_residual(rest: Squares, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The published steps for one sequence, query by query, in float64."""
    method, m, past = rest.method, k.shape[2], k.shape[2] - q.shape[2]
    group = q.shape[1] // k.shape[1]
    weights = torch.zeros(q.shape[1], q.shape[2], m, dtype=torch.float64)  # how often each key counts
    for level, (directions, picks) in enumerate(rest.draws(k.shape[1], D, m, torch.device("cpu"))):
        size = rest.piece << level
        width = min(method.block, size)
        for head, t in itertools.product(range(q.shape[1]), range(picks.shape[1])):
            own = min(head // group, directions.shape[0] - 1)
            keys = range(2 * t * size, (2 * t + 1) * size)
            rows = [p for p in range((2 * t + 1) * size, min(m, (2 * t + 2) * size)) if p >= past]
            key_rank, query_rank = naive_ranks(k[0, head // group], directions[own]), naive_ranks(q[0, head], directions[own])
            by_rank = sorted(keys, key=lambda j: key_rank[j])
            block_of = {j: place // width for place, j in enumerate(by_rank)}
            ordered = sorted(rows, key=lambda p: query_rank[p - past])
            sampled = (2 * t * size + picks[own, t]).tolist()
            population = size - (method.sink if t == 0 else 0)
            weight = 1.0 if method.samples >= size else population / max(1, method.samples)
            for place, p in enumerate(ordered):
                block = place * size // len(rows) // width
                counts = {j: 1.0 for j in keys if block_of[j] == block and not j < method.sink}
                for j in sampled:
                    if block_of[j] != block and not j < method.sink:
                        counts[j] = counts.get(j, 0.0) + weight
                weights[head, p - past, list(counts)] = torch.tensor(list(counts.values()), dtype=torch.float64)
    logits = q[0].double() @ k[0].double().repeat_interleave(group, 0).transpose(-1, -2) * LAYER.scale + weights.log()
    lse = logits.logsumexp(-1)
    out = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None]) @ v[0].double().repeat_interleave(group, 0)
    return out[None].float(), lse[None].float()


@pytest.mark.parametrize(
    ("shape", "params"),
    [
        (Shape(256, 256), {}),
        (Shape(300, 300), {}),
        (Shape(301, 301), {"block": 24}),  # blocks that do not divide a square
        (Shape(150, 310), {}),  # rows of a cached prefix are missing in some squares
        (Shape(64, 272), {"block": 24, "samples": 5}),
        (Shape(256, 256), {"sink": 16}),
        (Shape(280, 280), {"sink": 32, "samples": 7, "block": 20}),
        (Shape(128, 128), {"min_seq_len": 32, "sink": 32}),  # a square that is all sink
        (Shape(256, 256), {"per_head": True}),
        (Shape(200, 200), {"samples": 0}),
        (Shape(200, 200), {"samples": 128, "sink": 16}),
        (Shape(200, 200), {"block": 1000, "bits": 3}),
    ],
    ids=str,
)
def test_the_residual_follows_the_steps(shape: Shape, params: dict[str, Any]) -> None:
    x = s7_mixture(shape, 4)
    plan, rest = plan_of(HyperAttention(**{**SMALL, **params}), x.q, x.k)
    out, lse = rest(x.q, x.k, x.v, scale=LAYER.scale, softcap=0.0)
    expected, expected_lse = naive_residual(rest, x.q, x.k, x.v)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    first = shape.m - shape.n < rest.piece
    assert bool((lse == -torch.inf).any()) == first  # rows of the first piece have nothing below them
    pairs = below_pieces(shape.m, rest.piece)[shape.m - shape.n :] & (torch.arange(shape.m) >= rest.method.sink)
    causal = torch.ones(shape.n, shape.m, dtype=torch.bool).tril(shape.m - shape.n)
    assert torch.equal(plan.to_dense_mask()[0, 0], causal & ~pairs)  # what the residual is for and nothing else is left out


@pytest.mark.parametrize("params", [{"samples": 1 << 20}, {"block": 1 << 20, "samples": 0}, {"samples": 1 << 20, "sink": 16}])
@pytest.mark.parametrize("shape", [Shape(320, 320), Shape(301, 301), Shape(150, 326)])
def test_every_key_once_reproduces_dense_attention(params: dict[str, Any], shape: Shape) -> None:
    x = s1_noise(shape, 1)
    plan, _ = plan_of(HyperAttention(**{**SMALL, **params}), x.q, x.k)
    assert plan.density() < 0.8
    out, lse = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    expected, expected_lse = dense(x.q, x.k, x.v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("m", "levels"), [(64, 0), (127, 0), (128, 1), (255, 1), (256, 2), (511, 2), (512, 3)])
def test_squares_of_min_seq_len_keys_are_estimated_and_smaller_ones_exact(m: int, levels: int) -> None:
    x = s1_noise(Shape(m, m), 2)
    plan = HyperAttention(**SMALL).plan(x.q, x.k, LAYER)
    if levels == 0:
        assert plan is None
        return
    assert plan is not None and isinstance(plan.residual, Squares)
    assert plan.residual.levels == levels and 64 <= plan.residual.piece < 128 + 16
    out, _ = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    truth, _ = dense(x.q, x.k, x.v)
    piece = plan.residual.piece
    torch.testing.assert_close(out[:, :, :piece], truth[:, :, :piece], atol=1e-5, rtol=1e-5)
    assert float((out - truth)[:, :, piece:].norm() / truth[:, :, piece:].norm()) > 0.05


def test_cost_of_the_published_defaults_at_128k() -> None:
    """5 levels over pieces of 4,096: 5% of the causal pairs are touched."""
    m = 1 << 17
    method = HyperAttention()
    levels, piece = (m // method.min_seq_len).bit_length() - 1, 4096
    draws = Squares(method, piece, levels, 0).draws(8, 128, m, torch.device("cpu"))
    squares = [picks.shape[1] for _, picks in draws]
    assert squares == [16, 8, 4, 2, 1]
    touched = m * piece / 2 + sum(n * (piece << level) * 512 for level, n in enumerate(squares))
    assert 0.045 < touched / (m * m / 2) < 0.055


def test_average_mass_over_seeds_is_the_true_mass() -> None:
    gen = torch.Generator().manual_seed(5)
    q, k, v = (0.5 ** (i < 2) * torch.randn(1, 1, 2048, 16, generator=gen) for i in range(3))
    layer = LayerSpec(0, 1, 1, 16, 0.25)
    _, exact = attend_plan(None, q, k, v, scale=layer.scale)
    total = torch.zeros_like(exact, dtype=torch.float64)
    spread = torch.zeros_like(total)
    for seed in range(200):
        method = HyperAttention(block=64, samples=64, min_seq_len=512, bits=5, seed=seed)
        plan = method.plan(q, k, layer)
        assert plan is not None and callable(plan.residual)
        if seed == 0:
            _, kept = attend_plan(dataclasses.replace(plan, residual=None), q, k, v, scale=layer.scale)
        _, rest = plan.residual(q, k, v, scale=layer.scale, softcap=0.0)
        ratio = torch.exp(torch.logaddexp(kept, rest) - exact).double()
        total += ratio
        spread += (ratio - 1).square()
    mean = total / 200
    assert float((spread / 200).sqrt()[..., 512:].mean()) > 0.01  # single draws are off, their mean is not
    assert abs(float(mean.mean()) - 1) < 0.001
    assert float((mean - 1).abs().max()) < 0.02


def test_sorting_finds_clusters_and_keeps_a_blocks_share_of_noise() -> None:
    """Recall of the block part alone, over the keys of the square, for 8 topics of 64 tokens in each half in random order."""
    gen = torch.Generator().manual_seed(0)
    topic = torch.cat([torch.randperm(512, generator=gen) % 8 for _ in range(2)])
    topics = torch.nn.functional.normalize(torch.randn(8, D, generator=gen), dim=-1) * math.sqrt(10 * math.sqrt(D))
    clustered = topics[topic] + 0.05 * torch.randn(1024, D, generator=gen)
    noise = torch.randn(2, 1024, D, generator=gen)
    recalls = []
    for q, k in ((clustered, clustered), (0.1 * noise[0], noise[1])):
        q, k = q.expand(1, 4, -1, -1), k.expand(1, 2, -1, -1)
        method = HyperAttention(block=64, samples=0, min_seq_len=512)
        _, rest = plan_of(method, q, k)
        _, found = rest(q, k, torch.zeros_like(k), scale=LAYER.scale, softcap=0.0)
        exact = (q[:, :, 512:] @ k[:, :1, :512].transpose(-1, -2) * LAYER.scale).logsumexp(-1)
        recalls.append(float(torch.exp(found[:, :, 512:] - exact).mean()))
    assert recalls[0] >= 0.8
    assert recalls[1] == pytest.approx(64 / 512, rel=0.1)


@pytest.mark.parametrize("bits", range(1, 11))
def test_words_of_neighbouring_ranks_differ_in_one_sign(bits: int) -> None:
    words = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)))
    rank = gray_rank(words[None, None, None], torch.eye(bits)[None])[0, 0, 0]
    assert rank.sort().values.tolist() == list(range(1 << bits))
    ordered = words[rank.argsort()]
    assert (ordered[1:] != ordered[:-1]).sum(-1).tolist() == [1] * ((1 << bits) - 1)


def test_padding_of_a_ragged_block_carries_no_weight() -> None:
    """Logits of real keys are about -30: a zero key, of logit 0, would outweigh them all."""
    x = s1_noise(Shape(256, 256), 3)
    unit = torch.nn.functional.normalize(torch.ones(D), dim=0)
    gain = math.sqrt(30 * math.sqrt(D))
    q, k = 0.1 * x.q + gain * unit, 0.1 * x.k - gain * unit
    plan, rest = plan_of(HyperAttention(**{**SMALL, "block": 24, "samples": 1 << 20}), q, k)
    assert rest.piece % 24 != 0
    out, lse = attend_plan(plan, q, k, x.v, scale=LAYER.scale)
    expected, expected_lse = dense(q, k, x.v)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)


def test_a_strong_first_key_ruins_the_estimate_unless_it_is_read_exactly() -> None:
    x = s1_noise(Shape(512, 512), 6)
    unit = torch.nn.functional.normalize(torch.ones(D), dim=0)
    q, k = x.q + 7 * unit, x.k.clone()
    k[:, :, 0] += 7 * unit
    truth, _ = dense(q, k, x.v)

    def error(sink: int) -> float:
        plan, _ = plan_of(HyperAttention(**{**SMALL, "sink": sink}), q, k)
        out, _ = attend_plan(plan, q, k, x.v, scale=LAYER.scale)
        return float((out - truth).norm() / truth.norm())

    assert error(16) < 0.5 * error(0)


def test_seed_layer_and_heads_decide_the_draws() -> None:
    x = s1_noise(Shape(256, 256), 7)

    def residual(layer: int = 0, **params: Any) -> Tensor:
        plan = HyperAttention(**SMALL, **params).plan(x.q, x.k, LayerSpec(layer, 4, 2, D, LAYER.scale))
        assert plan is not None and callable(plan.residual)
        return plan.residual(x.q, x.k, x.v, scale=LAYER.scale, softcap=0.0)[0]

    assert torch.equal(residual(), residual())
    for other in (residual(layer=1), residual(seed=1), residual(seed=(1 << 31) - 1), residual(per_head=True)):
        assert not torch.equal(residual(), other)


def test_more_samples_than_a_tensor_can_count_are_every_key_once() -> None:
    x = s1_noise(Shape(256, 256), 7)
    outs = [
        attend_plan(plan_of(HyperAttention(**{**SMALL, "samples": n}), x.q, x.k)[0], x.q, x.k, x.v, scale=LAYER.scale)[0]
        for n in (256, 10**25)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("per_head", [False, True])
def test_heads_may_be_split_where_it_says_so(per_head: bool) -> None:
    x = s7_mixture(Shape(256, 256), 8)
    method = HyperAttention(**SMALL, per_head=per_head)
    whole, _ = attend_plan(plan_of(method, x.q, x.k)[0], x.q, x.k, x.v, scale=LAYER.scale)
    q, k, v = x.q[:, 2:], x.k[:, 1:], x.v[:, 1:]
    plan = method.plan(q, k, LayerSpec(3, 2, 1, D, LAYER.scale))
    half, _ = attend_plan(plan, q, k, v, scale=LAYER.scale)
    assert torch.allclose(whole[:, 2:], half, atol=1e-5) == method.caps.tensor_parallel == (not per_head)
    assert HyperAttention.caps.tensor_parallel


def test_slabs_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(Shape(256, 256), 8)
    for per_head in (False, True):
        _, rest = plan_of(HyperAttention(**SMALL, per_head=per_head), x.q, x.k)
        whole = rest(x.q, x.k, x.v, scale=LAYER.scale, softcap=2.0)
        monkeypatch.setattr("winnow.workers.prefill.hyper_squares._LOGIT_BYTES", 1)
        slabs = rest(x.q, x.k, x.v, scale=LAYER.scale, softcap=2.0)
        monkeypatch.undo()
        for a, b in zip(whole, slabs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_rows_off_the_grid_and_windowed_layers_stay_dense() -> None:
    x = s1_noise(Shape(150, 333), 9)
    assert HyperAttention(**SMALL).plan(x.q, x.k, LAYER) is None
    whole = s1_noise(Shape(333, 333), 9)
    assert HyperAttention(**SMALL).plan(whole.q, whole.k, LayerSpec(0, 4, 2, D, 1.0, window=100)) is None
    assert HyperAttention(**SMALL).plan(whole.q, whole.k, LAYER) is not None
    last = HyperAttention(**SMALL, dense_layers=2)
    left_dense = [last.plan(whole.q, whole.k, dataclasses.replace(LAYER, idx=i)) is None for i in range(4)]
    assert left_dense == [True, True, False, False]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"dense_layers": -1}, "dense_layers"),
        ({"bits": 0}, "bits"),
        ({"bits": 25}, "bits"),
        ({"block": 0}, "block"),
        ({"samples": -1}, "samples"),
        ({"min_seq_len": 0}, "min_seq_len"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 31}, "seed"),
        ({"seed": 1 << 50}, "seed"),
        ({"tile": 48}, "tile"),
        ({"sink": 100}, "sink"),
        ({"sink": 256, "min_seq_len": 128}, "sink"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        HyperAttention(**params)  # type: ignore[arg-type]
