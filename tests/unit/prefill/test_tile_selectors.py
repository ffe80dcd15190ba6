"""What XAttention, MInference, FlashPrefill and Prism share: no workload here is special to one of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from selection import LAYER, plan_of
from workloads import Shape, s7_mixture

from winnow.workers.prefill import scoring
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods.flashprefill import FlashPrefill
from winnow.workers.prefill.methods.minference import MInference
from winnow.workers.prefill.methods.prism import Prism
from winnow.workers.prefill.methods.xattention import XAttention

pytestmark = pytest.mark.slow

LONG = Shape(1000, 1000)  # ragged in tiles of 32
METHODS = {
    "xattention": XAttention(block=32, threshold=0.6),
    "minference": MInference(block=32, vertical_tokens=24, slash_tokens=20, sink_tokens=4, recent_tokens=8),
    "flashprefill": FlashPrefill(block=32, alpha=0.7, sink_tiles=1, window_tiles=1, dense_tail=0),
    "flashprefill-kv": FlashPrefill(block=32, alpha=0.7, sink_tiles=1, window_tiles=1, dense_tail=0, per_kv_head=True),
    "prism": Prism(block=32, threshold=0.6),
}
each = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@each
@pytest.mark.parametrize("shape", [LONG, Shape(700, 1003)], ids=str)
def test_slabs_of_heads_and_rows_give_the_same_plan(method: PrefillMethod, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    x = s7_mixture(shape, 6)
    plan = plan_of(method, x.q, x.k)
    assert plan.density() < 0.85
    whole = plan.to_dense_mask()
    monkeypatch.setattr(scoring, "SLAB_BYTES", 1)
    assert torch.equal(whole, plan_of(method, x.q, x.k).to_dense_mask())


@each
def test_a_share_of_the_heads_gets_its_share_of_the_plan(method: PrefillMethod) -> None:
    """What tensor parallelism needs."""
    x = s7_mixture(LONG, 6)
    whole = plan_of(method, x.q, x.k).to_dense_mask()
    half = plan_of(method, x.q[:, 2:], x.k[:, 1:]).to_dense_mask()
    assert torch.equal(whole[:, whole.shape[1] // 2 :], half)


@each
def test_the_layers_scale_and_softcap_enter_the_selection(method: PrefillMethod) -> None:
    x = s7_mixture(LONG, 4)
    plain = plan_of(method, x.q, x.k).to_dense_mask()
    rescaled = plan_of(method, x.q * 2, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 2)).to_dense_mask()
    assert torch.equal(plain, rescaled)
    cooler = plan_of(method, x.q, x.k, dataclasses.replace(LAYER, scale=LAYER.scale / 8)).to_dense_mask()
    capped = plan_of(method, x.q, x.k, dataclasses.replace(LAYER, softcap=1.0)).to_dense_mask()
    assert not torch.equal(plain, cooler) and not torch.equal(plain, capped)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_nearly_the_same_and_changes_no_input(method: PrefillMethod, dtype: torch.dtype) -> None:
    x = s7_mixture(LONG, 6)
    q, k = x.q.to(dtype), x.k.to(dtype)
    before = q.clone(), k.clone()
    half = plan_of(method, q, k).to_dense_mask()
    assert torch.equal(before[0], q) and torch.equal(before[1], k)
    full = plan_of(method, q.float(), k.float()).to_dense_mask()
    causal = torch.ones(1000, 1000, dtype=torch.bool).tril()
    assert float((half == full)[..., causal].float().mean()) > 0.97


def test_slabs_cover_every_row_of_every_head_once_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1, 1 << 16, 1 << 20, 1 << 40):
        monkeypatch.setattr(scoring, "SLAB_BYTES", limit)
        for heads, n, m, block in ((3, 1000, 1000, 32), (8, 9000, 9100, 128), (1, 1, 7, 64)):
            seen = torch.zeros(heads, n, dtype=torch.int64)
            for which, first, end in scoring.slabs(heads, n, m, block, 2.0):
                seen[which, first:end] += 1
                assert first % block == 0 and (end % block == 0 or end == n)
                alone = which.stop - which.start == 1 and end - first <= block
                assert alone or (which.stop - which.start) * (end - first) * m * 2.0 <= limit
            assert bool((seen == 1).all())


@each
def test_no_plan_waits_for_the_device(method: PrefillMethod) -> None:
    """On the meta device, which has shapes and no values, reading any value back raises."""
    q, k = torch.empty(1, 4, 700, 32, device="meta"), torch.empty(1, 2, 1003, 32, device="meta")
    plan = method.plan(q, k, LAYER)
    assert plan is not None and plan.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        plan.density()
