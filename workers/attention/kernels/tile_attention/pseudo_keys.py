"""What mean correction adds to a plan's keys, in the form the kernels read."""

from __future__ import annotations

from torch import Tensor

from winnow.workers.attention.estimates import log_weights, pooled_tiles
from winnow.workers.attention.plan import TilePlan

_LOG2_E = 1.4426950408889634


def pseudo_keys(plan: TilePlan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values of all whole tiles [B, Hkv, M // Bk, D] in k's dtype, and what a query tile adds to their logits.

    The latter [B, Hm, nQ, M // Bk] float32, base 2, -inf where the tile has no pseudo-key. All contiguous.
    """
    pooled_k, pooled_v = (pooled_tiles(x, plan.block_k).to(k.dtype).contiguous() for x in (k, v))
    weights = log_weights(plan)[..., : pooled_k.shape[2]]
    return pooled_k, pooled_v, (weights * _LOG2_E).contiguous()
