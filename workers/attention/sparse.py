"""Running a plan on the CPU, head class by head class: keys that a plan does not keep are never read.

CSR heads are lists of tiles (see `csr`). STREAMING heads are a triangle, then a window beside a sink. INTERVAL heads are a band
of keys for each query tile. DENSE heads take the dense path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention import blocks
from winnow.workers.attention.csr import attend_lists
from winnow.workers.attention.dense import dense
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plan import HeadClass, TilePlan


def attend(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """As `attend_plan`, without window, on CPU tensors."""
    b, hq, n, _ = q.shape
    if plan.kinds == {HeadClass.CSR}:
        return attend_lists(plan, q, k, v, scale, softcap)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(b, hq, n, dtype=torch.float32)
    if HeadClass.CSR in plan.kinds:  # heads of other classes have empty lists: their rows cost their diagonal only
        csr_out, csr_lse = attend_lists(plan, q, k, v, scale, softcap)
        out.copy_(csr_out)
        lse.copy_(csr_lse)
    for (kind, sink, recent, batch_idx), heads in _equal_heads(plan, b, hq).items():
        pick, one = torch.tensor(heads), slice(batch_idx, batch_idx + 1)
        rows, keys, values = q[one], k[one], v[one]
        if len(heads) < hq:
            kv_heads = pick // (hq // k.shape[1])
            rows, keys, values = rows[:, pick], keys[:, kv_heads], values[:, kv_heads]
        if kind == HeadClass.DENSE:
            part, part_lse = dense(rows, keys, values, scale=scale, softcap=softcap)
        elif kind == HeadClass.INTERVAL:
            assert plan.row_intervals is not None
            intervals = plan.row_intervals[batch_idx % plan.batch, sink]
            part, part_lse = _bands(rows, keys, values, intervals, plan.block_q, scale, softcap)
        else:
            part, part_lse = _streaming(rows, keys, values, sink, recent, scale, softcap)
        out[batch_idx, pick], lse[batch_idx, pick] = part[0], part_lse[0]
    return out, lse


def _equal_heads(plan: TilePlan, batch: int, hq: int) -> dict[tuple[int, int, int, int], list[int]]:
    """Query heads that are not CSR, grouped by (class, sink, recent, sequence); an INTERVAL head's sink is its mask head."""
    shared = hq // plan.mask_heads
    settings = torch.stack((plan.head_class.int(), plan.sink, plan.recent), -1).expand(batch, -1, -1).tolist()
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for batch_idx, mask_heads in enumerate(settings):
        for mask_head, (kind, sink, recent) in enumerate(mask_heads):
            if kind == HeadClass.CSR:
                continue
            key = (kind, sink, recent, batch_idx) if kind == HeadClass.STREAMING else (kind, 0, 0, batch_idx)
            if kind == HeadClass.INTERVAL:
                key = (kind, mask_head, 0, batch_idx)
            groups.setdefault(key, []).extend(range(mask_head * shared, (mask_head + 1) * shared))
    return groups


def _streaming(q: Tensor, k: Tensor, v: Tensor, sink: int, recent: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Sink and window, exact to the token. Rows before position sink + recent read everything."""
    n, m = q.shape[2], k.shape[2]
    past = m - n
    whole = min(n, max(0, sink + recent - past))
    outs, lses = [], []
    if whole:
        out, lse = dense(q[:, :, :whole], k[:, :, : past + whole], v[:, :, : past + whole], scale=scale, softcap=softcap)
        outs.append(out)
        lses.append(lse)
    if whole < n:
        rows = q[:, :, whole:]
        out, lse = dense(rows, k[:, :, sink:], v[:, :, sink:], scale=scale, softcap=softcap, window=recent)
        if sink:
            first, first_lse = blocks.block(rows, k[:, :, :sink], v[:, :, :sink], scale=scale, softcap=softcap)
            out, lse = merge((out, first), (lse, first_lse))
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _bands(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, block_q: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The keys from the lowest to the highest that a query tile's rows read, with an exact mask. intervals: [N, 2]."""
    n = q.shape[2]
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty(q.shape[:3], dtype=torch.float32)
    for start in range(0, n, block_q):
        rows = slice(start, min(n, start + block_q))
        lo, hi = intervals[rows].long().unsqueeze(-2).unbind(-1)  # [rows, 1]
        low, high = int(lo.min()), int(hi.max())
        key = torch.arange(low, high)
        mask = (key >= lo) & (key < hi)
        part, lse[:, :, rows] = blocks.block(
            q[:, :, rows], k[:, :, low:high], v[:, :, low:high], scale=scale, softcap=softcap,
            mask=None if bool(mask.all()) else mask,
        )  # fmt: skip
        out[:, :, rows] = part.to(q.dtype)
    return out, lse
