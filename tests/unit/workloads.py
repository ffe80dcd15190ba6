"""Seeded synthetic q, k, v with known structure, for tests and benchmarks that need no model. One function per workload.

Every function returns q [B, Hq, N, D], k and v [B, Hkv, M, D] in float32 with M >= N; query row i sits at position
i + M - N. Logits are meant to be scaled by 1 / sqrt(D). `planted` says where the structure is. Memory is O(N + M). What is
drawn depends on the seed and the kind of device: a GPU draws other numbers than a CPU.

S1 to S7 each hold one kind of structure; `model_like` lays several over each other in every head, as trained models do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

PEAK = 8.0  # scaled logit of a planted match


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. g = q_heads // kv_heads query heads share a KV head.

    Attributes:
        peak: scaled logit of a planted match (S2, S3, S4, S6); `of_length` raises it with the number of keys.
        topics: how many S4 draws from.
        device: where everything is drawn and lies.
    """

    n: int
    m: int
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    peak: float = PEAK
    topics: int = 4
    device: str = "cpu"

    def of_length(self) -> Shape:
        """The same sizes with structure that stays as strong and as sparse however many keys there are.

        Noise keys grow with M, so a match's logit grows with ln M beyond 512 keys; and a topic has about 4096 keys beyond 16K.
        """
        return replace(self, peak=PEAK + max(0.0, math.log(self.m / 512)), topics=max(4, self.m // 4096))

    def generator(self, seed: int) -> torch.Generator:
        """Seeded, on the shape's device."""
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Workload:
    q: Tensor
    k: Tensor
    v: Tensor
    planted: dict[str, list[int]] = field(default_factory=dict)


def s1_noise(shape: Shape, seed: int = 0) -> Workload:
    """White noise: no structure at all."""
    gen = shape.generator(seed)
    q, k, v = _noise(shape, gen)
    return Workload(q, k, v)


def s2_verticals(shape: Shape, seed: int = 0, columns: int = 4) -> Workload:
    """Some keys match every query. planted["columns"]: their positions."""
    gen = shape.generator(seed)
    q, k, v = _noise(shape, gen)
    unit = _unit(shape, gen)
    places = torch.randperm(shape.m, generator=gen, device=gen.device)[:columns].sort().values
    gain = math.sqrt(shape.peak * math.sqrt(shape.head_size))
    k[:, :, places] += gain * unit
    return Workload(q + gain * unit, k, v, {"columns": places.tolist()})


def s3_slashes(shape: Shape, seed: int = 0, offset: int | None = None) -> Workload:
    """Rotary vectors whose logits depend on p - j only and peak at one distance. planted["offset"]: that distance."""
    gen = shape.generator(seed)
    _, _, v = _noise(shape, gen)
    offset = shape.m // 3 if offset is None else offset
    half = shape.head_size // 2
    angle = 2.0 * torch.rand(
        half, generator=gen, dtype=torch.float64, device=gen.device
    )  # many unrelated frequencies: no second peak
    base = torch.randn(half, 2, generator=gen, dtype=torch.float64, device=gen.device)
    base *= math.sqrt(3 * shape.peak * math.sqrt(shape.head_size)) / base.norm()

    def rotated(position: Tensor) -> Tensor:
        turn = position.double()[:, None] * angle
        x, y = base[:, 0], base[:, 1]
        return torch.cat((x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()), -1).float()

    q = rotated(torch.arange(shape.n, device=gen.device) + shape.m - shape.n).expand(shape.batch, shape.q_heads, -1, -1).clone()
    k = rotated(torch.arange(shape.m, device=gen.device) + offset).expand(shape.batch, shape.kv_heads, -1, -1).clone()
    return Workload(q, k, v, {"offset": [offset]})


def s4_segments(shape: Shape, seed: int = 0) -> Workload:
    """Runs of equal topic, lengths 64 to 1024 (at most a quarter of the keys); rows match keys of their own topic."""
    gen = shape.generator(seed)
    q, k, v = _noise(shape, gen)
    topic_of = _segments(shape.m, shape.topics, gen)
    topics = torch.nn.functional.normalize(torch.randn(shape.topics, shape.head_size, generator=gen, device=gen.device), dim=-1)
    topics = topics * math.sqrt(shape.peak * math.sqrt(shape.head_size))
    return Workload(0.3 * q + topics[topic_of[shape.m - shape.n :]], 0.3 * k + topics[topic_of], v)


def s5_sink(shape: Shape, seed: int = 0) -> Workload:
    """Key 0 takes about half of every late row's mass and has a value near zero."""
    gen = shape.generator(seed)
    q, k, v = _noise(shape, gen)
    unit = _unit(shape, gen)
    logit = math.log(shape.m) + 0.5  # the noise keys sum to about M exp(1/2)
    gain = math.sqrt(logit * math.sqrt(shape.head_size))
    k[:, :, 0] = gain * unit[0, 0]
    v[:, :, 0] *= 0.01
    return Workload(q - (q @ unit[0, 0, 0])[..., None] * unit + gain * unit, k, v, {"columns": [0]})


def s6_needle(shape: Shape, seed: int = 0, width: int = 32) -> Workload:
    """`width` keys matched by the last `width` rows only. planted["needle"]: first of them."""
    gen = shape.generator(seed)
    q, k, v = _noise(shape, gen)
    unit = _unit(shape, gen)
    gain = math.sqrt(shape.peak * math.sqrt(shape.head_size))
    first = (shape.m // 2) // width * width
    q = q - (q @ unit[0, 0, 0])[..., None] * unit
    q[:, :, -width:] += gain * unit
    k[:, :, first : first + width] += gain * unit
    return Workload(q, k, v, {"needle": [first]})


def s7_mixture(shape: Shape, seed: int = 0) -> Workload:
    """Each KV head and its group from one of S2 to S6, plus noise of a tenth of the signal."""
    gen = shape.generator(seed)
    parts: tuple[Callable[[Shape, int], Workload], ...] = (s2_verticals, s3_slashes, s4_segments, s5_sink, s6_needle)
    group = shape.q_heads // shape.kv_heads
    qs, ks, vs = [], [], []
    one = replace(shape, q_heads=group, kv_heads=1)
    for head in range(shape.kv_heads):
        part = parts[int(torch.randint(0, len(parts), (1,), generator=gen, device=gen.device))](one, seed * 97 + head)
        for target, x in ((qs, part.q), (ks, part.k), (vs, part.v)):
            target.append(x + 0.1 * x.std() * torch.randn(x.shape, generator=gen, device=gen.device))
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


# What the heads of `model_like` hold beside sink and near keys, in turn.
HEAD_KINDS = ("columns", "slash", "topics", "near")


def model_like(shape: Shape, seed: int = 0) -> Workload:
    """Every head reads a sink, the keys near its row and, by turns of KV heads, one of HEAD_KINDS besides; the rest is noise.

    The logit of row i and key j is the sum of what is planted for the pair, and noise of deviation one half:

        sink     the first 4 keys. Together about a third of the last row's mass, more of earlier ones.
        near     a bell of |i - j| of deviation 96 or 384 tokens.
        columns  16 runs of 1 to 8 neighbouring keys, anywhere.
        slash    a bell of deviation 24 around one distance, for rows beyond it.
        topics   all earlier keys of the row's own topic, segments as in S4; its own segment stands for the near keys.
        near     nothing else.

    Sink, near keys and the head's own kind are meant to share a late row's mass equally, with a twentieth left for noise; at 128
    dimensions they get a tenth to a half each, at 64 the slash gets less. planted["columns"] and planted["offset"] hold what was
    drawn, a run's first keys only.
    Needs 64 dimensions or more: four for sink and columns, a quarter for topics or the slash, half for the near keys, and what
    is left for noise.
    """
    assert shape.head_size >= 64 and shape.head_size % 8 == 0, "model_like needs heads of 64 dimensions or more"
    gen = shape.generator(seed)
    d, group, root = shape.head_size, shape.q_heads // shape.kv_heads, math.sqrt(shape.head_size)
    near_pairs, own_pairs = d // 4, d // 8
    rest = d - 2 * near_pairs - 2 * own_pairs - 2
    at_k = torch.arange(shape.m, device=gen.device)
    at_q = at_k[shape.m - shape.n :]
    q = torch.zeros(shape.batch, shape.q_heads, shape.n, d, device=gen.device)
    k = torch.zeros(shape.batch, shape.kv_heads, shape.m, d, device=gen.device)
    v = torch.randn(k.shape, generator=gen, device=gen.device)
    mass = math.log(16.0 * shape.m)  # ln of a third of a row whose noise, M exp(1/4), is a thirtieth
    planted: dict[str, list[int]] = {"columns": [], "offset": []}
    near, own = slice(0, 2 * near_pairs), slice(2 * near_pairs, 2 * near_pairs + 2 * own_pairs)
    for head in range(shape.kv_heads):
        rows = slice(head * group, (head + 1) * group)
        spread = (96.0, 384.0)[(head // len(HEAD_KINDS)) % 2]
        kind = HEAD_KINDS[head % len(HEAD_KINDS)]
        if kind != "topics":
            _bell(q[:, rows, :, near], k[:, head, :, near], at_q, at_k, spread, mass - math.log(2 * spread), root, gen)
        gain_k = math.sqrt((mass - math.log(4)) * root)
        q[:, rows, :, own.stop], k[:, head, :4, own.stop] = gain_k, gain_k
        if kind == "columns":
            first = torch.randint(4, shape.m - 8, (16,), generator=gen, device=gen.device).sort().values
            length = torch.randint(1, 9, (16,), generator=gen, device=gen.device)
            run = torch.arange(8, device=gen.device)
            places = (first[:, None] + torch.where(run < length[:, None], run, 0)).flatten()
            gain = math.sqrt((mass - math.log(72)) * root)  # 16 runs of 4.5 keys
            q[:, rows, :, own.stop + 1], k[:, head, places, own.stop + 1] = gain, gain
            planted["columns"] += first.tolist()
        elif kind == "slash":
            offset = int(torch.randint(shape.m // 8, shape.m // 2, (1,), generator=gen, device=gen.device))
            _bell(q[:, rows, :, own], k[:, head, :, own], at_q, at_k + offset, 24.0, mass - math.log(48), root, gen)
            planted["offset"].append(offset)
        elif kind == "topics":
            topic_of = _segments(shape.m, shape.topics, gen)
            topics = torch.randn(shape.topics, 2 * own_pairs, generator=gen, device=gen.device)
            logit = mass - math.log(shape.m / shape.topics)
            topics *= math.sqrt(logit * root) / topics.norm(dim=-1, keepdim=True)
            q[:, rows, :, own], k[:, head, :, own] = topics[topic_of[shape.m - shape.n :]], topics[topic_of]
    noise = math.sqrt(0.5 * root / math.sqrt(rest - 2))
    for x in (q, k):
        part = x[..., d - rest + 2 :]
        part += noise * torch.randn(part.shape, generator=gen, device=gen.device)
    return Workload(q, k, v, planted)


def _bell(
    q: Tensor, k: Tensor, at_q: Tensor, at_k: Tensor, spread: float, logit: float, root: float, gen: torch.Generator
) -> None:
    """Write rotary vectors whose product, over root, is logit exp(-(at_q - at_k)^2 / 2 spread^2) and a ripple.

    Angles are drawn from a normal distribution, whose characteristic function is the bell. The ripple of n pairs is
    logit / sqrt(2 n) strong. The bell falls to 1 less than its top, where a key weighs 1 / e of the best, at a distance of
    about spread sqrt(2 / logit).
    """
    pairs = q.shape[-1] // 2
    width = spread * math.sqrt(max(1.0, logit) / 2)  # so that `spread` is what the softmax sees
    angle = torch.randn(pairs, generator=gen, device=gen.device, dtype=torch.float64) / width
    gain = math.sqrt(logit * root / pairs)
    for x, at in ((q, at_q), (k, at_k)):
        turn = at.double()[:, None] * angle
        x[:] = gain * torch.cat((turn.cos(), turn.sin()), -1).float()


def _segments(m: int, topics: int, gen: torch.Generator) -> Tensor:
    """[m] int64: runs of equal topic, 64 to 1024 long, at most a quarter of the keys."""
    longest = max(65, min(1024, m // 4))
    drawn = gen if gen.device.type == "cpu" else torch.Generator().manual_seed(gen.initial_seed())
    topic_of = torch.empty(m, dtype=torch.int64)
    start = 0
    while start < m:
        length = int(torch.randint(64, longest + 1, (1,), generator=drawn))
        topic_of[start : start + length] = int(torch.randint(0, topics, (1,), generator=drawn))
        start += length
    return topic_of.to(gen.device)


def _noise(shape: Shape, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(shape.batch, shape.q_heads, shape.n, shape.head_size, generator=gen, device=gen.device)
    k = torch.randn(shape.batch, shape.kv_heads, shape.m, shape.head_size, generator=gen, device=gen.device)
    v = torch.randn(shape.batch, shape.kv_heads, shape.m, shape.head_size, generator=gen, device=gen.device)
    return q, k, v


def _unit(shape: Shape, gen: torch.Generator) -> Tensor:
    """[1, 1, 1, D] of length 1."""
    return torch.nn.functional.normalize(torch.randn(1, 1, 1, shape.head_size, generator=gen, device=gen.device), dim=-1)
