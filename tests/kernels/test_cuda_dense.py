"""Few rows over many keys: the keys are cut into pieces, so that all of a GPU has work, and merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.workers.attention import blocks, cuda
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plain import plain

SCALE = 0.125


def make(n: int, m: int, device: str, dtype: torch.dtype, hq: int = 8, hkv: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(n + m)
    made = (torch.randn(1, tokens, heads, 64, generator=gen) for tokens, heads in ((n, hq), (m, hkv), (m, hkv)))
    q, k, v = (x.transpose(1, 2).to(device, dtype) for x in made)
    return q, k, v


@pytest.mark.parametrize(("pieces", "m"), [(2, 600), (3, 600), (4, 603), (5, 5)])
def test_pieces_give_what_all_keys_give_at_once(pieces: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic, with the CPU's fused kernel in cuDNN's place."""
    q, k, v = make(70, m, "cpu", torch.float32)
    monkeypatch.setattr(cuda, "_cudnn", lambda q, k, v, scale, causal: blocks.block(q, k, v, scale=scale, causal=causal))
    monkeypatch.setattr(cuda, "_pieces", lambda q, k: pieces)
    out, lse = cuda._in_pieces(q, k, v, SCALE, causal=False)
    expected, expected_lse = plain(q, k, v, scale=SCALE)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [65_536, 70_001])
def test_a_short_end_of_a_long_prompt(m: int, dtype: torch.dtype) -> None:
    q, k, v = make(128, m, "cuda", dtype)
    assert cuda._pieces(q, k) > 1 and cuda._pieces(q, k[:, :, : cuda._PIECE_KEYS]) <= 1 and cuda._pieces(k, k) <= 1
    cuda._refused.clear()
    out, lse = attend_plan(None, q, k, v, scale=SCALE)
    assert not cuda._refused
    key, position = torch.arange(m, device="cuda"), torch.arange(m - 128, m, device="cuda")
    expected, expected_lse = plain(q.float(), k.float(), v.float(), scale=SCALE, mask=key <= position[:, None])
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=2e-3)
