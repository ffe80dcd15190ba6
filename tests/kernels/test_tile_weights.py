"""The kernel of mean correction's weights against plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch
from stored_cases import moved
from torch import Tensor

from winnow.workers.attention import estimates
from winnow.workers.attention.kernels import kernel_module, tile_weights
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import TileLists


def made(n: int, m: int, bq: int, bk: int, columns: float, classes: bool, share: float = 0.3) -> TilePlan:
    gen = torch.Generator().manual_seed(n + m)
    n_q, n_k = -(-n // bq), -(-m // bk)
    mask = torch.rand(2, 3, n_q, n_k, generator=gen) < share
    head_class, some = None, None
    if classes:
        head_class = torch.tensor([[HeadClass.CSR, HeadClass.DENSE, HeadClass.STREAMING]] * 2, dtype=torch.int8)
    if columns:
        keys = torch.arange(m).expand(2 * 3 * n_q, m)
        some = TileLists.from_ids(keys, torch.rand(keys.shape, generator=gen) < columns)
    ones = torch.ones(2, 3, dtype=torch.int32)
    return TilePlan.from_mask(
        mask, n_rows=n, n_keys=m, block_q=bq, block_k=bk, head_class=head_class, sink=ones, recent=ones, token_columns=some,
        mean_correction=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n", "m", "bq", "bk"), [(100, 100, 16, 16), (70, 333, 32, 16), (33, 97, 8, 4), (5, 3000, 16, 2), (16, 20, 16, 32)]
)
@pytest.mark.parametrize(("columns", "window"), [(0.0, 0), (0.2, 0), (1.0, 0), (0.2, 41)])
@pytest.mark.parametrize("classes", [False, True])
def test_weights_equal_the_plain_ones(
    device: str, n: int, m: int, bq: int, bk: int, columns: float, window: int, classes: bool
) -> None:
    plan = made(n, m, bq, bk, columns, classes)
    expected = estimates.log_weights(plan, window)
    found = tile_weights.log_weights(moved(plan, device, room=7), window)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-6)
    values: Tensor = expected[expected.isfinite()]
    assert m < 3 * bk or (columns == 1.0) == (values.numel() == 0)


def test_nothing_listed_and_all_listed(device: str) -> None:
    for share in (0.0, 1.0):
        plan = made(64, 128, 16, 16, 0.0, False, share)
        found = tile_weights.log_weights(moved(plan, device, room=7)).cpu()
        assert torch.equal(found, estimates.log_weights(plan))
        assert bool(found.isfinite().any()) == (share == 0.0)


def test_mean_correction_finds_its_kernel() -> None:
    """A failed import would only make it slow."""
    assert kernel_module("tile_weights") is tile_weights
