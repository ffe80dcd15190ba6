"""The attention backend of one prompt: writes k and v into the job's segment and lets a method plan what is read.

It does not know which tokens it works on beyond `start`; chunks, caching and order are the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.index.segment import KVSegment
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.break_even import BreakEven
from winnow.workers.prefill.quality import kept_shares, rows_to_measure, sample_rows

_SEED = 0x77696E6E6F77  # of the rows that are measured: others than a method samples for itself


@dataclass
class Tally:
    """What was computed, over layers, heads and rows. A dense part keeps all of its pairs and of its attention mass.

    What is known on the device only is kept there and read when somebody asks, so that nothing waits between layers.

    Attributes:
        causal, kept: (query, key) pairs: causal ones, and those a plan kept.
        rows: query rows, counted once for each layer and head. recalled: their kept shares of attention mass, as far as known.
        is_sparse: a method had a say. is_measured: every plan's share of the mass was measured.
    """

    causal: float = 0.0
    kept: float = 0.0
    rows: float = 0.0
    recalled: float = 0.0
    is_sparse: bool = False
    is_measured: bool = True
    _pending: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    def add(self, pairs: float, density: float) -> None:
        """Pairs of which this share was kept, and whose attention mass nobody measured unless it is all of it."""
        self.causal += pairs
        self.kept += pairs * density
        self.is_measured &= density == 1.0

    def add_dense(self, pairs: float, rows: float) -> None:
        self.add(pairs, 1.0)
        self.rows += rows
        self.recalled += rows

    def add_plan(self, pairs: float, rows: float, kept: Tensor, recall: Tensor | None) -> None:
        """A plan's pairs and rows. kept: pairs it read, recall: mean share of the mass it kept (None = not measured); scalars."""
        self.causal += pairs
        self.rows += rows
        self.is_sparse = True
        self.is_measured &= recall is not None
        self._pending.append((kept, torch.ones_like(kept) if recall is None else recall.to(kept.dtype), rows))

    def settle(self) -> None:
        """Read what is on the device. Waits for it, once."""
        if not self._pending:
            return
        found = torch.stack([torch.stack(pair[:2]) for pair in self._pending]).tolist()
        for (kept, recall), (_, _, rows) in zip(found, self._pending, strict=True):
            self.kept += kept
            self.recalled += recall * rows
        self._pending.clear()

    @property
    def density(self) -> float:
        """Kept over causal pairs; 1.0 where nothing was computed. May wait for the device."""
        self.settle()
        return self.kept / self.causal if self.causal else 1.0

    @property
    def recall(self) -> float | None:
        """Mean share of attention mass kept, over layers, heads and rows; None where it was not measured, or no method had a
        say. May wait for the device."""
        self.settle()
        return self.recalled / self.rows if self.is_sparse and self.is_measured and self.rows else None


@dataclass
class PrefillBackend:
    """Attends T packed tokens of one prompt at positions start .. start+T-1 to everything before them and to themselves.

    Attributes:
        segment: receives k and v; holds those of positions below `start`.
        method: plans the reads, or None for dense attention.
        planned: of a pass's rows the first so many are planned by the method, the rest is dense; None = all of them.
        tally: mutated, one addition a layer.
        samples: rows of this pass [S] int64, on q's device, whose queries go to the slots from `first_slot` on of the segment's
            query sample; None = none.
        measure_rows: rows of each layer on which a plan's recall is measured; 0 = not measured.
        break_even: says where the method would not pay, and dense attention runs instead; None = it always runs.
    """

    segment: KVSegment
    start: int
    method: PrefillMethod | None
    tally: Tally
    planned: int | None = None
    samples: Tensor | None = None
    first_slot: int = 0
    measure_rows: int = 0
    break_even: BreakEven | None = None

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """See `AttentionBackend`. Mutates the segment and the tally."""
        n = q.shape[1]
        end = self.start + n
        self.segment.write(layer.idx, self.start, k, v)
        keys = self.segment.k(layer.idx)[None, :, :end].to(q.device)  # [1, Hkv, end, D]; a view where devices agree
        values = self.segment.v(layer.idx)[None, :, :end].to(q.device)
        border = n if self.planned is None else self.planned
        upto = self.start + border
        plan = self._plan(layer, self.method, border, q, keys, raw) if self.method is not None and border else None
        if plan is None or border == n:
            out = self._attend(layer, plan, q[None], keys, values)
        else:
            first = self._attend(layer, plan, q[None, :, :border], keys[:, :, :upto], values[:, :, :upto])
            last = self._attend(layer, None, q[None, :, border:], keys, values)
            # tokens before heads, as the kernel writes them and the next product reads them: else this takes six times as long
            out = torch.cat((first.transpose(1, 2), last.transpose(1, 2)), 1).transpose(1, 2)
        kept = self.segment.query_sample(layer.idx)
        if kept is not None and self.samples is not None:
            kept[:, self.first_slot : self.first_slot + len(self.samples)] = q.index_select(1, self.samples)
        return out[0]

    def _plan(self, layer: LayerSpec, method: PrefillMethod, n: int, q: Tensor, k: Tensor, raw: RawQK) -> TilePlan | None:
        """What the method reads for the first n rows of q [Hq, T, D], of the keys k [1, Hkv, M, D] up to theirs; None = dense."""
        m = self.start + n
        # Soft-capped dense attention is float32 math on a CPU, many times what costs were measured on; a plan takes its share.
        chooser = None if layer.softcap and q.device.type == "cpu" else self.break_even
        if chooser is not None and not chooser.tries(layer, n, m, q.device):
            return None
        plan = method.plan(q[None, :, :n], k[:, :, :m], layer, RawQK(raw.q[:, :n], raw.k[:, :n]))
        return plan if chooser is None or chooser.takes(layer, plan) else None

    def _attend(self, layer: LayerSpec, plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows q [1, Hq, n, D] over k and v [1, Hkv, m, D], of which the last n are their own; [1, Hq, n, D]."""
        out, lse = attend_plan(plan, q, k, v, scale=layer.scale, softcap=layer.softcap, window=layer.window)
        self._book(plan, layer, q, k, lse)
        return out

    def _book(self, plan: TilePlan | None, layer: LayerSpec, q: Tensor, k: Tensor, lse: Tensor) -> None:
        """Add what these rows read to the tally."""
        heads, n = layer.n_q_heads, q.shape[2]
        before = k.shape[2] - n
        pairs = float(heads) * (n * before + n * (n + 1) / 2)
        self.tally.is_sparse |= self.method is not None
        if plan is None:
            self.tally.add_dense(pairs, heads * n)
            return
        recall = None
        count = rows_to_measure(n, self.measure_rows)
        # An estimate is part of the lse, and a window would be missing from the exact mass.
        if count and not plan.is_estimating and not 0 < layer.window < k.shape[2]:
            rows = sample_rows(n, count, _SEED + (before << 12) + layer.idx, q.device)
            recall = kept_shares(q, k, lse, layer, rows).mean()
        self.tally.add_plan(pairs, heads * n, plan.kept_pairs.sum().double() * (heads // plan.mask_heads), recall)


def sample_positions(first: int, end: int, count: int) -> list[int]:
    """`count` positions spread evenly over first .. end-1, ascending, the last one always among them.

    Where there are fewer positions than `count` some repeat, so that every slot of a sample is filled; none if there are none.
    """
    n = end - first
    return [first + (i + 1) * n // count - 1 if n >= count else first + i * n // count for i in range(count)] if n > 0 else []
