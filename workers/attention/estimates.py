"""Estimates of the keys that a plan leaves out, for the executor to merge with what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.kernels import kernel_module
from winnow.workers.attention.plain import plain, rows_at_once
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.attention.tiles import tile_kinds


def estimates(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, window: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Every estimate the plan asks for: out [B, Hq, N, D] and lse [B, Hq, N] each, lse -inf where a row has none.

    Args: as `attend_plan`.

    Raises:
        InvalidRequest: an estimator returned other shapes.
    """
    found: list[tuple[Tensor, Tensor]] = []
    if plan.mean_correction:
        found.append(mean_correction(plan, q, k, v, scale=scale, softcap=softcap, window=window))
    if isinstance(plan.residual, tuple):
        found.append(plan.residual)
    elif plan.residual is not None:
        out, lse = plan.residual(q, k, v, scale=scale, softcap=softcap)
        if (out.shape, lse.shape) != (q.shape, q.shape[:3]):  # one that broadcasts would be merged all the same
            got = f"{list(out.shape)} and {list(lse.shape)}"
            raise InvalidRequest(f"plan: its residual must return {list(q.shape)} and {list(q.shape[:3])}, got {got}")
        found.append((out, lse))
    return found


def mean_correction(
    plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention over one pseudo-key for each tile that a CSR head leaves out and all rows of the query tile could read.

    The pseudo-key of a tile of c keys is its mean key with the mean value; its logit is raised by ln(c - u), where u of the
    keys are token columns of this query tile and read already. By Jensen's inequality exp(logit) is then at most the tile's
    true mass (with u = 0 and no soft-capping): what is kept is overweighted less, never too little.

    Args: as `attend_plan`. With a window, tiles that begin before the window of the query tile's last row have no pseudo-key.

    Returns:
        out [B, Hq, N, D] and lse [B, Hq, N], float32; rows of other heads and rows that lack no tile: 0 and -inf.

    Source: FlashPrefill V2 (arXiv 2608.19758), mean correction. Deviation: token columns are subtracted from the weight.
    Cost: 1 / Bk of dense attention, float32, any device; one logit per row and key tile is held for as many rows as fit.
    """
    n, n_tiles = q.shape[2], plan.n_keys // plan.block_k
    if n_tiles == 0:
        return torch.zeros(q.shape, device=q.device), torch.full(q.shape[:3], -torch.inf, device=q.device)
    pooled_k, pooled_v = pooled_tiles(k, plan.block_k), pooled_tiles(v, plan.block_k)
    weight = log_weights(plan, window)[..., :n_tiles]
    weight = weight.repeat_interleave(q.shape[1] // plan.mask_heads, 1) if plan.mask_heads > 1 else weight
    outs, lses = [], []
    step = max(1, rows_at_once(q, n_tiles) // plan.block_q)  # query tiles
    for first in range(0, plan.n_q_tiles, step):
        rows = q[:, :, first * plan.block_q : (first + step) * plan.block_q]
        bias = weight[:, :, first : first + step].repeat_interleave(plan.block_q, 2)[:, :, : rows.shape[2]]
        out, lse = plain(rows, pooled_k, pooled_v, scale=scale, softcap=softcap, bias=bias)
        outs.append(out)
        lses.append(lse)
    assert sum(x.shape[2] for x in outs) == n
    return torch.cat(outs, 2), torch.cat(lses, 2)


def pooled_tiles(x: Tensor, block_k: int) -> Tensor:
    """[B, H, M, D] -> [B, H, M // Bk, D] float32: means of the whole tiles. A tile cut short by the end is never left out."""
    whole = x.shape[2] // block_k
    return x[:, :, : whole * block_k].unflatten(2, (whole, block_k)).mean(3, dtype=torch.float32)


def log_weights(plan: TilePlan, window: int = 0) -> Tensor:
    """[B, Hm, nQ, nK] float32: ln of how many keys each tile's pseudo-key stands for, -inf where it has none."""
    kernels = kernel_module("tile_weights") if plan.device.type == "cuda" else None
    if kernels is not None:
        weights: Tensor = kernels.log_weights(plan, window)
        return weights
    full, _, _ = tile_kinds(plan.n_rows, plan.n_keys, plan.block_q, plan.block_k, plan.device)
    shape = (plan.batch, plan.mask_heads, plan.n_q_tiles, plan.n_k_tiles)
    if window:
        first = torch.arange(1, plan.n_q_tiles + 1, device=plan.device) * plan.block_q
        last = torch.clamp(first, max=plan.n_rows) - 1 + (plan.n_keys - plan.n_rows)
        full = full & (torch.arange(plan.n_k_tiles, device=plan.device) * plan.block_k > (last - window)[:, None])
    size = torch.where(full, plan.block_k, 0).expand(shape)
    size = torch.where((plan.head_class == HeadClass.CSR)[:, :, None, None], size, 0).contiguous().view(-1)
    size = size * (_counts(plan.full.row_of_ids(), plan.full.ids, plan.n_k_tiles, size) == 0)
    if plan.token_columns is not None:
        size = size - _counts(plan.token_columns.row_of_ids(), plan.token_columns.ids // plan.block_k, plan.n_k_tiles, size)
    return size.clamp(min=0).view(shape).float().log()  # log 0 = -inf


def _counts(row: Tensor, column: Tensor, columns: int, like: Tensor) -> Tensor:
    """How often each (row, column) occurs, flat as `like`; rows past the end are not counted. Does not wait for the device."""
    at = torch.clamp(row * columns + column, max=like.numel())
    return torch.zeros(like.numel() + 1, dtype=like.dtype, device=like.device).index_add_(0, at, torch.ones_like(at))[:-1]
