"""What tests of selectors share: a layer of the workloads' usual shape, a checked plan, true attention, recall, needles."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from workloads import Shape, Workload, s1_noise

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import PrefillMethod

LAYER = LayerSpec(0, 4, 2, 32, 1 / math.sqrt(32))


def plan_of(method: PrefillMethod, q: Tensor, k: Tensor, layer: LayerSpec = LAYER) -> TilePlan:
    """The method's plan, which must exist and hold every invariant."""
    plan = method.plan(q, k, layer)
    assert plan is not None
    plan.check()
    return plan


def probabilities(q: Tensor, k: Tensor, layer: LayerSpec = LAYER) -> Tensor:
    """[B, Hq, N, M] float64, dense causal attention."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * layer.scale
    n, m = logits.shape[-2:]
    return logits.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf).softmax(-1)


def kept_mass(plan: TilePlan, x: Workload, layer: LayerSpec = LAYER) -> Tensor:
    """[B, Hq, N] float64: the true attention mass of the keys that each row keeps."""
    mask = plan.to_dense_mask()
    return (probabilities(x.q, x.k, layer) * mask.repeat_interleave(x.q.shape[1] // mask.shape[1], 1)).sum(-1)


def needles(shape: Shape, places: Mapping[int, tuple[float, Tensor]], rows: slice = slice(-32, None), seed: int = 3) -> Workload:
    """Noise in which some query rows match runs of keys.

    Args:
        places: first key of a run -> (scaled logit of a match, sign of each key of the run, [length]).
        rows: the query rows that match; all others are orthogonal to the runs.
    """
    x = s1_noise(shape, seed)
    unit = torch.nn.functional.normalize(torch.randn(shape.head_size, generator=torch.Generator().manual_seed(seed)), dim=0)
    q, k = (y - (y @ unit)[..., None] * unit for y in (x.q, x.k))
    q[:, :, rows] += unit * math.sqrt(shape.head_size)  # so that a run's keys carry its logit
    for first, (logit, signs) in places.items():
        k[:, :, first : first + len(signs)] += logit * signs[:, None] * unit
    return Workload(q, k, x.v)
