"""What a plan keeps and loses of one layer's attention, on sampled query rows, against exact float32 softmax.

Everything is computed from the q and k that the layer really saw. So in a sparse run the figures of a later layer are those
of its own inputs, which earlier layers already changed; what that amounts to in the end is said by the KL divergence. A plan
that also estimates what it leaves out is better than its recall: its output error says how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.prefill.quality import sample_rows
from winnow.workers.prefill.scoring import logits_of, pool_sum

_SEED = 0x6576616C  # of the rows that are looked at: others than a method samples for itself


@dataclass(frozen=True, eq=False)
class RowMetrics:
    """Sampled rows of one layer, each [Hq, R] float32 on the CPU.

    Attributes:
        recall: share of the row's attention mass on the keys the plan keeps, R.
        oracle: the largest mass that as many key tiles as the plan's row touches can hold, R_oracle >= R.
        error, norm: squared Euclidean length of out - exact output, and of the exact output.
    """

    recall: Tensor
    oracle: Tensor
    error: Tensor
    norm: Tensor


def sampled_rows(n: int, count: int) -> list[int]:
    """At most `count` row indices below n, ascending: one drawn from each of as many equal parts.

    Means over them are means over all rows without bias. No part of a prompt may stand out: methods treat its last rows apart.
    """
    return sorted(set(sample_rows(n, count, _SEED, torch.device("cpu")).tolist()))


def row_metrics(
    layer: LayerSpec, plan: TilePlan | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Sequence[int]
) -> RowMetrics:
    """Compare one layer's output with exact attention on some of its rows.

    Args:
        plan: what `out` was computed with; None = dense.
        q, out: [Hq, N, D]. k, v: [Hkv, M, D], M >= N, right-aligned. Any float dtype and device.
        rows: indices into the N rows, ascending.

    Exact attention is softmax in float32 over all keys the layer may see (its window and soft-capping honoured). One KV head's
    query heads are done at a time, so that 64 rows of 128K keys take some 100 MB. Waits for the device. Mutates nothing.
    """
    hq, n, _ = q.shape
    hkv, m = k.shape[0], k.shape[1]
    group = hq // hkv
    index = torch.tensor(rows, device=q.device)
    position = index[:, None] + (m - n)
    key = torch.arange(m, device=q.device)
    allowed = key <= position  # [R, M]
    if layer.window:
        allowed &= key > position - layer.window
    mask = None if plan is None else rows_kept(plan, rows)  # [Hm, R, M]
    parts: list[tuple[Tensor, ...]] = []
    for head in range(hkv):
        mine = slice(head * group, (head + 1) * group)
        logits = logits_of(q[mine, index].reshape(1, -1, q.shape[2]), k[head : head + 1], layer).view(group, len(rows), m)
        mass = torch.softmax(logits.masked_fill_(~allowed, -torch.inf), -1)
        exact = torch.matmul(mass, v[head].float())
        error = (out[mine, index].float() - exact).square().sum(-1)
        norm = exact.square().sum(-1)
        if plan is None or mask is None:
            recall = oracle = torch.ones_like(norm)
        else:
            kept = allowed & mask[[h * plan.mask_heads // hq for h in range(mine.start, mine.stop)]]
            recall = (mass * kept).sum(-1)
            tiles = pool_sum(mass, plan.block_k).sort(-1, descending=True).values.cumsum(-1)
            touched = (pool_sum(kept.float(), plan.block_k) > 0).sum(-1, keepdim=True)
            oracle = tiles.gather(-1, touched.clamp(min=1) - 1).squeeze(-1)
        parts.append((recall, oracle, error, norm))
    return RowMetrics(*(torch.cat(x).cpu() for x in zip(*parts, strict=True)))


def rows_kept(plan: TilePlan, rows: Sequence[int]) -> Tensor:
    """[Hm, R, M] bool: keys that a plan for one sequence keeps for these ascending rows, as in its `to_dense_mask`.

    Only the lists of the rows' own query tiles are looked at. Waits for the device once a list.
    """
    row = torch.tensor(rows, device=plan.device)
    tiles, tile_of_row = torch.unique(row // plan.block_q, return_inverse=True)
    position = row[:, None] + (plan.n_keys - plan.n_rows)
    key = torch.arange(plan.n_keys, device=plan.device)
    listed = _listed(plan, plan.full, tiles, plan.n_k_tiles) | _listed(plan, plan.partial, tiles, plan.n_k_tiles)
    kept = listed.repeat_interleave(plan.block_k, -1)[..., : plan.n_keys]
    if plan.token_columns is not None:
        kept = kept | _listed(plan, plan.token_columns, tiles, plan.n_keys)
    kept = kept[:, tile_of_row]
    class_, sink, recent = (x[0, :, None, None] for x in (plan.head_class, plan.sink, plan.recent))
    kept = torch.where(
        class_ == HeadClass.STREAMING, (key < sink) | (key > position - recent), kept | (class_ == HeadClass.DENSE)
    )
    if plan.row_intervals is not None:
        low, high = plan.row_intervals[0][:, row].unsqueeze(-2).unbind(-1)
        kept = torch.where(class_ == HeadClass.INTERVAL, (key >= low) & (key < high), kept)
    return kept & (key <= position)


def _listed(plan: TilePlan, lists: TileLists, tiles: Tensor, columns: int) -> Tensor:
    """[Hm, T, columns] bool: the ids that a plan's lists hold for its query tiles [T]."""
    head = torch.arange(plan.mask_heads, device=plan.device)[:, None]
    place = (head * plan.n_q_tiles + tiles).flatten()
    first, count = lists.offsets[place], lists.counts()[place]
    line = torch.repeat_interleave(torch.arange(len(place), device=plan.device), count)
    at = torch.arange(len(line), device=plan.device) - (count.cumsum(0) - count - first)[line]
    found = torch.zeros(len(place), columns, dtype=torch.bool, device=plan.device)
    found[line, lists.ids[at].long()] = True
    return found.view(plan.mask_heads, len(tiles), columns)


def head_densities(plan: TilePlan) -> list[float]:
    """`plan.density()` of each mask head of a plan for one sequence: the same definition, by head. Waits for the device."""
    found: list[float] = (plan.kept_pairs[0].double() / plan.n_causal_pairs).tolist()
    return found


def kl_divergence(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) in nats of two next-token distributions given as logits [V], in float64."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (dense, other))
    return max(0.0, float((p.exp() * (p - q)).sum()))


def head_summary(values: Tensor) -> dict[str, list[float]]:
    """[Hq, R] -> mean, 5th percentile and minimum over the rows of each head."""
    return {
        "mean": values.mean(-1).tolist(),
        "p5": torch.quantile(values, 0.05, dim=-1).tolist(),
        "min": values.amin(-1).tolist(),
    }
