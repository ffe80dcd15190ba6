"""Tile attention in plain torch: the definition of truth for the kernel beside it."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.reference import attend_reference


def tile_attention_reference(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs a plan keeps and its pseudo-keys; a residual is left to the executor.

        l_ij  = scale q_i . k_j           for kept pairs, -inf otherwise
        lse_i = log sum_j exp(l_ij)
        o_i   = sum_j exp(l_ij - lse_i) v_j

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, M, D]; query head h reads KV head h // (Hq / Hkv). Any float dtype.

    Returns:
        out [B, Hq, N, D] and lse [B, Hq, N], both float32 (computed in float64); rows without a key: 0 and -inf.

    Materialises all N M pairs of every head: for tests.
    """
    plan = dataclasses.replace(plan, residual=None)
    out, lse = attend_reference(plan, q.double(), k.double(), v.double(), scale=scale)
    return out.float(), lse.float()
