"""What `tile_attention_kernel` is compiled with, and what it is given to run. Importing this module imports triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from winnow.errors import Unsupported
from winnow.workers.attention.lowering import Lowered
from winnow.workers.attention.plan import TileLists, TilePlan


@dataclass(frozen=True)
class Launch:
    """Compile-time choices for one kind of call."""

    head_size: int
    padded_size: int
    block_q: int
    block_k: int
    step: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, dtype: torch.dtype, head_size: int, block_q: int, block_k: int) -> Launch:
        """Sizes that fit the shared memory and registers of compute capability 8.0 and up.

        Args:
            dtype: of q, in which the products are computed.

        Raises:
            Unsupported: tiles that are no power of two in 16..128, or heads above 256.
        """
        if reason := why_not(head_size, block_q, block_k):
            raise Unsupported(f"tile attention: {reason}")
        padded = max(16, triton.next_power_of_2(head_size))
        wide = dtype == torch.float32
        step = min(block_k, (64 if padded <= 64 else 32 if padded <= 128 else 16) if wide else (64 if padded <= 128 else 32))
        return cls(head_size, padded, block_q, block_k, step, 8 if wide or padded > 128 else 4, 1 if wide else 2)

    def constants(
        self, *, upcast: bool = False, streams: bool = False, intervals: bool = False, columns: bool = False,
        pooled: bool = False, page: int = 0, fp8: bool = False, packed: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """The kernel's constexpr arguments. page: keys of a page, 0 = contiguous K and V."""
        return {
            "HEAD_SIZE": self.head_size,
            "D": self.padded_size,
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "STEP": self.step,
            "UPCAST": upcast,
            "STREAMS": streams,
            "INTERVALS": intervals,
            "COLUMNS": columns,
            "POOLED": pooled,
            "PAGE": page,
            "FP8": fp8,
            "PACKED": packed,
        }


def why_not(head_size: int, block_q: int, block_k: int) -> str:
    """Why the kernel cannot run these sizes; "" if it can."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in (16, 32, 64, 128):
            return f"{name} must be 16, 32, 64 or 128, got {size}"
    return f"head size must be at most 256, got {head_size}" if head_size > 256 else ""


@dataclass(frozen=True, eq=False)
class Work:
    """What a launch runs: lists, what belongs to them, and the integers that tell the kernel where everything lies.

    Attributes:
        pooled: pseudo-keys, their values and weights; see `pseudo_keys`. None = no mean correction.
        grid: programs.
        n_rows, n_keys, heads_per_mask, mask_heads, batch, n_q_tiles: the plan's; in a pack n_rows is the rows of all sequences
            and the others are read from `sequences`.
        items: in a pack, [query tiles, 2] int32: sequence and query tile, in the order they are started.
        sequences: in a pack, [S, 12] int64: first row, first key, rows, keys, query tiles, query heads of a mask head, first mask
            head, first row of lists, first row of intervals (-1 = has none), tiles with a pseudo-key, first of its pseudo-keys
            and of its weights.
    """

    lists: Lowered
    columns: TileLists | None
    pooled: tuple[Tensor, Tensor, Tensor] | None
    grid: tuple[int, int]
    n_rows: int
    n_keys: int = 0
    heads_per_mask: int = 0
    mask_heads: int = 0
    batch: int = 0
    n_q_tiles: int = 0
    items: Tensor | None = None
    sequences: Tensor | None = None

    @classmethod
    def of(cls, plan: TilePlan, lists: Lowered, n_q_heads: int, batch: int, pooled: tuple[Tensor, Tensor, Tensor] | None) -> Work:
        """One plan, lowered, for every sequence of a batch."""
        return cls(
            lists, plan.token_columns, pooled, (plan.n_q_tiles, batch * n_q_heads), plan.n_rows, plan.n_keys,
            n_q_heads // plan.mask_heads, plan.mask_heads, plan.batch, plan.n_q_tiles,
        )  # fmt: skip
