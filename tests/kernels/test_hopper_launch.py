"""What the launcher for Hopper decides, which needs no GPU."""

from __future__ import annotations

import pytest
import torch

from winnow.workers.attention.kernels.tile_attention.hopper import HopperLaunch, _is_readable, _slab, takes
from winnow.workers.attention.plan import TilePlan

MIB = 1 << 20


@pytest.mark.parametrize(
    ("kv_heads", "bytes_each", "together"), [(8, 4 * MIB, 8), (8, 16 * MIB, 2), (8, 64 * MIB, 1), (6, 9 * MIB, 3)]
)
def test_heads_worked_on_together_fit_in_l2_and_leave_no_smaller_slab(kv_heads: int, bytes_each: int, together: int) -> None:
    assert _slab(kv_heads, bytes_each) == together


def test_tma_reads_rows_of_whole_16_bytes_in_place() -> None:
    x = torch.empty(2, 3, 40, 64, dtype=torch.float16)
    assert _is_readable(x) and _is_readable(x[:, :, 8:]) and _is_readable(x.transpose(1, 2))
    assert not _is_readable(x[..., ::2])
    assert not _is_readable(x[:, :1].expand(2, 3, 40, 64))
    assert not _is_readable(torch.empty(2, 3, 40, 68, dtype=torch.float16)[..., :60])
    assert not _is_readable(torch.empty(64 * 41, dtype=torch.float16)[1 : 1 + 40 * 64].view(1, 1, 40, 64))


def test_64_row_tiles_are_paired_only_where_heads_share_keys_and_list() -> None:
    assert HopperLaunch.choose(128, 64, 64, pairs=True).pack == 2
    alone = HopperLaunch.choose(128, 64, 64, pairs=False)
    assert (alone.pack, alone.consumers, alone.programs) == (1, 1, 2)
    assert HopperLaunch.choose(128, 128, 64, pairs=True).pack == 1


def test_nothing_is_taken_on_a_cpu() -> None:
    x = torch.zeros(1, 1, 128, 64, dtype=torch.float16)
    plan = TilePlan.dense(batch=1, mask_heads=1, n_rows=128, n_keys=128)
    assert not takes(plan, x, torch.empty_like(x), scale=1.0)
