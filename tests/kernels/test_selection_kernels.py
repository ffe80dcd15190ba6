"""The kernels of lists and selectors against plain torch on the CPU: what they replace is the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.kernels import kernel_module, row_choice, tile_lists, tile_scores
from winnow.workers.attention.tiles import TileLists
from winnow.workers.prefill import quality, scoring
from winnow.workers.prefill.methods import recall, xattention
from winnow.workers.prefill.methods.flashprefill import FlashPrefill
from winnow.workers.prefill.methods.recall import tile_mass
from winnow.workers.prefill.methods.xattention import XAttention

CASES = [(130, 130), (100, 333), (64, 64), (257, 260)]


def qk(n: int, m: int, device: str, *, batch: int = 2, hq: int = 4, hkv: int = 2, d: int = 32) -> tuple[Tensor, Tensor]:
    """float16 q, a transposed view, and k, a slice of a longer cache whose rest is NaN; on the CPU and the device alike."""
    gen = torch.Generator().manual_seed(n + m)
    q = torch.randn(batch, n, hq, d, generator=gen).half().transpose(1, 2)
    cache = torch.full((batch, hkv, m + 5, d), torch.nan, dtype=torch.float16)
    cache[:, :, :m] = torch.randn(batch, hkv, m, d, generator=gen).half()
    return q.to(device), cache.to(device)[:, :, :m]


def on_cpu(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, LayerSpec]:
    return q.cpu().float(), k.cpu().float(), LayerSpec(0, q.shape[1], k.shape[1], q.shape[3], q.shape[3] ** -0.5)


@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (4, 1300), (1, 64)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_rows_are_compacted_as_on_the_cpu(device: str, shape: tuple[int, int], with_ids: bool) -> None:
    gen = torch.Generator().manual_seed(sum(shape))
    keep = torch.rand(shape, generator=gen) < 0.4
    ids = torch.randint(0, 1 << 30, shape, generator=gen) if with_ids else None
    expected = TileLists.from_mask(keep) if ids is None else TileLists.from_ids(ids, keep)
    found = tile_lists.compact_rows(keep.to(device), None if ids is None else ids.to(device), expected.offsets.to(device))
    assert torch.equal(found[: expected.ids.numel()].cpu(), expected.ids)


def test_flat_entries_are_compacted_as_on_the_cpu(device: str) -> None:
    gen = torch.Generator().manual_seed(0)
    keep, ids = torch.rand(3000, generator=gen) < 0.3, torch.randint(0, 1 << 30, (3000,), generator=gen)
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    found = tile_lists.compact(keep.to(device), before.to(device), ids.to(device))
    assert torch.equal(found[: int(keep.sum())].cpu(), ids[keep].int())


@pytest.mark.parametrize("columns", [1, 31, 100, 1024, 1500])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_entries_are_kept_as_by_sorting(device: str, columns: int, tied: bool) -> None:
    gen = torch.Generator().manual_seed(columns)
    scores = torch.randn(2, 9, columns, generator=gen)
    scores = (scores * 2).round() / 2 if tied else scores
    scores[0, 0] = -torch.inf
    scores[0, 1, ::2] = -torch.inf
    scores[1, 2, :1] = torch.inf
    count = torch.randint(0, columns + 2, (2, 9), generator=gen)
    found = row_choice.choose(scores.to(device), count.to(device), share=False).cpu()
    assert torch.equal(found, scoring.keep_top(scores, count))
    assert torch.equal(row_choice.choose(scores.to(device), 3, share=False).cpu(), scoring.keep_top(scores, 3))


@pytest.mark.parametrize("columns", [1, 31, 100, 1024, 1500])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_shares_are_kept_as_by_sorting(device: str, columns: int, tied: bool) -> None:
    gen = torch.Generator().manual_seed(columns)
    shares = torch.rand(2, 9, columns, generator=gen) * (torch.rand(2, 9, columns, generator=gen) < 0.7)
    shares = (shares * 8).round() / 8 if tied else shares  # then sums are exact in any order
    wanted = torch.rand(2, 9, generator=gen) * shares.sum(-1) * 1.2 - 0.1
    wanted = (wanted * 16).round() / 16 if tied else wanted
    found = row_choice.choose(shares.to(device), wanted.to(device), share=True).cpu()
    expected = scoring.keep_share(shares, wanted)
    assert torch.equal(found, expected) if tied else (found != expected).sum() <= 1


@pytest.mark.parametrize(("n", "m"), CASES)
@pytest.mark.parametrize("stride", [1, 4, 8, 32])
@pytest.mark.parametrize("slab", [1, 1 << 30])
def test_antidiagonal_shares_equal_the_plain_ones(
    device: str, n: int, m: int, stride: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(n, m, device)
    method, (cpu_q, cpu_k, layer) = XAttention(stride=stride, block=32), on_cpu(q, k)
    expected = method.tile_shares(cpu_q, cpu_k, layer)
    monkeypatch.setattr(scoring, "SLAB_BYTES", slab)
    monkeypatch.setattr(xattention, "score_kernels", lambda q, layer: tile_scores)
    torch.testing.assert_close(method.tile_shares(q, k, layer).cpu(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("n", "m"), [(96, 160), (70, 97)])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_shares_of_cells_equal_their_definition(n: int, m: int, stride: int) -> None:
    q, k, layer = on_cpu(*qk(n, m, "cpu", batch=1, hq=1, hkv=1))
    expected = torch.zeros(-(-n // 32), -(-m // 32))
    for first in range(0, n, stride):
        rows = range(first, min(first + stride, n))
        seen = (rows[-1] + 1 + m - n) // stride
        logits = torch.zeros(seen)
        for cell in range(seen):
            for row in rows:  # row and key run against each other along the antidiagonal
                logits[cell] += q[0, 0, row] @ k[0, 0, cell * stride + stride - 1 - (row - first)] * layer.scale / len(rows)
        weights = torch.nn.functional.pad(torch.softmax(logits, -1), (0, -(-m // 32) * (32 // stride) - seen))
        expected[first // 32] += weights.view(-1, 32 // stride).sum(-1)
    found = XAttention(stride=stride, block=32).tile_shares(q, k, layer)[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "m"), CASES)
@pytest.mark.parametrize("every", [1, 8, 32])
@pytest.mark.parametrize("slab", [1, 1 << 30])
def test_shares_of_exact_rows_equal_the_plain_ones(
    device: str, n: int, m: int, every: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(n, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    expected = recall.tile_shares(cpu_q, cpu_k, layer, 32, every, 3)
    monkeypatch.setattr(recall, "SLAB_BYTES", slab)
    monkeypatch.setattr(recall, "score_kernels", lambda q, layer: tile_scores)
    torch.testing.assert_close(recall.tile_shares(q, k, layer, 32, every, 3).cpu(), expected, atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize(("n", "m"), CASES)
@pytest.mark.parametrize("programs", [1, 20, 1024])
def test_sampled_rows_have_their_exact_tile_mass_and_largest_logits(
    device: str, n: int, m: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_scores, "_PROGRAMS", programs)  # so one walks over all keys, over some or over 128 of them
    q, k = qk(n, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    rows = torch.tensor([0, 1, n // 2, n - 1])
    seen = (rows + (m - n + 1)).to(device)
    picked = q[:, :, rows.to(device)]
    lse, top = tile_scores.tile_lse(picked, k, seen, scale=layer.scale, block=32, top=True)
    torch.testing.assert_close(torch.softmax(lse, -1).cpu(), tile_mass(cpu_q, cpu_k, layer, rows, 32), atol=1e-3, rtol=1e-3)
    logits = scoring.logits_of(cpu_q[:, :, rows], cpu_k.repeat_interleave(2, 1), layer)
    logits.masked_fill_(torch.arange(m) > (rows + (m - n))[:, None], -torch.inf)
    assert top is not None
    torch.testing.assert_close(top.cpu(), scoring.pool_max(logits, 32), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("n", "m"), CASES)
def test_the_share_of_the_mass_that_was_read_is_measured_alike(
    device: str, n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(n, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    rows = torch.tensor([0, 1, n // 2, n - 1])
    lse = torch.randn(2, 4, n, generator=torch.Generator().manual_seed(0)) + torch.arange(m - n, m).add(1).log() - 1
    expected = quality.kept_shares(cpu_q, cpu_k, lse, layer, rows)
    assert float(expected.min()) < 0.2 and float(expected.max()) > 0.5, "worth comparing"
    monkeypatch.setattr(quality, "score_kernels", lambda q, layer: tile_scores)
    found = quality.kept_shares(q, k, lse.to(device), layer, rows.to(device))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=2e-3)


def test_shares_of_many_tiles_are_summed_alike(device: str) -> None:
    lse = torch.randn(1, 2, 50, 2500, generator=torch.Generator().manual_seed(0)).to(device)
    expected = torch.softmax(lse.double(), -1).float()
    expected = torch.nn.functional.pad(expected, (0, 0, 0, 14)).unflatten(2, (-1, 16)).sum(3)
    torch.testing.assert_close(tile_scores.sum_shares(lse, 16), expected)
    torch.testing.assert_close(
        tile_scores.sum_shares(lse[..., :300].contiguous(), 16)[:, :, :3],
        torch.softmax(lse[..., :300], -1)[:, :, :48].unflatten(2, (-1, 16)).sum(3),
    )


@pytest.mark.parametrize(("b", "m"), [(64, 200), (10, 130), (100, 100), (1, 300)])
@pytest.mark.parametrize("slab", [1, 1 << 30])
def test_probe_mass_equals_the_plain_one(device: str, b: int, m: int, slab: int) -> None:
    q, k = qk(b, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    expected = scoring.recent_mass(cpu_q, cpu_k, layer)
    for found, wanted in zip(tile_scores.probe_mass(q, k, scale=layer.scale, slab_bytes=slab), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("n", "m"), CASES)
@pytest.mark.parametrize(("block", "block_q"), [(32, 32), (64, 64), (128, 64), (64, 32)])
def test_pooled_energy_equals_the_plain_one(device: str, n: int, m: int, block: int, block_q: int) -> None:
    q, k = qk(n, m, device)
    cpu_q, cpu_k, layer = on_cpu(q, k)
    pooled = scoring.pool_mean(k, block).to(k.dtype)
    found = tile_scores.pooled_energy(q, pooled, past=m - n, block=block, block_q=block_q, scale=layer.scale)
    expected = FlashPrefill(block=block)._log_energy(cpu_q, cpu_k, layer, block_q)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=1e-2)


def test_lists_and_selectors_find_their_kernels() -> None:
    """A failed import would only make them slow."""
    for name, module in (("tile_lists", tile_lists), ("row_choice", row_choice), ("tile_scores", tile_scores)):
        assert kernel_module(name) is module
