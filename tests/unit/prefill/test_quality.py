"""What a sparse prefill says about itself is true: pairs kept are the plan's, and the mass kept is that of exact attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from selection import LAYER, kept_mass
from workloads import Shape, Workload, s1_noise, s4_segments, s7_mixture

from winnow.index.layout import SegmentLayout
from winnow.index.segment import KVSegment
from winnow.registry import Capabilities
from winnow.workers.attention.backend import RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.prefill import quality
from winnow.workers.prefill.backend import PrefillBackend, Tally
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.methods.flexprefill import FlexPrefill
from winnow.workers.prefill.methods.xattention import XAttention
from winnow.workers.prefill.quality import kept_shares, rows_to_measure, sample_rows

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHAPES = (Shape(333, 1003), Shape(300, 300, batch=2), Shape(1, 70), Shape(128, 256))


def mask_of(shape: Shape, heads: int, bq: int, bk: int, share: float = 0.3) -> torch.Tensor:
    gen = torch.Generator().manual_seed(5)
    return torch.rand(shape.batch, heads, -(-shape.n // bq), -(-shape.m // bk), generator=gen) < share


def tiles(shape: Shape, heads: int, bq: int, bk: int, **more: Any) -> TilePlan:
    return TilePlan.from_mask(mask_of(shape, heads, bq, bk), n_rows=shape.n, n_keys=shape.m, block_q=bq, block_k=bk, **more)


def with_columns(shape: Shape) -> TilePlan:
    chosen = torch.rand(shape.batch, 4, 1, shape.m, generator=torch.Generator().manual_seed(6)) < 0.1
    columns = TileLists.from_mask(chosen.expand(-1, -1, -(-shape.n // 32), -1))
    return tiles(shape, 4, 32, 32, token_columns=columns)


def classes(shape: Shape) -> TilePlan:
    """A head of every class."""
    kinds = [HeadClass.DENSE, HeadClass.STREAMING, HeadClass.CSR, HeadClass.INTERVAL]
    class_ = torch.tensor([[int(kind) for kind in kinds]] * shape.batch, dtype=torch.int8)
    position = torch.arange(shape.n) + (shape.m - shape.n)
    intervals = torch.stack(((position - 40).clamp(min=0), position + 1), -1).expand(shape.batch, 4, -1, 2)
    budget = torch.full((shape.batch, 4), 7, dtype=torch.int32)
    return tiles(shape, 4, 32, 64, head_class=class_, sink=budget, recent=3 * budget, row_intervals=intervals)


PLANS: dict[str, Callable[[Shape], TilePlan]] = {
    "query heads": lambda shape: tiles(shape, 4, 32, 32),
    "KV heads, odd tiles": lambda shape: tiles(shape, 2, 48, 32),
    "one list, wide": lambda shape: tiles(shape, 1, 32, 128),
    "columns": with_columns,
    "every class": classes,
    "streaming": lambda s: TilePlan.streaming(batch=s.batch, mask_heads=1, n_rows=s.n, n_keys=s.m, sink=5, recent=50),
    "dense": lambda s: TilePlan.dense(batch=s.batch, mask_heads=1, n_rows=s.n, n_keys=s.m),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PLANS)
def test_kept_pairs_are_those_of_the_plans_mask(kind: str, shape: Shape) -> None:
    plan = PLANS[kind](shape)
    plan.check()
    assert torch.equal(plan.kept_pairs, plan.to_dense_mask().sum((-1, -2)))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PLANS)
def test_shares_of_the_mass_are_those_of_exact_attention(
    kind: str, shape: Shape, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = s7_mixture(shape, 2)
    layer = replace(LAYER, softcap=softcap)
    plan = PLANS[kind](shape)
    _, lse = attend_plan(plan, x.q, x.k, x.v, scale=layer.scale, softcap=softcap)
    rows = sample_rows(shape.n, 40, 1, CPU)
    keys = x.k.double().repeat_interleave(2, 1)
    logits = x.q.double() @ keys.transpose(-1, -2) * layer.scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    seen = torch.ones(shape.n, shape.m, dtype=torch.bool).tril(shape.m - shape.n)
    exact = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    mask = plan.to_dense_mask()
    expected = (exact * mask.repeat_interleave(4 // mask.shape[1], 1)).sum(-1)[:, :, rows].float()
    torch.testing.assert_close(kept_shares(x.q, x.k, lse, layer, rows), expected, atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(quality, "SLAB_BYTES", 1)
    torch.testing.assert_close(kept_shares(x.q, x.k, lse, layer, rows), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_a_share_by_its_rounding_only(dtype: torch.dtype) -> None:
    shape = Shape(300, 300)
    x = s7_mixture(shape, 3)
    q, k, v = (y.to(dtype) for y in (x.q, x.k, x.v))
    plan = tiles(shape, 4, 32, 32)
    rows = sample_rows(300, 64, 2, CPU)
    _, lse = attend_plan(plan, q, k, v, scale=LAYER.scale)
    expected = kept_mass(plan, Workload(q.float(), k.float(), v.float()))[:, :, rows].float()
    torch.testing.assert_close(kept_shares(q, k, lse, LAYER, rows), expected, atol=3e-3, rtol=0)


def test_the_estimate_has_no_bias() -> None:
    """Over many samples it is the mean over all rows, within five standard errors of the samples' mean."""
    shape = Shape(700, 900)
    x = s4_segments(shape, 4)
    plan = tiles(shape, 4, 32, 32)
    truth = float(kept_mass(plan, x).mean())
    _, lse = attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale)
    found = torch.stack([kept_shares(x.q, x.k, lse, LAYER, sample_rows(700, 8, seed, CPU)).mean() for seed in range(300)])
    assert abs(float(found.mean()) - truth) <= 5 * float(found.std()) / math.sqrt(300)
    assert float(found.std()) > 1e-3, "the samples differ, or this says nothing"


def test_rows_are_few_in_a_short_pass_and_none_where_none_are_wanted() -> None:
    assert [rows_to_measure(n, 32) for n in (1, 300, 2048, 8192, 131072)] == [1, 2, 2, 8, 32]
    assert rows_to_measure(8192, 0) == 0


# -- through the backend --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(PrefillMethod):
    """Random tiles, or tiles with their rest as means."""

    caps: ClassVar[Capabilities] = Capabilities()
    name: ClassVar[str] = "fixed"
    correction: bool = False

    def plan(self, q: Any, k: Any, layer: Any, raw: Any = None) -> TilePlan | None:
        return tiles(Shape(q.shape[2], k.shape[2]), 4, 32, 32, mean_correction=self.correction)


def passed(method: PrefillMethod | None, x: Workload, chunk: int, measure_rows: int, layers: int = 2, window: int = 0) -> Tally:
    """A prompt through the backend, chunk by chunk, the same q, k and v in every layer."""
    n = x.q.shape[2]
    segment = KVSegment.create(SegmentLayout(layers, 2, 32, "fp32"), n)
    tally = Tally()
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        backend = PrefillBackend(segment, start, method, tally, measure_rows=measure_rows)
        for idx in range(layers):
            q, k, v = (y[0, :, start:end] for y in (x.q, x.k, x.v))
            backend.attend(replace(LAYER, idx=idx, window=window), q, k, v, RawQK(q, k))
        segment.advance([1] * (end - start))
    return tally


@pytest.mark.parametrize("chunk", [2048, 512])
def test_the_backends_estimate_is_near_the_truth_for_whole_and_chunked_prompts(chunk: int) -> None:
    n = 2048
    x = s7_mixture(Shape(n, n), 6)
    method = XAttention(block=32, threshold=0.5)
    truth, pairs = [], []
    for start in range(0, n, chunk):
        part = Workload(x.q[:, :, start : start + chunk], x.k[:, :, : start + chunk], x.v[:, :, : start + chunk])
        plan = method.plan(part.q, part.k, LAYER)
        assert plan is not None
        truth.append(kept_mass(plan, part).mean())
        pairs.append(float(plan.to_dense_mask().sum()))
    tally = passed(method, x, chunk, measure_rows=32, layers=64)  # two rows of each of 64 layers
    assert tally.recall == pytest.approx(float(torch.stack(truth).mean()), abs=0.01)
    assert tally.recall < 0.97, "nothing was lost: the comparison says nothing"
    assert tally.density == pytest.approx(sum(pairs) / (4 * n * (n + 1) / 2), rel=1e-9)


def test_dense_parts_count_as_wholly_kept() -> None:
    """FlexPrefill with a budget beyond the prompt leaves every layer dense: known to be 1 without a look."""
    x = s1_noise(Shape(400, 400), 1)
    tally = passed(FlexPrefill(), x, 400, measure_rows=32)
    assert (tally.recall, tally.density) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("method", "rows", "window"),
    [(None, 32, 0), (Fixed(), 0, 0), (Fixed(correction=True), 32, 0), (Fixed(), 32, 64)],
    ids=["dense", "switched off", "estimating", "window"],
)
def test_what_was_not_measured_is_not_a_number(method: PrefillMethod | None, rows: int, window: int) -> None:
    assert passed(method, s1_noise(Shape(300, 300), 1), 300, measure_rows=rows, window=window).recall is None


def test_measuring_changes_no_output() -> None:
    x = s7_mixture(Shape(300, 300), 1)
    outs = []
    for rows in (0, 32):
        segment = KVSegment.create(SegmentLayout(1, 2, 32, "fp32"), 300)
        backend = PrefillBackend(segment, 0, Fixed(), Tally(), measure_rows=rows)
        outs.append(backend.attend(LAYER, x.q[0], x.k[0], x.v[0], RawQK(x.q[0], x.k[0])))
    assert torch.equal(*outs)
