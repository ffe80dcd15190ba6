"""What HyperAttention estimates: squares of rows and keys, sorted into blocks that read each other, and sampled keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.workers.attention.lse import merge
from winnow.workers.attention.plain import plain
from winnow.workers.prefill.scoring import bucket_kernels

if TYPE_CHECKING:
    from winnow.workers.prefill.methods.hyperattention import HyperAttention

_LOGIT_BYTES = 1 << 30  # most float32 logits held at once; more heads are done in slabs


@dataclass(frozen=True)
class Squares:
    """The residual: attention of every row over the keys before its piece, in squares of doubling size.

    Level l has squares of s = piece << l keys: in square t positions (2t + 1) s .. (2t + 2) s - 1 read keys 2t s ..
    (2t + 1) s - 1. Together the levels hold every pair below the pieces once.
    """

    method: HyperAttention
    piece: int
    levels: int
    layer_idx: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        """See `ResidualEstimator`: out [B, Hq, N, D] and lse [B, Hq, N], float32; -inf for the rows of the first piece."""
        kernels = bucket_kernels(q, softcap)
        if kernels is not None:
            return self._fused(kernels, q, k, v, scale)
        batch, hkv, m, _ = k.shape
        group = q.shape[1] // hkv
        widest = max(self.method.block, self.method.samples, 1)
        slab = max(1, _LOGIT_BYTES // (4 * batch * group * q.shape[2] * min(widest, m)))
        draws = list(self.draws(hkv, q.shape[3], m, q.device))
        outs, lses = [], []
        for first in range(0, hkv, slab):  # one turn unless memory is short
            keys, values = k[:, first : first + slab], v[:, first : first + slab]
            rows = q[:, first * group : (first + slab) * group]
            parts = []
            for level, draw in enumerate(draws):
                directions, picks = (x[first : first + slab] if x.shape[0] > 1 else x for x in draw)
                parts.append(self._level(level, directions, picks, rows, keys, values, scale, softcap))
            out, lse = merge([out for out, _ in parts], [lse for _, lse in parts])
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 1), torch.cat(lses, 1)

    def draws(self, kv_heads: int, head_size: int, m: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each level: directions [H, D, bits] and, for every square, sampled keys [H, squares, S] int64 counted from its
        first key; H = 1 or, with `per_head`, the KV heads given here. Drawn on the CPU: the same on every device."""
        gen = torch.Generator().manual_seed((self.method.seed << 16) + self.layer_idx)
        heads = kv_heads if self.method.per_head else 1
        directions = torch.randn(heads, head_size, self.method.bits, generator=gen)
        for level in range(self.levels):
            size = self.piece << level
            squares = -(-max(0, m - size) // (2 * size))
            low = torch.zeros(squares, 1, dtype=torch.int64)
            low[:1] = self.method.sink
            if self.method.samples >= size:
                picks = torch.arange(size).expand(heads, squares, size)
            else:
                uniform = torch.rand(heads, squares, self.method.samples, generator=gen, dtype=torch.float64)
                picks = (low + (uniform * (size - low)).long()).clamp(max=size - 1)  # a square may be all sink
            yield directions.to(device), picks.to(device)

    def _level(
        self, level: int, directions: Tensor, picks: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        batch, hq, n, d = q.shape
        hkv, m = k.shape[1], k.shape[2]
        group = hq // hkv
        out = torch.zeros(batch, hq, n + 1, d, device=q.device)  # what belongs to no row is written to one past the end
        lse = torch.full((batch, hq, n + 1), -torch.inf, device=q.device)
        squares, at, real = self._rows(level, n, m, q.device)
        if not len(squares):
            return out[:, :, :n], lse[:, :, :n]
        rows_q = q[:, :, at].float()  # [B, Hq, squares, s, D]
        squares_k, squares_v = (self._keys(level, x, n).transpose(-1, -2) for x in (k, v))
        per_query = directions.repeat_interleave(group, 0) if directions.shape[0] > 1 else directions
        found = self._sorted(squares, real, gray_rank(rows_q, per_query), gray_rank(squares_k.float(), directions))
        query, key, width = found.query, found.key, found.width
        sorted_q = _take(rows_q, query).unflatten(1, (hkv, group)).movedim(2, 3)  # [B, Hkv, squares, g, slots, D]

        parts = [self._blocks(sorted_q, _take(squares_k, key), _take(squares_v, key), found.readable, width, scale, softcap)]
        if picks.shape[-1]:
            here = self._of_squares(level, picks, n, m)
            parts.append(self._sample(sorted_q, squares_k, squares_v, found, here, scale, softcap))
        merged, merged_lse = merge([x for x, _ in parts], [x for _, x in parts])
        target = torch.where(found.used, at.expand(batch, hq, -1, -1).gather(-1, query), n).flatten(2)
        out.scatter_(2, target[..., None].expand(-1, -1, -1, d), merged.movedim(3, 2).reshape(batch, hq, -1, d))
        lse.scatter_(2, target, merged_lse.movedim(3, 2).reshape(batch, hq, -1))
        return out[:, :, :n], lse[:, :, :n]

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor, readable: Tensor, width: int, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Slots t width .. of q [B, Hkv, squares, g, slots, D] over the same slots of k and v [B, Hkv, squares, slots, D]."""
        blocks = q.shape[4] // width
        tall = q.unflatten(4, (blocks, width)).movedim(4, 3).flatten(0, 3)  # [X, g, width, D]
        keys, values = (x.unflatten(3, (blocks, width)).flatten(0, 3).unsqueeze(1) for x in (k, v))
        mask = readable.unflatten(3, (blocks, width)).flatten(0, 3)[:, None, None]
        out, lse = plain(tall, keys, values, scale=scale, softcap=softcap, mask=mask)
        shape = (*q.shape[:3], blocks, q.shape[3], width)
        return out.view(*shape, -1).movedim(3, 4).flatten(4, 5), lse.view(shape).movedim(3, 4).flatten(4, 5)

    def _sample(
        self, q: Tensor, k: Tensor, v: Tensor, found: Sorted, picks: Tensor, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """All slots over the picked keys outside their own block, weighted to stand for all keys outside it."""
        picks, block, bias = self._picked(found, picks.expand(*k.shape[:3], -1))
        own = torch.arange(q.shape[4], device=q.device) // found.width
        mask = (block[..., None, :] != own[:, None]) & (block >= 0)[..., None, :]  # [B, Hkv, squares, slots, S]
        out, lse = plain(
            q.flatten(0, 2), _take(k, picks).flatten(0, 2).unsqueeze(1), _take(v, picks).flatten(0, 2).unsqueeze(1),
            scale=scale, softcap=softcap, mask=mask.flatten(0, 2).unsqueeze(1),
        )  # fmt: skip
        return out.view(q.shape), lse.view(q.shape[:-1]) + bias[:, None, None]

    def _picked(self, found: Sorted, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """picks [B, Hkv, squares, S], the block of sorted keys that holds each, -1 = in the sink; and what is added to their
        logits [squares], so that they stand for all keys of their square."""
        order, size = found.order_k, found.order_k.shape[-1]
        place = (torch.arange(size, device=order.device) // found.width).expand_as(order)
        block = torch.empty_like(order).scatter_(-1, order, place).gather(-1, picks)
        block = block.masked_fill(found.sunk.expand_as(order).gather(-1, picks), -1)
        samples = min(self.method.samples, size)  # a user's number may be more than a tensor holds
        count = torch.full_like(picks[0, 0, :, :1].float(), float(samples))
        if samples < size:
            count = (~found.sunk).sum(-1, keepdim=True).float()  # with every key once each stands for itself
        return picks, block, (count[:, 0] / samples).log()

    def _fused(self, kernels: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The same by kernels that read rows and keys where they lie."""
        batch, hq, n, _ = q.shape
        hkv, m = k.shape[1], k.shape[2]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.zeros(q.shape, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        draws = list(self.draws(hkv, q.shape[3], m, q.device))
        directions = torch.stack([x for x, _ in draws])
        ranks_q, ranks_k = kernels.gray_ranks(q, directions), kernels.gray_ranks(k, directions)
        for level, (_, picks) in enumerate(draws):
            squares, at, real = self._rows(level, n, m, q.device)
            if not len(squares):
                continue
            found = self._sorted(squares, real, ranks_q[level][:, :, at], self._keys(level, ranks_k[level], n))
            first_key = (2 * squares * (self.piece << level))[:, None]
            row = at.expand(batch, hq, -1, -1).gather(-1, found.query)
            picks = self._of_squares(level, picks, n, m).expand(batch, hkv, -1, -1)
            block, bias = picks, torch.zeros(len(squares), device=q.device)
            if picks.shape[-1]:
                picks, block, bias = self._picked(found, picks)
            kernels.attend_buckets(
                q, k, v, out, lse, rows=torch.where(found.used, row, -1),
                keys=torch.where(found.readable, found.key + first_key, -1), picks=picks + first_key, pick_buckets=block,
                bias=bias, width=found.width, scale=scale,
            )  # fmt: skip
        return out, lse

    def _rows(self, level: int, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Squares that hold some of the rows, their rows [squares, s], and which of those are real."""
        past, size = m - n, self.piece << level
        squares = torch.arange(past // (2 * size), -(-max(0, m - size) // (2 * size)), device=device)
        row = (2 * squares[:, None] + 1) * size + torch.arange(size, device=device) - past
        return squares, row.clamp(0, n - 1), (row >= 0) & (row < n)

    def _of_squares(self, level: int, picks: Tensor, n: int, m: int) -> Tensor:
        """picks [H, squares, S] of the squares that `_rows` names; `draws` makes them for all."""
        return picks[:, (m - n) // (2 * (self.piece << level)) :]

    def _keys(self, level: int, x: Tensor, n: int) -> Tensor:
        """x [B, H, M, ...] by square: [B, H, squares, ..., s], of the squares that hold some of the last n rows."""
        m, size = x.shape[2], self.piece << level
        span = slice(2 * ((m - n) // (2 * size)) * size, (2 * -(-max(0, m - size) // (2 * size)) - 1) * size)
        return x[:, :, span].unfold(2, size, 2 * size)

    def _sorted(self, squares: Tensor, real: Tensor, rank_q: Tensor, rank_k: Tensor) -> Sorted:
        """Who meets whom. Args: rank_q [B, Hq, squares, s] of rows, real [squares, s]; rank_k [B, Hkv, squares, s].

        A square with few of its rows spreads them over its key blocks as a whole one does.
        """
        size, device = real.shape[1], real.device
        sunk = ((squares[:, None] == 0) & (torch.arange(size, device=device) < self.method.sink)).expand(len(squares), size)
        width = min(self.method.block, size)
        slot = torch.arange(-(-size // width) * width, device=device)
        order_q = rank_q.masked_fill(~real, 1 << self.method.bits).sort(dim=-1, stable=True).indices
        order_k = rank_k.sort(dim=-1, stable=True).indices
        count = real.sum(-1, keepdim=True)  # [squares, 1]
        begin, stop = (-(-(slot // width + more) * width * count // size) for more in (0, 1))
        place = begin + slot % width
        used = (place < stop) & (place < count)  # [squares, slots]
        query = order_q.gather(-1, torch.where(used, place, 0).expand(*order_q.shape[:2], -1, -1))
        key = order_k.gather(-1, slot.clamp(max=size - 1).expand(*order_k.shape[:3], -1))
        readable = (slot < size) & ~sunk.expand_as(order_k).gather(-1, key)
        return Sorted(width, sunk, order_k, query, used, key, readable)


@dataclass(frozen=True, eq=False)
class Sorted:
    """Squares of s rows and s keys in slots, whole blocks of `width`; slot i of the rows belongs to block i // width.

    Attributes:
        sunk: [squares, s] bool, keys that are read exactly. order_k: [B, Hkv, squares, s], keys of a square, sorted.
        query: [B, Hq, squares, slots], which of the square's rows stands in a slot, where used [squares, slots].
        key: [B, Hkv, squares, slots], which of its keys, where readable, of the same shape.
    """

    width: int
    sunk: Tensor
    order_k: Tensor
    query: Tensor
    used: Tensor
    key: Tensor
    readable: Tensor


def gray_rank(x: Tensor, directions: Tensor) -> Tensor:
    """Where the signs of x [..., H, squares, s, D] on directions [H or 1, D, bits] stand in Gray-code order, int64.

    The signs are the bits of a code word, the first direction's the highest. Words of neighbouring ranks differ in one sign.
    """
    signs = torch.matmul(x, directions.unsqueeze(1)) > 0
    parity = signs.long().cumsum(-1) % 2  # a Gray code's binary digit is the parity of the code's bits down to it
    return (parity << torch.arange(directions.shape[-1] - 1, -1, -1, device=x.device)).sum(-1)


def _take(x: Tensor, at: Tensor) -> Tensor:
    """x [B, H, squares, s, D] at positions [B, H, squares, S] -> [B, H, squares, S, D]."""
    return x.gather(3, at[..., None].expand(*at.shape, x.shape[-1]))
