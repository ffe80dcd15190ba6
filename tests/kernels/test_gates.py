"""SeerAttention's kernels against its plain torch path on the CPU, which is the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.kernels import gates, kernel_module, row_choice
from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.prefill import scoring
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods import seerattention
from winnow.workers.prefill.methods.seerattention import Gates, SeerAttention, largest_tiles, pool_keys
from winnow.workers.prefill.pre_rope import PreRope
from winnow.workers.prefill.scoring import diagonal_tiles, forbidden_tiles, pool_mean

LAYER = LayerSpec(0, 4, 2, 32, 32**-0.5)


def model_spec(d: int = 32, scaling: float = 1.0) -> ModelSpec:
    rope = RopeSpec(tuple((1e4 ** -(torch.arange(d // 2) / (d // 2))).tolist()), scaling)
    return ModelSpec("llama", 1, d, d, 4, 2, d, 8, 1024, (), (rope,), (0,))


def bound(device: str, **params: Any) -> PrefillMethod:
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 32, 16, generator=gen), torch.randn(1, 2, 96, 16, generator=gen)
    made = Gates.of({"q": q, "k": k}, model_spec(), torch.float16, torch.device(device))
    return SeerAttention(**params).with_gates(made)


def qk(n: int, m: int, device: str, d: int = 32) -> tuple[Tensor, Tensor]:
    """float16 q, a transposed view, and k, a slice of a longer cache whose rest is NaN."""
    gen = torch.Generator().manual_seed(n + m)
    q = torch.randn(2, n, 4, d, generator=gen).half().transpose(1, 2)
    cache = torch.full((2, 2, m + 5, d), torch.nan, dtype=torch.float16)
    cache[:, :, :m] = torch.randn(2, 2, m, d, generator=gen).half()
    return q.to(device), cache.to(device)[:, :, :m]


@pytest.mark.parametrize(("tokens", "heads", "d", "first"), [(200, 4, 32, 0), (64, 9, 64, 70), (1, 1, 128, 5)])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_tiles_before_rope_are_pooled_as_by_torch(
    device: str, tokens: int, heads: int, d: int, first: int, scaling: float
) -> None:
    gen = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, heads, d, generator=gen).half().transpose(1, 2)
    rope = PreRope(model_spec(d, scaling), torch.float16, torch.device("cpu"))
    expected = rope.undo(x, 0, first)
    cos, sin = (rows.to(device) for rows in rope.rows(0, first, tokens))
    means = gates.pool(x.to(device), cos, sin, 64, extremes=False)
    torch.testing.assert_close(means.cpu(), pool_mean(expected, 64), atol=1e-5, rtol=1e-5)
    extremes = gates.pool(x.to(device), cos, sin, 64, extremes=True)
    torch.testing.assert_close(extremes.cpu(), pool_keys(expected, 64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "m", "tied"), [(150, 150, True), (70, 519, False), (1, 33, False), (33, 700, True)])
def test_tiles_are_chosen_as_by_torch(device: str, n: int, m: int, tied: bool) -> None:
    block = 16
    forbidden, diagonal = (f(n, m, block, block, "cpu") for f in (forbidden_tiles, diagonal_tiles))
    scores = torch.randn(1, 2, *forbidden.shape, generator=torch.Generator().manual_seed(n))
    scores = (scores * 2).round() / 2 if tied else scores
    given = scores.masked_fill(forbidden, torch.nan).to(device)  # never looked at
    for density in (0.01, 0.3):
        counts = seerattention.tile_counts(density, forbidden).to(device)
        found = gates.choose_tiles(given, n=n, m=m, block=block, counts=counts)
        assert torch.equal(found.cpu(), largest_tiles(scores, density, forbidden, diagonal))
    shares = torch.softmax(scores.masked_fill(forbidden, -torch.inf), -1)
    for threshold in (0.0, 0.05):
        found = gates.choose_tiles(given, n=n, m=m, block=block, threshold=threshold).cpu()
        assert torch.equal(found, ((shares >= threshold) & ~forbidden) | diagonal)


@pytest.mark.parametrize(
    ("n", "m", "params", "slab"),
    [
        (260, 260, {"density": 0.4}, 1 << 30),
        (130, 519, {"density": 0.4}, 1),
        (130, 519, {"threshold": 0.05}, 1 << 30),
        (1, 330, {"threshold": 0.05}, 1),
    ],
)
def test_plans_equal_the_plain_ones(
    device: str, n: int, m: int, params: dict[str, float], slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(n, m, device)
    expected = bound("cpu", **params).plan(q.cpu(), k.cpu(), LAYER)
    monkeypatch.setattr(seerattention, "gate_kernels", lambda q, n_tiles: gates)
    monkeypatch.setattr(scoring, "SLAB_BYTES", slab)
    plan = bound(device, **params).plan(q, k, LAYER)
    assert plan is not None and expected is not None
    plan.check()
    assert torch.equal(plan.tile_mask().cpu(), expected.tile_mask())


def test_later_chunks_pool_new_keys_only_and_choose_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk(400, 400, device)
    whole = bound("cpu", density=0.4).plan(q.cpu(), k.cpu(), LAYER)
    monkeypatch.setattr(seerattention, "gate_kernels", lambda q, n_tiles: gates)
    pooled: list[int] = []
    pool = gates.pool
    monkeypatch.setattr(gates, "pool", lambda x, *rest, **more: (pooled.append(x.shape[2]), pool(x, *rest, **more))[1])
    method, parts = bound(device, density=0.4).for_prompt(), []
    for first, stop in ((0, 128), (128, 320), (320, 400)):
        plan = method.plan(q[:, :, first:stop], k[:, :, :stop], LAYER)
        assert plan is not None
        parts.append(torch.nn.functional.pad(plan.tile_mask(), (0, 7 - plan.n_k_tiles)))
    assert whole is not None and torch.equal(torch.cat(parts, 2).cpu(), whole.tile_mask())
    assert pooled == [128, 128, 192, 192, 80, 80]


def test_the_choice_between_tiles_fits_what_rows_hold() -> None:
    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    assert not gates.fits(q, 10)  # on a CPU
    assert kernel_module("gates") is gates
    assert kernel_module("no_such_kernel") is None
    assert row_choice.MOST_COLUMNS * seerattention.BLOCK >= 1 << 19  # tokens
