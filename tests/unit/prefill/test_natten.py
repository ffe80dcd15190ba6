"""The prefill method "neighborhood": its plans against the causal rule, token by token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.neighborhood import Axis
from winnow.workers.prefill.methods.natten import Neighborhood

pytestmark = pytest.mark.slow

LAYER = LayerSpec(0, 4, 2, 8, 1 / math.sqrt(8))
SETTINGS = [(2, 1, 1), (40, 1, 1), (48, 1, 16), (48, 1, 24), (33, 1, 11), (32, 1, 32), (30, 2, 1), (20, 3, 5), (2, 100, 2)]


def rule(n: int, m: int, window: int, dilation: int, stride: int) -> Tensor:
    """[n, m] bool: as published for a sequence so long that no group of these m tokens is cut short."""
    room = -m % (dilation * stride)
    return Axis(m + room, window, dilation, stride, causal=True).mask()[m - n : m, :m]


def heads(n: int, m: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(m)
    q = torch.randn(batch, 4, n, 8, generator=gen)
    k, v = (torch.randn(batch, 2, m, 8, generator=gen) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("shape", [(300, 300), (257, 257), (96, 288), (100, 301), (1, 200)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_plan_and_output_follow_the_rule(shape: tuple[int, int], setting: tuple[int, int, int]) -> None:
    q, k, v = heads(*shape, batch=2)
    plan = Neighborhood(*setting).plan(q, k, LAYER)
    assert plan is not None
    plan.check()
    mask = rule(*shape, *setting)
    assert torch.equal(plan.to_dense_mask(), mask.expand(2, 1, -1, -1))
    n, m = shape
    assert plan.density() == pytest.approx(float(mask.sum()) / (n * (m - n) + n * (n + 1) / 2), abs=1e-12)
    out, lse = attend_plan(plan, q, k, v, scale=LAYER.scale)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * LAYER.scale
    logits = logits.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_only_the_last_groups_rows_differ_from_the_published_clamp(setting: tuple[int, int, int]) -> None:
    window, dilation, stride = setting
    m = 301
    ours, published = rule(m, m, *setting), Axis(m, window, dilation, stride, causal=True).mask()
    differing = (ours != published).any(-1).nonzero().view(-1)
    in_class = (m - 1 - torch.arange(m) % dilation) // dilation + 1
    cut_short = (torch.arange(m) // dilation) // stride == in_class // stride
    assert bool(cut_short[differing].all())
    assert bool((published | ~ours).all())  # the whole group's window reaches less far back
    if stride == 1:
        assert differing.numel() == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_any_chunks_give_the_one_shot_output(setting: tuple[int, int, int]) -> None:
    q, k, v = heads(290, 290)
    method = Neighborhood(*setting)
    whole, _ = attend_plan(method.plan(q, k, LAYER), q, k, v, scale=LAYER.scale)
    borders = [0, 37, 128, 129, 290]
    for start, stop in itertools.pairwise(borders):
        keys, values = k[:, :, :stop], v[:, :, :stop]
        plan = method.plan(q[:, :, start:stop], keys, LAYER)
        out, _ = attend_plan(plan, q[:, :, start:stop], keys, values, scale=LAYER.scale)
        torch.testing.assert_close(out, whole[:, :, start:stop], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("setting", "m", "dense"), [((64, 1, 1), 64, True), ((64, 1, 1), 65, False), ((64, 1, 32), 64, True),
    ((64, 1, 48), 48, True), ((64, 1, 48), 49, False), ((64, 2, 1), 64, False)])  # fmt: skip
def test_dense_where_the_window_holds_everything(setting: tuple[int, int, int], m: int, dense: bool) -> None:
    q, k, _ = heads(m, m)
    assert (Neighborhood(*setting).plan(q, k, LAYER) is None) == dense
    assert bool((rule(m, m, *setting) == torch.ones(m, m, dtype=torch.bool).tril()).all()) == dense


@pytest.mark.parametrize("shape", [(256, 256), (100, 301), (1, 7), (1, 1)])
@pytest.mark.parametrize("setting", [(1 << 50, 2, 1), (1 << 50, 3, 5), (1 << 50, 2, 1 << 50), (1 << 70, 1 << 70, 1 << 70),
    (40, 1 << 70, 7), (700, 3, 50)])  # fmt: skip
def test_what_a_request_asks_for_beyond_the_sequence_takes_no_memory(
    shape: tuple[int, int], setting: tuple[int, int, int]
) -> None:
    """A list of 1 << 50 candidates a row fits no machine. What is read is what the rule says, in whole numbers of any size."""
    (n, m), (window, dilation, stride) = shape, setting
    q, k, _ = heads(n, m)
    plan = Neighborhood(*setting).plan(q, k, LAYER)
    assert plan is not None
    plan.check()
    expected = torch.zeros(n, m, dtype=torch.bool)
    for row, i in enumerate(range(m - n, m)):
        last = i // dilation // stride * stride + stride - 1
        keys = [j for j in range(i + 1) if j % dilation == i % dilation and last - window < j // dilation]
        expected[row, keys] = True
    assert torch.equal(plan.to_dense_mask()[0, 0], expected)


def test_a_window_beyond_the_sequence_is_planned_as_the_one_that_just_holds_it() -> None:
    q, k, _ = heads(256, 256)
    plans = [Neighborhood(window=window, dilation=2).plan(q, k, LAYER) for window in (128, 1 << 50)]
    lists = [plan.token_columns for plan in plans if plan is not None]
    assert lists[0] is not None and lists[1] is not None
    assert torch.equal(lists[0].offsets, lists[1].offsets) and torch.equal(lists[0].ids, lists[1].ids)


@pytest.mark.parametrize(
    ("params", "field"),
    [({"window": 1}, "window"), ({"dilation": 0}, "dilation"), ({"stride": 0}, "stride"), ({"window": 8, "stride": 9}, "stride")],
)
def test_bad_parameters_are_refused_by_name(params: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Neighborhood(**params)
