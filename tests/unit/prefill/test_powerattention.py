"""PowerAttention against its rule written out pair by pair, and against the tile counts its authors' rule gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.methods.powerattention import PowerAttention

pytestmark = pytest.mark.slow

LAYER = LayerSpec(0, 2, 1, 8, 1 / math.sqrt(8))


def plan_of(n: int, m: int, method: PowerAttention = PowerAttention()) -> TilePlan:  # noqa: B008 - frozen
    plan = method.plan(torch.zeros(1, 2, n, 8), torch.zeros(1, 1, m, 8), LAYER)
    assert plan is not None
    return plan


def naive(n: int, m: int, block: int = 256, local: int = 5, sinks: int = 1) -> Tensor:
    """[n, m] bool, the published predicate at every pair of positions, with powers of two looked up in a list."""
    powers = {0} | {1 << x for x in range(32)}
    rule = torch.zeros(-(-m // block), -(-m // block), dtype=torch.bool)
    for own in range(rule.shape[0]):
        for other in range(own + 1):
            rule[own, other] = own - other < local or own - other in powers or other < sinks
    position, key = torch.arange(m - n, m), torch.arange(m)
    return rule[position // block][:, key // block] & (key <= position[:, None])


@pytest.mark.parametrize(
    ("tokens", "kept", "density"),
    [(4096, 88, 0.6471), (8192, 215, 0.4072), (16384, 502, 0.2413), (32768, 1141, 0.1382), (65536, 2548, 0.0775)],
)
def test_tile_counts_and_densities_of_the_published_defaults(tokens: int, kept: int, density: float) -> None:
    tiles = plan_of(tokens, tokens).tile_mask()[0, 0]  # of 128: a kept block is 2 x 2 of them, 3 on the diagonal
    blocks = tiles.view(tokens // 256, 2, tokens // 256, 2)
    assert int(tiles.sum()) == 4 * kept - tokens // 256
    assert int(blocks.any(3).any(1).sum()) == kept
    below = torch.ones(tokens // 256, tokens // 256, dtype=torch.bool).tril()
    assert round(kept / int(below.sum()), 4) == density
    assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1) | torch.eye(tokens // 256, dtype=torch.bool))


def test_128k_keeps_5619_blocks_and_the_full_square_at_32k_is_7_percent() -> None:
    counts = {}
    for tokens in (32768, 131072):
        block = torch.arange(tokens // 256)
        counts[tokens] = int(PowerAttention().reads(block[:, None], block).sum())
    assert counts[131072] == 5619 and round(5619 / (512 * 513 / 2), 4) == 0.0428
    assert round(counts[32768] / 128**2, 4) == 0.0696


@pytest.mark.parametrize(
    ("n", "m"),
    [(4096, 4096), (4095, 4095), (4000, 4000), (1, 4096), (1, 3001), (600, 4088), (512, 2560), (144, 2000), (2048, 4096)],
)
def test_every_pair_follows_the_rule(n: int, m: int) -> None:
    plan = plan_of(n, m)
    assert torch.equal(plan.to_dense_mask()[0, 0], naive(n, m))
    assert plan.density() == pytest.approx(float(naive(n, m).sum()) / (n * (m - n) + n * (n + 1) / 2), abs=1e-12)


@pytest.mark.parametrize("block", [16, 64, 128, 512])
@pytest.mark.parametrize(("local", "sinks"), [(1, 0), (2, 1), (3, 2)])
def test_every_pair_follows_the_rule_at_other_sizes(block: int, local: int, sinks: int) -> None:
    method = PowerAttention(block=block, local_blocks=local, sink_blocks=sinks)
    m = 11 * block + 7
    for n in (m, 5 * block + 7):
        assert torch.equal(plan_of(n, m, method).to_dense_mask()[0, 0], naive(n, m, block, local, sinks))


@pytest.mark.parametrize("m", [2003, 3001])
def test_off_sixteen_only_rows_beside_a_border_read_more_and_never_less(m: int) -> None:
    n = 1000
    kept, rule = plan_of(n, m).to_dense_mask()[0, 0], naive(n, m)
    assert bool((kept | ~rule).all())
    position = torch.arange(m - n, m)[(kept & ~rule).any(-1)]
    to_border = torch.minimum(position % 256, 255 - position % 256)
    assert position.numel() > 0 and int(to_border.max()) < 16


@pytest.mark.parametrize("blocks", [2, 16, 37, 64, 200])
def test_log2_layers_connect_every_pair_and_a_window_of_equal_budget_does_not(blocks: int) -> None:
    block = torch.arange(blocks)
    layers = math.ceil(math.log2(blocks))
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()

    def reached(mask: Tensor) -> Tensor:
        hops = mask.double()
        for _ in range(layers - 1):
            hops = ((hops @ mask.double()) > 0).double()
        return hops > 0

    mask = PowerAttention(local_blocks=1, sink_blocks=0).reads(block[:, None], block)
    assert torch.equal(reached(mask), causal)
    budget = int(mask.sum(-1).max())
    window = causal & (block[:, None] - block < budget)
    assert int(window.sum()) >= int(mask.sum())
    assert torch.equal(reached(window), causal) == (layers * (budget - 1) >= blocks - 1)  # False from 64 blocks on


def test_decoding_rows_read_what_the_last_row_of_prefill_reads_and_change_at_borders_only() -> None:
    method = PowerAttention(block=32, local_blocks=2)
    whole = naive(400, 400, 32, 2)
    before: Tensor | None = None
    for m in range(200, 400):
        row = plan_of(1, m, method)
        assert torch.equal(row.to_dense_mask()[0, 0, 0], whole[m - 1, :m])
        blocks = row.tile_mask()[0, 0, 0]
        same = before is not None and torch.equal(blocks, before)
        assert same == ((m - 1) % 32 != 0) or m == 200
        before = blocks


@pytest.mark.parametrize("local", [8, 100])
def test_enough_local_blocks_are_dense(local: int) -> None:
    method = PowerAttention(local_blocks=local)
    assert method.plan(torch.zeros(1, 2, 2000, 8), torch.zeros(1, 1, 2000, 8), LAYER) is None
    nearly = PowerAttention(local_blocks=6, sink_blocks=1)  # 8 blocks: only block 7 misses block 1
    kept = plan_of(2000, 2000, nearly).to_dense_mask()
    missing = torch.ones(2000, 2000, dtype=torch.bool).tril() & ~kept[0, 0]
    assert missing.nonzero().amin(0).tolist() == [1792, 256] and int(missing.sum()) == (2000 - 1792) * 256


def test_output_is_attention_over_the_rules_pairs() -> None:
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, m, 8, generator=gen) for heads, m in ((2, 500), (1, 724), (1, 724)))
    method = PowerAttention(block=64, local_blocks=2)
    out, _ = attend_plan(method.plan(q, k, LAYER), q, k, v, scale=LAYER.scale)
    logits = (q @ k.transpose(-1, -2) * LAYER.scale).masked_fill(~naive(500, 724, 64, 2), -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"block": 48}, "block"),
        ({"block": 0}, "block"),
        ({"local_blocks": 0}, "local_blocks"),
        ({"sink_blocks": -1}, "sink_blocks"),
    ],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        PowerAttention(**params)
