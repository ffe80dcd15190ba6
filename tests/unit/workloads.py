"""Seeded synthetic q, k, v with known structure, for tests that need no model. One function per workload, S1 to S7.

Every function returns q [B, Hq, N, D], k and v [B, Hkv, M, D] in float32 with M >= N; query row i sits at position
i + M - N. Logits are meant to be scaled by 1 / sqrt(D). `planted` says where the structure is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PEAK = 8.0  # scaled logit of a planted match


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. g = q_heads // kv_heads query heads share a KV head."""

    n: int
    m: int
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_size: int = 32


@dataclass(frozen=True)
class Workload:
    q: Tensor
    k: Tensor
    v: Tensor
    planted: dict[str, list[int]] = field(default_factory=dict)


def s1_noise(shape: Shape, seed: int = 0) -> Workload:
    """White noise: no structure at all."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = _noise(shape, gen)
    return Workload(q, k, v)


def s2_verticals(shape: Shape, seed: int = 0, columns: int = 4) -> Workload:
    """Some keys match every query. planted["columns"]: their positions."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = _noise(shape, gen)
    unit = _unit(shape, gen)
    places = torch.randperm(shape.m, generator=gen)[:columns].sort().values
    gain = math.sqrt(PEAK * math.sqrt(shape.head_size))
    k[:, :, places] += gain * unit
    return Workload(q + gain * unit, k, v, {"columns": places.tolist()})


def s3_slashes(shape: Shape, seed: int = 0, offset: int | None = None) -> Workload:
    """Rotary vectors whose logits depend on p - j only and peak at one distance. planted["offset"]: that distance."""
    gen = torch.Generator().manual_seed(seed)
    _, _, v = _noise(shape, gen)
    offset = shape.m // 3 if offset is None else offset
    half = shape.head_size // 2
    angle = 2.0 * torch.rand(half, generator=gen, dtype=torch.float64)  # many unrelated frequencies: no second peak
    base = torch.randn(half, 2, generator=gen, dtype=torch.float64)
    base *= math.sqrt(3 * PEAK * math.sqrt(shape.head_size)) / base.norm()

    def rotated(position: Tensor) -> Tensor:
        turn = position.double()[:, None] * angle
        x, y = base[:, 0], base[:, 1]
        return torch.cat((x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()), -1).float()

    q = rotated(torch.arange(shape.n) + shape.m - shape.n).expand(shape.batch, shape.q_heads, -1, -1).clone()
    k = rotated(torch.arange(shape.m) + offset).expand(shape.batch, shape.kv_heads, -1, -1).clone()
    return Workload(q, k, v, {"offset": [offset]})


def s4_segments(shape: Shape, seed: int = 0) -> Workload:
    """Runs of equal topic, lengths 64 to 1024 (at most a quarter of the keys); rows match keys of their own topic."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = _noise(shape, gen)
    longest = max(65, min(1024, shape.m // 4))
    topic_of = torch.empty(shape.m, dtype=torch.int64)
    start, n_topics = 0, 4
    while start < shape.m:
        length = int(torch.randint(64, longest + 1, (1,), generator=gen))
        topic_of[start : start + length] = int(torch.randint(0, n_topics, (1,), generator=gen))
        start += length
    topics = torch.nn.functional.normalize(torch.randn(n_topics, shape.head_size, generator=gen), dim=-1)
    topics = topics * math.sqrt(PEAK * math.sqrt(shape.head_size))
    return Workload(0.3 * q + topics[topic_of[shape.m - shape.n :]], 0.3 * k + topics[topic_of], v)


def s5_sink(shape: Shape, seed: int = 0) -> Workload:
    """Key 0 takes about half of every late row's mass and has a value near zero."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = _noise(shape, gen)
    unit = _unit(shape, gen)
    logit = math.log(shape.m) + 0.5  # the noise keys sum to about M exp(1/2)
    gain = math.sqrt(logit * math.sqrt(shape.head_size))
    k[:, :, 0] = gain * unit[0, 0]
    v[:, :, 0] *= 0.01
    return Workload(q - (q @ unit[0, 0, 0])[..., None] * unit + gain * unit, k, v, {"columns": [0]})


def s6_needle(shape: Shape, seed: int = 0, width: int = 32) -> Workload:
    """`width` keys matched by the last `width` rows only. planted["needle"]: first of them."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = _noise(shape, gen)
    unit = _unit(shape, gen)
    gain = math.sqrt(PEAK * math.sqrt(shape.head_size))
    first = (shape.m // 2) // width * width
    q = q - (q @ unit[0, 0, 0])[..., None] * unit
    q[:, :, -width:] += gain * unit
    k[:, :, first : first + width] += gain * unit
    return Workload(q, k, v, {"needle": [first]})


def s7_mixture(shape: Shape, seed: int = 0) -> Workload:
    """Each KV head and its group from one of S2 to S6, plus noise of a tenth of the signal."""
    gen = torch.Generator().manual_seed(seed)
    parts: tuple[Callable[[Shape, int], Workload], ...] = (s2_verticals, s3_slashes, s4_segments, s5_sink, s6_needle)
    group = shape.q_heads // shape.kv_heads
    qs, ks, vs = [], [], []
    one = Shape(shape.n, shape.m, shape.batch, group, 1, shape.head_size)
    for head in range(shape.kv_heads):
        part = parts[int(torch.randint(0, len(parts), (1,), generator=gen))](one, seed * 97 + head)
        for target, x in ((qs, part.q), (ks, part.k), (vs, part.v)):
            target.append(x + 0.1 * x.std() * torch.randn(x.shape, generator=gen))
    return Workload(torch.cat(qs, 1), torch.cat(ks, 1), torch.cat(vs, 1))


WORKLOADS: dict[str, Callable[[Shape, int], Workload]] = {
    "S1": s1_noise,
    "S2": s2_verticals,
    "S3": s3_slashes,
    "S4": s4_segments,
    "S5": s5_sink,
    "S6": s6_needle,
    "S7": s7_mixture,
}


def _noise(shape: Shape, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(shape.batch, shape.q_heads, shape.n, shape.head_size, generator=gen)
    k = torch.randn(shape.batch, shape.kv_heads, shape.m, shape.head_size, generator=gen)
    v = torch.randn(shape.batch, shape.kv_heads, shape.m, shape.head_size, generator=gen)
    return q, k, v


def _unit(shape: Shape, gen: torch.Generator) -> Tensor:
    """[1, 1, 1, D] of length 1."""
    return torch.nn.functional.normalize(torch.randn(1, 1, 1, shape.head_size, generator=gen), dim=-1)
