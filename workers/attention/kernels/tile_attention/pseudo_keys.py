"""What mean correction adds to a plan's keys, in the form the kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.estimates import log_weights, pooled_tiles
from winnow.workers.attention.kv import KVStorage
from winnow.workers.attention.plan import TilePlan

_LOG2_E = 1.4426950408889634
_KEYS = 8192  # taken out of pages at once


def pseudo_keys(plan: TilePlan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values of all whole tiles [B, Hkv, M // Bk, D] in k's dtype, and what a query tile adds to their logits.

    The latter [B, Hm, nQ, M // Bk] float32, base 2, -inf where the tile has no pseudo-key. All contiguous.
    """
    pooled_k, pooled_v = (pooled_tiles(x, plan.block_k).to(k.dtype).contiguous() for x in (k, v))
    weights = log_weights(plan)[..., : pooled_k.shape[2]]
    return pooled_k, pooled_v, (weights * _LOG2_E).contiguous()


def stored_pseudo_keys(plan: TilePlan, kv: KVStorage, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`pseudo_keys` out of storage of a batch, in this dtype and without float8's scales, which the kernel applies.

    Some thousand keys at a time are taken out of their pages.
    """
    whole, step = plan.n_keys // plan.block_k * plan.block_k, max(1, _KEYS // plan.block_k) * plan.block_k
    means: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, max(1, whole), step):
        for mean, x in zip(means, kv.part(start, min(whole, start + step)), strict=True):
            mean.append(pooled_tiles(x.to(dtype), plan.block_k).to(dtype))
    pooled_k, pooled_v = (torch.cat(mean, 2) for mean in means)
    weights = log_weights(plan)[..., : pooled_k.shape[2]]
    return pooled_k, pooled_v, (weights * _LOG2_E).contiguous()
