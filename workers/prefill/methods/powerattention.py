"""PowerAttention: a fixed mask of near tiles, the first tile, and tiles at distances that are powers of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods

_BLOCKS = (16, 32, 64, 128, 256, 512)


@prefill_methods.register("powerattention")
@dataclass(frozen=True)
class PowerAttention(TileListMethod):
    """Read the key at j from position i iff, with t = i // block - j // block and j <= i,

        t < local_blocks   or   t is 0 or a power of two   or   j < sink_blocks * block

    A distance is the sum of its binary digits, so any two tokens are connected within log2(M / block) layers. The rule knows
    positions only: selection costs nothing, all heads share one plan, and a row's plan depends on its own position alone.

    Source: "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention" (arXiv 2503.03588,
    2025), its rule and its defaults. Made for models trained with this mask: one trained with dense attention loses recall
    and answers, more the longer the prompt. Deviations:
    - blocks count from the first key of the whole sequence also when only its last N rows are computed (M > N), and a block
      is cut into key tiles of at most 128: the same pairs, in sizes the executor runs;
    - where M - N is no multiple of 16, the rows of a 16-row tile that a border of blocks cuts (at most 15 of `block`) read
      what either side of the border reads: a little more than the rule says;
    - a number of first blocks other than one can be asked for;
    - of the prompt only: decoding reads all cached keys, where the published one goes on with the mask.
    Layers with a sliding window, and prompts that the rule reads in full, are left dense.

    Attributes:
        block: keys of a block of the rule, 16, 32, 64, 128, 256 or 512.
        local_blocks: how many blocks next to a row, its own among them, are read.
        sink_blocks: how many first blocks every row reads.
    """

    caps = Capabilities(
        tensor_parallel=True,
        fallback="dense",
        training="model",
        notes="fixed mask: near, first and power-of-two-distant blocks of the prompt; decoding reads all cached keys",
    )
    block: int = 256
    local_blocks: int = 5
    sink_blocks: int = 1

    def __post_init__(self) -> None:
        if self.block not in _BLOCKS:
            raise InvalidRequest(f"powerattention: block must be one of {', '.join(map(str, _BLOCKS))}, got {self.block}")
        if self.local_blocks < 1:
            raise InvalidRequest(f"powerattention: local_blocks must be 1 or more, got {self.local_blocks}; the paper has 5")
        if self.sink_blocks < 0:
            raise InvalidRequest(f"powerattention: sink_blocks must be 0 or more, got {self.sink_blocks}; the paper has 1")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """The same tiles for all sequences and heads, from N and M alone. See the class.

        Cost: O(B nQ nK) bits, no scores. Mutates nothing.
        """
        n, m = q.shape[2], k.shape[2]
        if -(-m // self.block) <= self.local_blocks + self.sink_blocks or layer.window:
            return None
        offset = m - n
        tile = min(128, self.block)
        rows = max(16, math.gcd(offset, tile))  # M - N in whole query tiles: then no border of blocks lies inside one
        first = torch.arange(0, n, rows, device=q.device) + offset
        last = torch.clamp(first + rows, max=m) - 1
        key_block = torch.arange(0, m, tile, device=q.device) // self.block
        keep = torch.zeros(first.shape[0], key_block.shape[0], dtype=torch.bool, device=q.device)
        for own in (first // self.block, last // self.block):  # equal unless a border lies between
            keep |= self.reads(own[:, None], key_block)
        mask = keep.expand(q.shape[0], 1, *keep.shape)
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=rows, block_k=tile, mean_correction=self.correction)

    def reads(self, own: Tensor, other: Tensor) -> Tensor:
        """Whether rows of block `own` read keys of block `other`: int64 indices that broadcast -> bool. False ahead of a row."""
        distance = own - other
        power = (distance & (distance - 1)) == 0  # 0 counts as one
        return (distance >= 0) & ((distance < self.local_blocks) | power | (other < self.sink_blocks))
