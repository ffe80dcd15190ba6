"""The attention backend of one prompt: writes k and v into the job's segment and lets a method plan what is read.

It does not know which tokens it works on beyond `start`; chunks, caching and order are the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from winnow.index.segment import KVSegment
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.prefill.base import PrefillMethod


@dataclass
class Tally:
    """(query, key) pairs over layers, heads and rows: causal ones, and those a plan kept. A dense part keeps all of its own."""

    causal: float = 0.0
    kept: float = 0.0

    def add(self, pairs: float, density: float) -> None:
        self.causal += pairs
        self.kept += pairs * density

    @property
    def density(self) -> float:
        """Kept over causal pairs; 1.0 where nothing was computed."""
        return self.kept / self.causal if self.causal else 1.0


@dataclass
class PrefillBackend:
    """Attends T packed tokens of one prompt at positions start .. start+T-1 to everything before them and to themselves.

    Attributes:
        segment: receives k and v; holds those of positions below `start`.
        method: plans the reads, or None for dense attention.
        tally: mutated, one addition a layer.
        samples: (row of this pass, slot of the segment's query sample) pairs to keep.
    """

    segment: KVSegment
    start: int
    method: PrefillMethod | None
    tally: Tally
    samples: list[tuple[int, int]] = field(default_factory=list)

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See `AttentionBackend`. Mutates the segment and the tally."""
        n = q.shape[1]
        end = self.start + n
        self.segment.write(layer.idx, self.start, k, v)
        keys = self.segment.k(layer.idx)[None, :, :end].to(q.device)  # [1, Hkv, end, D]; a view where devices agree
        values = self.segment.v(layer.idx)[None, :, :end].to(q.device)
        queries = q[None]
        plan = self.method.plan(queries, keys, layer, raw) if self.method is not None else None
        pairs = float(layer.n_q_heads) * (n * self.start + n * (n + 1) / 2)
        self.tally.add(pairs, plan.density() if plan is not None else 1.0)
        out, _ = attend_plan(plan, queries, keys, values, scale=layer.scale, softcap=layer.softcap, window=layer.window)
        kept = self.segment.query_sample(layer.idx) if self.samples else None
        if kept is not None:
            rows, slots = zip(*self.samples, strict=True)
            kept[:, slots] = q[:, rows].to(kept.device)
        return out[0]


def sample_positions(first: int, end: int, count: int) -> list[int]:
    """`count` positions spread evenly over first .. end-1, ascending, the last one always among them.

    Where there are fewer positions than `count` some repeat, so that every slot of a sample is filled; none if there are none.
    """
    n = end - first
    return [first + (i + 1) * n // count - 1 if n >= count else first + i * n // count for i in range(count)] if n > 0 else []
