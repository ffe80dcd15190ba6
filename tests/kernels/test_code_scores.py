"""SALE's kernels against its plain torch path on the CPU, which is the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.kernels import code_scores, codes, kernel_module
from winnow.workers.attention.plan import HeadClass
from winnow.workers.prefill import scoring
from winnow.workers.prefill.methods import sale
from winnow.workers.prefill.methods.sale import BLOCK_Q, SALE

SMALL = {"local": 64, "segment": 64, "dense_below": 64}


def qk(
    n: int, m: int, device: str, *, batch: int = 2, hq: int = 4, hkv: int = 2, d: int = 32, shared: float = 2.0
) -> tuple[Tensor, Tensor]:
    """float16 q, a transposed view, and k, a slice of a longer cache whose rest is NaN. Each has a mean of its own, tokens differ
    in size. Entries are multiples of 1/64: a mean is the same in any order of summing, so codes are the same to the bit."""
    gen = torch.Generator().manual_seed(7 * n + m + hq)

    def made(heads: int, tokens: int) -> Tensor:
        x = torch.randn(batch, heads, tokens, d, generator=gen) * (0.3 + 1.5 * torch.rand(1, heads, tokens, 1, generator=gen))
        return ((x + shared * torch.randn(1, heads, 1, d, generator=gen)) * 64).round().clamp(-700, 700).div(64).half()

    q = made(hq, n).transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.full((batch, hkv, m + 5, d), torch.nan, dtype=torch.float16)
    cache[:, :, :m] = made(hkv, m)
    return q.to(device), cache.to(device)[:, :, :m]


def on_cpu(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, LayerSpec]:
    return q.cpu().float(), k.cpu().float(), LayerSpec(0, q.shape[1], k.shape[1], q.shape[3], q.shape[3] ** -0.5)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes SALE use its kernels on any device; holds the queries of every call, so that a test can see that they ran."""
    calls: list[Tensor] = []

    def kernels(q: Tensor, layer: LayerSpec) -> Any:
        calls.append(q)
        return code_scores

    monkeypatch.setattr(sale, "code_kernels", kernels)
    return calls


def scores_of(method: SALE, q: Tensor, k: Tensor, layer: LayerSpec, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """By plain torch."""
    with monkeypatch.context() as patch:
        patch.setattr(sale, "code_kernels", lambda q, layer: None)
        return method.tile_scores(q, k, layer)


@pytest.mark.parametrize(
    ("n", "m", "options"),
    [(420, 420, {}), (200, 517, {}), (330, 331, {"token_scales": True}), (65, 400, {"bits": 2}), (65, 400, {"bits": 8})],
)
def test_largest_scores_equal_the_plain_ones(
    device: str, n: int, m: int, options: dict[str, Any], fused: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(n, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    method = SALE(tau=0.1, **SMALL, **options)
    expected = scores_of(method, cpu_q, cpu_k, layer, monkeypatch)
    assert int(expected.isfinite().sum()) > 20
    found = method.tile_scores(q, k, layer)
    assert fused
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("hq", "hkv", "d", "slab"),
    [(3, 1, 64, 1 << 30), (3, 1, 32, 1), (2, 2, 32, 20_000), (5, 1, 32, 20_000), (8, 2, 128, 1 << 30)],
)
def test_any_grouping_and_any_slab_gives_the_same(
    device: str, hq: int, hkv: int, d: int, slab: int, fused: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(200, 330, device, batch=1 if d == 128 else 2, hq=hq, hkv=hkv, d=d)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    method = SALE(tau=0.1, sink=64, local=40, segment=32, dense_below=170)
    expected = scores_of(method, cpu_q, cpu_k, layer, monkeypatch)
    monkeypatch.setattr(scoring, "SLAB_BYTES", slab)
    found = method.tile_scores(q, k, layer)
    assert fused
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("n", "m", "slab"), [(200, 517, 20_000), (330, 331, 1 << 30), (70, 4500, 1 << 30)])
def test_plans_equal_the_plain_ones(
    device: str, n: int, m: int, slab: int, fused: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(n, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    method = SALE(**SMALL)
    scores = scores_of(method, cpu_q, cpu_k, layer, monkeypatch)
    finite = scores[scores.isfinite()].sort().values
    assert finite.numel() > 20
    cut = finite.numel() * 7 // 10  # between two scores, so that no tile's verdict hangs on the last digit
    gaps = finite[cut:-1].diff()
    low = cut + int(gaps.argmax())
    tau = ((finite[low] + finite[low + 1]) / 2).exp()
    bound = method.with_thresholds(torch.stack((tau, torch.tensor(0.0), tau, tau * 1000))[None])
    monkeypatch.setattr(scoring, "SLAB_BYTES", slab)
    plan = bound.plan(q, k, layer)
    assert plan is not None and fused
    plan.check()
    mask = plan.tile_mask().cpu()
    assert plan.head_class[0].tolist() == [HeadClass.CSR, HeadClass.DENSE, HeadClass.CSR, HeadClass.CSR]
    for head, limit in ((0, tau), (2, tau), (3, tau * 1000)):
        wanted = SALE.plan_of(scores[:, head : head + 1] > limit.log(), torch.ones(1), n, m)
        assert torch.equal(mask[:, head], wanted.tile_mask()[:, 0])
    assert int((scores[:, [0, 2]] > tau.log()).sum()) - int((scores[:, [0, 2]] == torch.inf).sum()) > 0


def test_codes_are_those_of_the_plain_path(device: str) -> None:
    q, k = qk(130, 300, device)
    method = SALE(tau=0.1, **SMALL)
    known = codes.Known(method.sink, method.local, method.segment, method.dense_below)
    shift = method._shift(k)
    keys = codes.code_keys(k, shift, 192, bits=4, token_scales=False)
    assert keys.codes.shape == (2, 2, 256, 32)
    values, unit = method._coded((k[:, :, :192].float() - shift)[:, :, None].cpu(), (4, 4, 2), torch.float32)
    found = (keys.codes * keys.scales[..., None])[:, :, :192].cpu()
    torch.testing.assert_close(found, (values * unit[..., 0])[:, :, 0], atol=1e-6, rtol=1e-6)
    assert int(keys.codes.abs().amax()) == 7

    rows = codes.code_rows(q, k, shift, known, scale=0.25, bits=4, token_scales=False)
    mean = q[:, :, 64:128].float().mean(2, keepdim=True)
    values, unit = method._coded((q[:, :, 64:128].float() - mean)[:, :, None].cpu(), (2, 8), torch.float32)
    found = (rows.codes * rows.scales[..., None] / 0.25).view(2, 2, 3, 2, 64, 32)[:, :, 1].reshape(2, 4, 64, 32).cpu()
    torch.testing.assert_close(found, (values * unit[..., 0])[:, :, 0], atol=1e-5, rtol=1e-5)
    parts = rows.means.float().sum(-2).view(2, 2, 3, 2, 32)[:, :, 1].reshape(2, 4, 1, 32)
    torch.testing.assert_close(parts.cpu(), mean.cpu(), atol=1e-5, rtol=1e-5)
    assert bool((rows.offsets.view(2, 2, 3, 2, 64)[:, :, 2, :, 2:] == -torch.inf).all())  # rows past the end


def test_slabs_hold_every_unit_that_is_scored_once() -> None:
    known = codes.Known(32, 64, 64, 128)
    for units, group, past, slab in ((50, 4, 0, 1 << 14), (9, 3, 400, 1 << 30), (200, 1, 64, 4096), (7, 7, 0, 1 << 20)):
        seen = torch.zeros(3, units, dtype=torch.long)
        for heads, first, stop in code_scores.unit_slabs(3, units, group, past, known, 2, slab):
            seen[heads, first:stop] += 1
        tile = torch.arange(units) // group * BLOCK_Q + past
        scored = torch.tensor([known.start(int(at)) > known.sink and int(at) >= known.dense_below for at in tile])
        assert bool((seen[:, scored] == 1).all()) and int(seen.max()) <= 1


def test_sale_finds_its_kernels() -> None:
    """A failed import would only make it slow."""
    assert kernel_module("code_scores") is code_scores
