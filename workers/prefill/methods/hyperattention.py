"""HyperAttention: exact attention near the diagonal, sorted blocks and sampled keys for everything further back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plain import plain
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import PrefillMethod, prefill_methods

_LOGIT_BYTES = 1 << 30  # most float32 logits held at once; more heads are done in slabs
_LEAST_ROWS = 16  # of a query tile


@prefill_methods.register("hyperattention")
@dataclass(frozen=True)
class HyperAttention(PrefillMethod):
    """Halve the sequence until its pieces are short. Pieces on the diagonal are exact; in each square below it, of s queries
    and the s keys before them, a query reads one block of keys exactly and a random sample of the others:

        lse = log( sum over its block exp(l_j)  +  s / samples * sum over samples outside its block exp(l_j) )

    A token's block is found by sorting queries and keys by the Gray-code rank of their signs on a few random directions: block
    t of the sorted queries reads block t of the sorted keys. The pieces on the diagonal are the plan; the squares are its
    residual, which the executor merges by log-sum-exp. exp(lse) is unbiased over the seeds.

    Source: "HyperAttention: Long-context Attention in Near-Linear Time" (arXiv 2310.05869, ICLR 2024), its causal algorithm and
    the published code's constants; meant to replace the last layers of a model only. Deviations:
    - one sample and one set of directions for all heads and sequences (`per_head` draws them per KV head), from `seed` and the
      layer's index: results do not depend on the order of heads or on batch mates, and can be had again;
    - keys are sorted once per KV head, queries per query head: grouped heads work, the published code needs equally many;
    - samples in a query's own block, and what pads the last block, are masked; the published CUDA path counts both twice;
    - with `samples` >= s every key is taken once, weight 1, instead of drawn with replacement: then the result is exact;
    - pieces are rounded up to whole tiles, so the last may be shorter; the published code pads every level with zero keys;
    - `sink` reads the first keys exactly and never samples them; without it one strong first key, sampled rarely, ruins the
      estimate. Off, as published, unless asked for;
    - rows that do not start on a 16-token border of the keys (M - N no multiple of 16) are left dense.
    Layers with a sliding window shorter than the keys, and prompts below 2 min_seq_len, which the method computes exactly, are
    left dense. Density counts what is read exactly through the plan, not the blocks and samples.

    Attributes:
        bits: random directions, 1 to 24; 2 ** bits ranks.
        block: keys of a sorted block.
        samples: sampled keys of a square; 0 = none.
        min_seq_len: squares of fewer keys are exact.
        sink: first keys that every row reads exactly, whole tiles of them, at most min_seq_len.
        per_head: draw directions and samples for each KV head.
        seed: of all draws.
        tile: tile size of the plan: 16, 32, 64 or 128.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="experimental: exact near the diagonal, sorted blocks and random samples further back; exact below 2 min_seq_len",
    )
    bits: int = 7
    block: int = 256
    samples: int = 256
    min_seq_len: int = 4096
    sink: int = 0
    per_head: bool = False
    seed: int = 0
    tile: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 24:
            raise InvalidRequest(f"hyperattention: bits must be 1 to 24, got {self.bits}; 7 is the published default")
        if self.tile not in (16, 32, 64, 128):
            raise InvalidRequest(f"hyperattention: tile must be 16, 32, 64 or 128, got {self.tile}")
        for name, least in (("block", 1), ("samples", 0), ("min_seq_len", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"hyperattention: {name} must be {least} or more, got {getattr(self, name)}")
        if self.sink % self.tile or not 0 <= self.sink <= self.min_seq_len:
            raise InvalidRequest(
                f"hyperattention: sink must be whole tiles of {self.tile} tokens, 0 to min_seq_len = {self.min_seq_len}, "
                f"got {self.sink}"
            )

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """The pieces on the diagonal, and the squares below it as a residual. See the class.

        Cost: of the plan O(B nQ nK) bits; of the residual O(Hq M log(M / min_seq_len) (block + samples) D). Holds at most
        about 1 GiB of logits at once. Mutates nothing.
        """
        n, m = q.shape[2], k.shape[2]
        levels = max(1, m // self.min_seq_len).bit_length() - 1
        rows = math.gcd(m - n, self.tile)  # M - N in whole query tiles: then no border of pieces lies inside one
        if levels == 0 or rows < _LEAST_ROWS or 0 < layer.window < m:
            return None
        piece = -(-m // (self.tile << levels)) * self.tile
        own = (torch.arange(0, n, rows, device=q.device) + (m - n)) // piece
        first = torch.arange(0, m, self.tile, device=q.device)
        mask = (own[:, None] == first // piece) | (first < self.sink)
        return TilePlan.from_mask(
            mask.expand(q.shape[0], 1, *mask.shape),
            n_rows=n, n_keys=m, block_q=rows, block_k=self.tile, residual=Squares(self, piece, levels, layer.idx),
        )  # fmt: skip


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
        first key; H = 1 or, with `per_head`, the KV heads. Drawn on the CPU: the same on every device."""
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
        group, past, size = hq // hkv, m - n, self.piece << level
        first, end = past // (2 * size), -(-max(0, m - size) // (2 * size))  # squares that hold some of the rows
        out = torch.zeros(batch, hq, n + 1, d, device=q.device)  # what belongs to no row is written to one past the end
        lse = torch.full((batch, hq, n + 1), -torch.inf, device=q.device)
        if first >= end:
            return out[:, :, :n], lse[:, :, :n]
        squares = torch.arange(first, end, device=q.device)
        row = (2 * squares[:, None] + 1) * size + torch.arange(size, device=q.device) - past  # [squares, s]
        real = (row >= 0) & (row < n)
        at = row.clamp(0, n - 1)
        rows_q = q[:, :, at].float()  # [B, Hq, squares, s, D]
        span = slice(2 * first * size, (2 * end - 1) * size)
        squares_k, squares_v = (x[:, :, span].unfold(2, size, 2 * size).transpose(-1, -2) for x in (k, v))
        sunk = ((squares[:, None] == 0) & (torch.arange(size, device=q.device) < self.method.sink)).expand(len(squares), size)

        # Sorting. A square with few of its rows spreads them over its key blocks as a whole one does.
        width = min(self.method.block, size)
        slot = torch.arange(-(-size // width) * width, device=q.device)
        per_query = directions.repeat_interleave(group, 0) if directions.shape[0] > 1 else directions
        order_q = gray_rank(rows_q, per_query).masked_fill_(~real, 1 << self.method.bits).sort(dim=-1, stable=True).indices
        order_k = gray_rank(squares_k.float(), directions).sort(dim=-1, stable=True).indices
        count = real.sum(-1, keepdim=True)  # [squares, 1]
        begin, stop = (-(-(slot // width + more) * width * count // size) for more in (0, 1))
        place = begin + slot % width
        used = (place < stop) & (place < count)  # [squares, slots]
        place = torch.where(used, place, 0)
        query = order_q.gather(-1, place.expand(batch, hq, -1, -1))  # which of the square's rows stands in a slot
        key = order_k.gather(-1, slot.clamp(max=size - 1).expand(batch, hkv, len(squares), -1))
        sorted_q = _take(rows_q, query).unflatten(1, (hkv, group)).movedim(2, 3)  # [B, Hkv, squares, g, slots, D]
        readable = (slot < size) & ~sunk.expand(batch, hkv, -1, -1).gather(-1, key)  # [B, Hkv, squares, slots]

        parts = [self._blocks(sorted_q, _take(squares_k, key), _take(squares_v, key), readable, width, scale, softcap)]
        if picks.shape[-1]:
            parts.append(self._sample(sorted_q, squares_k, squares_v, order_k, picks[:, first:end], sunk, width, scale, softcap))
        merged, merged_lse = merge([x for x, _ in parts], [x for _, x in parts])
        target = torch.where(used, at.expand(batch, hq, -1, -1).gather(-1, query), n).flatten(2)
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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        order_k: Tensor,
        picks: Tensor,
        sunk: Tensor,
        width: int,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """All slots over the picked keys outside their own block, weighted to stand for all keys outside it."""
        picks = picks.expand(*k.shape[:3], -1)
        block_of = torch.empty_like(order_k).scatter_(
            -1, order_k, (torch.arange(order_k.shape[-1], device=q.device) // width).expand_as(order_k)
        )
        own = torch.arange(q.shape[4], device=q.device) // width
        counted = ~sunk.expand(*k.shape[:3], -1).gather(-1, picks)
        mask = (block_of.gather(-1, picks)[..., None, :] != own[:, None]) & counted[..., None, :]  # [B, Hkv, squares, slots, S]
        out, lse = plain(
            q.flatten(0, 2), _take(k, picks).flatten(0, 2).unsqueeze(1), _take(v, picks).flatten(0, 2).unsqueeze(1),
            scale=scale, softcap=softcap, mask=mask.flatten(0, 2).unsqueeze(1),
        )  # fmt: skip
        if self.method.samples >= sunk.shape[-1]:  # every key once
            return out.view(q.shape), lse.view(q.shape[:-1])
        stands_for = (~sunk).sum(-1).float() / self.method.samples
        return out.view(q.shape), lse.view(q.shape[:-1]) + stands_for.log()[:, None, None]


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
