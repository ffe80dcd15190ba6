"""Attention over keys listed one by one against the executor's plain path on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stored_cases import moved
from torch import Tensor

from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.kernels import row_attention
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import TileLists

SCALE = 0.2


def made(batch: int, heads: int, n: int, m: int, share: float) -> TilePlan:
    """Rows with their own key and a share of those before, as tiles and as single keys; some rows of the first have none."""
    gen = torch.Generator().manual_seed(n + m)
    mask = torch.rand(batch, heads, n, m, generator=gen) < share / 2
    keys = torch.arange(m).expand(batch * heads * n, m)
    columns = TileLists.from_ids(keys, torch.rand(keys.shape, generator=gen) < share / 2)
    return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=1, block_k=1, token_columns=columns)


def qkv(batch: int, hq: int, hkv: int, n: int, m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(m)
    q = torch.randn(batch, n, hq, d, generator=gen).half().transpose(1, 2)
    cache = torch.full((2, batch, hkv, m + 5, d), torch.nan, dtype=torch.float16)
    cache[:, :, :, :m] = torch.randn(2, batch, hkv, m, d, generator=gen).half()
    return q, cache[0, :, :, :m], cache[1, :, :, :m]


@pytest.mark.parametrize(
    ("batch", "hq", "hkv", "heads", "n", "m", "d"),
    [(2, 4, 2, 4, 9, 9, 32), (2, 4, 2, 2, 5, 150, 64), (1, 3, 1, 1, 12, 40, 48), (1, 2, 2, 2, 1, 300, 128)],
)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (3.0, 0), (0.0, 17)])
def test_rows_read_what_their_lists_say(
    device: str, batch: int, hq: int, hkv: int, heads: int, n: int, m: int, d: int, softcap: float, window: int
) -> None:
    q, k, v = qkv(batch, hq, hkv, n, m, d)
    plan = made(batch, heads, n, m, 0.4)
    expected, expected_lse = attend_plan(plan, q.float(), k.float(), v.float(), scale=SCALE, softcap=softcap, window=window)
    on_device = (x.to(device) for x in (q, k, v))
    out, lse = row_attention.row_attention(moved(plan, device, room=7), *on_device, scale=SCALE, softcap=softcap, window=window)
    torch.testing.assert_close(lse.cpu(), expected_lse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.cpu().float(), expected, atol=2e-3, rtol=2e-3)


def test_a_row_without_a_key_gets_nothing(device: str) -> None:
    q, k, v = (x.to(device) for x in qkv(1, 2, 1, 3, 9, 32))
    plan = moved(made(1, 1, 3, 9, 0.5), device, room=7)
    plan = replace(plan, full=TileLists.empty(3, device), token_columns=None)
    out, lse = row_attention.row_attention(plan, q, k, v, scale=SCALE)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_only_single_keys_on_cuda_fit() -> None:
    plan = made(1, 2, 5, 9, 0.5)
    assert not row_attention.fits(plan, torch.zeros(1, 2, 5, 32))
    tiles = TilePlan.from_mask(torch.ones(1, 2, 1, 2, dtype=torch.bool), n_rows=5, n_keys=9, block_q=8, block_k=8)
    stream = TilePlan.streaming(batch=1, mask_heads=2, n_rows=5, n_keys=9, sink=0, recent=2, block_q=1, block_k=1)
    assert stream.kinds == {HeadClass.STREAMING}

    class OnCuda(torch.Tensor):
        is_cuda = True

    q = torch.zeros(1, 2, 5, 32).as_subclass(OnCuda)
    assert [row_attention.fits(x, q) for x in (plan, tiles, stream, replace(plan, mean_correction=True))] == [True] + [False] * 3
