"""Lists of tiles on the CPU: what is not listed is never read.

A CSR row is disjoint parts, merged by log-sum-exp as they come. The *partial* tiles of a query tile are, for every plan, all
tiles from the one that holds key p0 + 1 up to its own last position (see `plan`): a band that is the same in every head, run
where it lies as one batch of small triangles. The *full* tiles need no mask: rows with equally many of them are gathered and
run as one batch. Token columns are the same with tiles of one key. Pseudo-keys of tiles that are left out are so few that every
query tile takes all of them, those of tiles it reads with a weight of 0.

Between the parts rows lie in tiles, [B, H, nQ, Hq / H, Bq, D]: H heads of lists, and the query heads that share a list and its
keys stacked to one tall tile, which reads its keys once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention import blocks
from winnow.workers.attention.estimates import log_weights, pooled_tiles
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.tiles import TileLists

_GATHER_BYTES = 8 << 20  # keys gathered at once: about what the last cache level holds beside their values


def attend_lists(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Tiles, token columns and pseudo-keys of every head; rows of heads that are not CSR get their partial tiles only.

    Args and returns: as `attend_plan`, on CPU tensors. Pseudo-keys need softcap = 0.
    """
    b, hq, n, d = q.shape
    if plan.n_q_tiles * plan.block_q != n:  # whole tiles from here on; a padded row is cut off below
        q = torch.nn.functional.pad(q, (0, 0, 0, plan.n_q_tiles * plan.block_q - n))
    heads = max(plan.mask_heads, k.shape[1])  # a list shared by several KV heads (Hm = 1 < Hkv) is run once for each
    tiles = q.unflatten(1, (heads, hq // heads)).unflatten(3, (plan.n_q_tiles, plan.block_q)).transpose(2, 3).contiguous()
    out, lse = _diagonals(plan, tiles, k, v, scale, softcap)
    _add_listed(out, lse, plan, plan.full, plan.block_k, tiles, k, v, scale, softcap)
    if plan.token_columns is not None:
        _add_listed(out, lse, plan, plan.token_columns, 1, tiles, k, v, scale, softcap)
    if plan.mean_correction:
        _add_pseudo_keys(out, lse, plan, tiles, k, v, scale)
    return (
        out.transpose(2, 3).reshape(b, hq, -1, d)[:, :, :n].to(q.dtype),
        lse.transpose(2, 3).reshape(b, hq, -1)[:, :, :n],
    )


def _diagonals(plan: TilePlan, tiles: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The partial tiles of every query tile: keys from the tile boundary at or before p0 + 1 up to each row's own key."""
    b, heads, n_q, shared, bq = tiles.shape[:-1]
    bk, n, group = plan.block_k, plan.n_rows, heads // k.shape[1]
    first = torch.arange(n_q) * bq + (plan.n_keys - plan.n_rows)
    before = first - (first + 1) // bk * bk  # keys of partial tiles before p0; -1: key p0 itself is in a full tile
    # Every row is written below except, where key p0 is in a full tile, the first of its query tile, and padded rows.
    out = (torch.empty if n % bq == 0 and int(before.min()) >= 0 else torch.zeros)(tiles.shape)
    lse = torch.full(tiles.shape[:-1], -torch.inf)
    cut = 1 if n % bq else 0  # a last tile cut short has fewer keys than rows
    for extra in before.unique().tolist():
        skip = 1 if extra < 0 else 0
        picks = (before == extra).nonzero().view(-1)
        for pick, rows in ((picks[picks < n_q - cut], bq), (picks[picks >= n_q - cut], n % bq)):
            if pick.numel() == 0 or rows == skip:
                continue  # also one-row tiles whose only key is in a full tile
            height, width = rows - skip, rows - skip + max(extra, 0)
            step = int(pick[1] - pick[0]) if pick.numel() > 1 else 1  # first mod bk repeats: the picked lie evenly apart
            low = int(first[pick[0]]) - max(extra, 0) + skip
            mask = torch.arange(width) <= torch.arange(height)[:, None] + extra if extra > 0 else None
            here = (slice(int(pick[0]), int(pick[-1]) + 1, step), slice(skip, rows))
            for batch_idx in range(b):
                keys, values = (_windows(x[batch_idx], low, step * bq, pick.numel(), width) for x in (k, v))
                for member in range(group):
                    for place in range(shared):
                        at = (batch_idx, slice(member, None, group), here[0], place, here[1])
                        part, part_lse = blocks.block(
                            tiles[at], keys, values, scale=scale, softcap=softcap, causal=mask is None, mask=mask
                        )
                        out[at], lse[at] = part, part_lse
    return out, lse


def _windows(x: Tensor, low: int, step: int, count: int, width: int) -> Tensor:
    """[H, M, D] -> [H, count, width, D]: views of x from low, low + step, ... on."""
    head, token, last = x.stride()
    shape, strides = (x.shape[0], count, width, x.shape[2]), (head, step * token, token, last)
    return x.as_strided(shape, strides, x.storage_offset() + low * token)


def _add_listed(
    out: Tensor, lse: Tensor, plan: TilePlan, lists: TileLists, size: int,
    tiles: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float,
) -> None:  # fmt: skip
    """Merge attention over listed runs of `size` keys, all visible to all rows of their query tile, into out and lse."""
    b, heads, n_q, shared, bq, d = tiles.shape
    hkv, height = k.shape[1], shared * bq
    n_runs = plan.n_keys // size
    rows, out, lse = tiles.view(-1, height, d), out.view(-1, height, d), lse.view(-1, height)
    owner = torch.arange(b * heads).repeat_interleave(n_q)
    first_run = (owner // heads * hkv + owner % heads // (heads // hkv)) * n_runs
    list_of = torch.arange(plan.batch * plan.mask_heads * n_q).view(plan.batch, plan.mask_heads, n_q)
    list_of = list_of.expand(b, heads, n_q).reshape(-1)
    runs_k, runs_v = (x[:, :, : n_runs * size].reshape(b * hkv * n_runs, size * d) for x in (k, v))
    counts = lists.counts()[list_of]
    order = torch.argsort(counts, stable=True)
    amounts = torch.unique_consecutive(counts[order], return_counts=True)
    start = 0
    for count, amount in zip(*(x.tolist() for x in amounts), strict=True):
        members = order[start : start + amount]
        start += amount
        if count == 0:
            continue
        step = max(1, _GATHER_BYTES // (count * size * d * k.element_size()))
        for pick in members.split(step):
            ids = lists.ids[lists.offsets[list_of[pick]].unsqueeze(1) + torch.arange(count)]
            at = (ids + first_run[pick].unsqueeze(1)).view(-1)
            shape = (pick.numel(), 1, count * size, d)
            part, part_lse = blocks.block(
                rows.index_select(0, pick).unsqueeze(1), runs_k.index_select(0, at).view(shape),
                runs_v.index_select(0, at).view(shape), scale=scale, softcap=softcap,
            )  # fmt: skip
            old, old_lse = out.index_select(0, pick), lse.index_select(0, pick)
            _merge_into(old, old_lse, part.squeeze(1), part_lse.squeeze(1))
            out.index_copy_(0, pick, old)
            lse.index_copy_(0, pick, old_lse)


def _add_pseudo_keys(out: Tensor, lse: Tensor, plan: TilePlan, tiles: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Merge the mean correction into out and lse; see `estimates.mean_correction`."""
    b, heads, n_q, shared = tiles.shape[:4]
    group = heads // k.shape[1]
    pooled_k, pooled_v = (pooled_tiles(x, plan.block_k).to(x.dtype) for x in (k, v))
    n_tiles = pooled_k.shape[2]
    if n_tiles == 0:
        return
    weights = log_weights(plan)[..., None, :n_tiles].expand(b, heads, -1, -1, -1)  # [B, H, nQ, 1, M // Bk]
    for batch_idx in range(b):
        keys, values = (x[batch_idx].unsqueeze(1).expand(-1, n_q, -1, -1) for x in (pooled_k, pooled_v))
        for member in range(group):
            bias = weights[batch_idx, member::group]
            for place in range(shared):
                at = (batch_idx, slice(member, None, group), slice(None), place)
                _merge_into(out[at], lse[at], *blocks.biased(tiles[at], keys, values, bias, scale=scale))


def _merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`lse.merge` in place, for parts whose output is 0 where they have no key, and rows that have one in either."""
    total = torch.logaddexp(lse, part_lse)
    share, part_share = torch.exp(lse - total).unsqueeze(-1), torch.exp(part_lse - total).unsqueeze(-1)
    out.mul_(share).addcmul_(part.float(), part_share)
    lse.copy_(total)
