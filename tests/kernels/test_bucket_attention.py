"""HyperAttention's kernels against its plain torch path on the CPU, which is the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.kernels import bucket_attention, kernel_module
from winnow.workers.prefill import hyper_squares
from winnow.workers.prefill.hyper_squares import Squares, gray_rank
from winnow.workers.prefill.methods.hyperattention import HyperAttention

SMALL = {"block": 16, "samples": 16, "min_seq_len": 64, "tile": 16}


def qkv(n: int, m: int, *, batch: int = 2, hq: int = 4, hkv: int = 2, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """float16 q, a transposed view, and k and v, slices of a longer cache whose rest is NaN. Whole numbers of 1/8: with
    directions of 1/64 projections are exact, and no sign hangs on the order of summing."""
    gen = torch.Generator().manual_seed(n + m)
    q = (torch.randn(batch, n, hq, d, generator=gen) * 8).round().div(8).half().transpose(1, 2)
    cache = torch.full((2, batch, hkv, m + 5, d), torch.nan, dtype=torch.float16)
    cache[:, :, :, :m] = (torch.randn(2, batch, hkv, m, d, generator=gen) * 8).round().div(8).half()
    return q, cache[0, :, :, :m], cache[1, :, :, :m]


def squares_of(q: Tensor, k: Tensor, **params: Any) -> Squares:
    layer = LayerSpec(3, q.shape[1], k.shape[1], q.shape[3], 0.2)
    plan = HyperAttention(**{**SMALL, **params}).plan(q, k, layer)
    assert plan is not None and isinstance(plan.residual, Squares)
    return plan.residual


@pytest.mark.parametrize(("tokens", "heads", "own", "bits"), [(200, 4, 1, 7), (65, 4, 2, 16), (130, 3, 3, 24), (7, 2, 1, 1)])
def test_ranks_are_those_of_the_signs(device: str, tokens: int, heads: int, own: int, bits: int) -> None:
    x = qkv(tokens, tokens, hq=heads, hkv=heads)[0]
    gen = torch.Generator().manual_seed(bits)
    directions = torch.randn(3, own, 32, bits, generator=gen)
    found = bucket_attention.gray_ranks(x.to(device), directions.to(device)).cpu()
    projections = torch.matmul(x.double(), directions.double().repeat_interleave(heads // own, 1)[:, None])
    clear = (projections.abs() > 1e-4).all(-1)
    assert float(clear.double().mean()) > 0.98
    for level in range(3):
        own_directions = directions[level].repeat_interleave(heads // own, 0)
        wanted = gray_rank(x.float()[:, :, None], own_directions)[:, :, 0]
        assert torch.equal(found[level][clear[level]].long(), wanted[clear[level]])


@pytest.mark.parametrize(
    ("n", "m", "params"),
    [
        (256, 256, {}),
        (301, 301, {"block": 24}),  # blocks that do not divide a square
        (150, 310, {"samples": 5}),  # rows of a cached prefix are missing in some squares
        (280, 280, {"sink": 32, "samples": 7, "block": 40}),
        (128, 128, {"min_seq_len": 32, "sink": 32}),  # a square that is all sink
        (200, 200, {"per_head": True, "samples": 0}),
        (200, 200, {"samples": 128, "sink": 16}),  # every key once
    ],
    ids=str,
)
def test_the_residual_equals_the_plain_one(
    device: str, n: int, m: int, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv(n, m, batch=1 if n == 301 else 2)
    rest = squares_of(q, k, **params)
    draws = [((directions * 64).round() / 64, picks) for directions, picks in rest.draws(2, 32, m, torch.device("cpu"))]
    monkeypatch.setattr(Squares, "draws", lambda self, heads, d, m, to: iter([(x.to(to), picks.to(to)) for x, picks in draws]))
    expected, expected_lse = rest(q.float(), k.float(), v.float(), scale=0.2, softcap=0.0)
    calls: list[int] = []

    def kernels(q: Tensor, softcap: float) -> Any:
        calls.append(1)
        return bucket_attention

    monkeypatch.setattr(hyper_squares, "bucket_kernels", kernels)
    out, lse = rest(q.to(device), k.to(device), v.to(device), scale=0.2, softcap=0.0)
    assert calls
    torch.testing.assert_close(lse.cpu(), expected_lse, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(out.cpu(), expected, atol=4e-3, rtol=4e-3)


def test_hyperattention_finds_its_kernels() -> None:
    """A failed import would only make it slow."""
    assert kernel_module("bucket_attention") is bucket_attention
