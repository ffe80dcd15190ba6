"""HyperAttention: exact attention near the diagonal, sorted blocks and sampled keys for everything further back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.hyper_squares import Squares

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
    the published code's constants; meant to replace the last layers of a model only (`dense_layers`). Deviations:
    - one sample and one set of directions for all heads and sequences (`per_head` draws them per KV head), from `seed` and the
      layer's index: results do not depend on the order of heads or on batch mates, and can be had again;
    - keys are sorted once per KV head, queries per query head: grouped heads work, the published code needs equally many;
    - samples in a query's own block, and what pads the last block, are masked; the published CUDA path counts such samples
      twice, and padding as keys;
    - with `samples` >= s every key is taken once, weight 1, instead of drawn with replacement: then the result is exact;
    - pieces are rounded up to whole tiles, so the last may be shorter; the published code pads every level with zero keys;
    - `sink` reads the first keys exactly and never samples them; without it one strong first key, sampled rarely, ruins the
      estimate. Off, as published, unless asked for;
    - rows that do not start on a 16-token border of the keys (M - N no multiple of 16) are left dense.
    Layers with a sliding window, and prompts below 2 min_seq_len, which the method computes exactly, are
    left dense. Density counts what is read exactly through the plan, not the blocks and samples.

    Attributes:
        dense_layers: first layers of the model that stay dense; the paper replaces the last quarter or so.
        bits: random directions, 1 to 24; 2 ** bits ranks.
        block: keys of a sorted block.
        samples: sampled keys of a square; 0 = none.
        min_seq_len: squares of fewer keys are exact.
        sink: first keys that every row reads exactly, whole tiles of them, at most min_seq_len.
        per_head: draw directions and samples for each KV head, in order: a part of the heads draws otherwise than all of them,
            so heads may not be split over devices then (`caps.tensor_parallel` of the instance).
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
    dense_layers: int = 0
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
        for name, least in (("dense_layers", 0), ("block", 1), ("samples", 0), ("min_seq_len", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"hyperattention: {name} must be {least} or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 31:
            raise InvalidRequest(f"hyperattention: seed must be 0 to {(1 << 31) - 1}, got {self.seed}; 0 is the default")
        if self.sink % self.tile or not 0 <= self.sink <= self.min_seq_len:
            raise InvalidRequest(
                f"hyperattention: sink must be whole tiles of {self.tile} tokens, 0 to min_seq_len = {self.min_seq_len}, "
                f"got {self.sink}"
            )
        if self.per_head:
            object.__setattr__(self, "caps", dataclasses.replace(self.caps, tensor_parallel=False))

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """The pieces on the diagonal, and the squares below it as a residual. See the class.

        Cost: of the plan O(B nQ nK) bits; of the residual O(Hq M log(M / min_seq_len) (block + samples) D). Holds at most
        about 1 GiB of logits at once. Mutates nothing.
        """
        n, m = q.shape[2], k.shape[2]
        levels = max(1, m // self.min_seq_len).bit_length() - 1
        rows = math.gcd(m - n, self.tile)  # M - N in whole query tiles: then no border of pieces lies inside one
        if layer.idx < self.dense_layers or levels == 0 or rows < _LEAST_ROWS or layer.window:
            return None
        piece = -(-m // (self.tile << levels)) * self.tile
        own = (torch.arange(0, n, rows, device=q.device) + (m - n)) // piece
        first = torch.arange(0, m, self.tile, device=q.device)
        mask = (own[:, None] == first // piece) | (first < self.sink)
        return TilePlan.from_mask(
            mask.expand(q.shape[0], 1, *mask.shape),
            n_rows=n, n_keys=m, block_q=rows, block_k=self.tile, residual=Squares(self, piece, levels, layer.idx),
        )  # fmt: skip
