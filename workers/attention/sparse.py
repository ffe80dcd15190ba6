"""Running a plan on the CPU: tiles that are not listed are never read.

A CSR row is two disjoint parts, merged by log-sum-exp. The *full* tiles need no mask: rows with equally many of them are
gathered and run as one batch. The *partial* tiles of a query tile are, for every plan, all tiles from the one that holds
key p0 + 1 up to its own last position (see `plan`): a band that is the same in every head, run as one batch of small
triangles. STREAMING heads are a triangle, then a window beside a sink. DENSE heads take the dense path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention import blocks
from winnow.workers.attention.dense import dense
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plan import HeadClass, TilePlan, tile_kinds

_GATHER_BYTES = 8 << 20  # keys gathered at once: about what the last cache level holds beside their values


def attend(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """As `attend_plan`, without window, on CPU tensors."""
    b, hq, n, _ = q.shape
    if plan.kinds == {HeadClass.CSR}:
        return _csr(plan, q, k, v, scale, softcap)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(b, hq, n, dtype=torch.float32)
    if HeadClass.CSR in plan.kinds:  # heads of other classes have empty lists: their rows cost their diagonal only
        csr_out, csr_lse = _csr(plan, q, k, v, scale, softcap)
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
        else:
            part, part_lse = _streaming(rows, keys, values, sink, recent, scale, softcap)
        out[batch_idx, pick], lse[batch_idx, pick] = part[0], part_lse[0]
    return out, lse


def _equal_heads(plan: TilePlan, batch: int, hq: int) -> dict[tuple[int, int, int, int], list[int]]:
    """Query heads of DENSE and STREAMING mask heads, grouped by (class, sink, recent, sequence)."""
    shared = hq // plan.mask_heads
    settings = torch.stack((plan.head_class.int(), plan.sink, plan.recent), -1).expand(batch, -1, -1).tolist()
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for batch_idx, mask_heads in enumerate(settings):
        for mask_head, (kind, sink, recent) in enumerate(mask_heads):
            if kind == HeadClass.CSR:
                continue
            key = (kind, sink, recent, batch_idx) if kind == HeadClass.STREAMING else (kind, 0, 0, batch_idx)
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


def _csr(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    _check_partial(plan)
    n, n_padded = q.shape[2], plan.n_q_tiles * plan.block_q
    if n_padded != n:  # whole tiles from here on; a padded key lies after every real row, a padded row is cut off below
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, n_padded - n)) for x in (q, k, v))
    q = q.contiguous()
    full_out, full_lse = _full_tiles(plan, q, k, v, scale, softcap)
    diagonal_out, diagonal_lse = _diagonals(plan, q, k, v, scale, softcap)
    out, lse = merge((full_out, diagonal_out), (full_lse, diagonal_lse))
    return out[:, :, :n].to(q.dtype), lse[:, :, :n]


def _full_tiles(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    b, hq, n, d = q.shape
    hkv, bq, bk = k.shape[1], plan.block_q, plan.block_k
    # A mask head shared by query heads of several KV heads (Hm = 1 < Hkv) is listed once per KV head.
    heads = max(plan.mask_heads, hkv)
    height = (hq // heads) * bq  # query heads that share list and keys are rows of one tile
    n_q, n_tiles = plan.n_q_tiles, plan.n_keys // bk
    rows = q.view(b, heads, hq // heads, n_q, bq, d).transpose(2, 3).reshape(b * heads * n_q, height * d)
    out = torch.zeros_like(rows)
    lse = torch.full((rows.shape[0], height), -torch.inf)
    owner = torch.arange(b * heads).view(b, heads, 1).expand(b, heads, n_q).reshape(-1)
    key_base = (owner // heads * hkv + owner % heads // (heads // hkv)) * n_tiles
    list_of = torch.arange(plan.batch * plan.mask_heads * n_q).view(plan.batch, plan.mask_heads, n_q)
    list_of = list_of.expand(b, -1, -1) if plan.mask_heads == heads else list_of.expand(b, heads, n_q)
    list_of = list_of.reshape(-1)
    tiles_k, tiles_v = (x[:, :, : n_tiles * bk].reshape(b * hkv * n_tiles, bk * d) for x in (k, v))
    counts = plan.full.counts()[list_of]
    order = torch.argsort(counts, stable=True)
    sizes, amounts = torch.unique_consecutive(counts[order], return_counts=True)
    start = 0
    for size, amount in zip(sizes.tolist(), amounts.tolist(), strict=True):
        members = order[start : start + amount]
        start += amount
        if size == 0:
            continue
        step = max(1, _GATHER_BYTES // (size * bk * d * k.element_size()))
        for pick in members.split(step):
            ids = plan.full.ids[plan.full.offsets[list_of[pick]].unsqueeze(1) + torch.arange(size)].long()
            at = (ids + key_base[pick].unsqueeze(1)).view(-1)
            shape = (pick.numel(), 1, size * bk, d)
            part, part_lse = blocks.block(
                rows.index_select(0, pick).view(-1, 1, height, d),
                tiles_k.index_select(0, at).view(shape), tiles_v.index_select(0, at).view(shape), scale=scale, softcap=softcap,
            )  # fmt: skip
            out.index_copy_(0, pick, part.reshape(-1, height * d).to(out.dtype))
            lse.index_copy_(0, pick, part_lse.reshape(-1, height))
    by_tile = (b, heads, n_q, hq // heads, bq)
    return out.view(*by_tile, d).transpose(2, 3).reshape(b, hq, n, d), lse.view(by_tile).transpose(2, 3).reshape(b, hq, n)


def _diagonals(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The partial tiles of every query tile: keys from the tile boundary at or before p0 + 1 up to each row's own key."""
    b, hq, n, d = q.shape
    bq, bk, n_q = plan.block_q, plan.block_k, plan.n_q_tiles
    group = hq // k.shape[1]
    first = torch.arange(n_q) * bq + (plan.n_keys - plan.n_rows)
    before = first - (first + 1) // bk * bk  # keys of partial tiles before p0; -1: key p0 itself is in a full tile
    tiles = q.view(b * hq, n_q, bq, d)
    out = torch.zeros_like(tiles)
    lse = torch.full((b * hq, n_q, bq), -torch.inf)
    for extra in before.unique().tolist():
        pick = (before == extra).nonzero().view(-1)
        skip = 1 if extra < 0 else 0
        if skip == bq:
            continue  # one-row tiles whose only key is in a full tile
        height, width = bq - skip, bq + extra if extra > 0 else bq - skip
        low = (first[pick] - max(extra, 0) + skip).unsqueeze(1) + torch.arange(width)
        keys, values = (x[:, :, low].repeat_interleave(group, 1).view(b * hq, -1, width, d) for x in (k, v))
        mask = torch.arange(width) <= torch.arange(height)[:, None] + extra if extra > 0 else None
        part, part_lse = blocks.block(
            tiles[:, pick, skip:], keys, values, scale=scale, softcap=softcap, causal=extra <= 0, mask=mask
        )
        out[:, pick, skip:] = part.to(out.dtype)
        lse[:, pick, skip:] = part_lse
    return out.view(b, hq, n, d), lse.view(b, hq, n)


def _check_partial(plan: TilePlan) -> None:
    """A plan that leaves out tiles its geometry demands was not built by a constructor; running it would read them anyway."""
    implied = int(tile_kinds(plan.n_rows, plan.n_keys, plan.block_q, plan.block_k, "cpu")[1].sum())
    listed, csr = int(plan.partial.offsets[-1]), int((plan.head_class == HeadClass.CSR).sum())
    if listed != implied * csr:
        raise InvalidRequest(f"plan: lists {listed} partial tiles, not the {implied * csr} it must; use TilePlan.from_mask")
