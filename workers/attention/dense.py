"""Dense causal attention with log-sum-exp, the fastest way each device offers. No mask is ever materialised for all pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from winnow.workers.attention import blocks
from winnow.workers.attention.lse import merge
from winnow.workers.attention.plain import plain, rows_at_once

_BAND_ROWS = 128  # query rows of one block of a sliding window


def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float = 0.0, window: int = 0) -> tuple[Tensor, Tensor]:
    """Right-aligned causal attention over all keys, or over each row's last `window` keys.

    Args and returns: as `attend_plan`.

    N rows of M keys are a rectangle of M - N keys that every row reads and a triangle, merged by log-sum-exp: fused kernels
    align a causal mask left when M > N. A window is a band of overlapping key blocks, read and nothing else. Soft-capping
    goes through float32 math in row blocks.
    """
    n, m = q.shape[2], k.shape[2]
    window = 0 if window >= m else window
    if softcap:
        return masked(q, k, v, scale=scale, softcap=softcap, window=window)
    if window:
        return _band(q, k, v, scale, window)
    if m == n:
        return blocks.block(q, k, v, scale=scale, causal=True)
    if n == 1:
        return blocks.block(q, k, v, scale=scale)
    past = m - n
    rectangle, rectangle_lse = blocks.block(q, k[:, :, :past], v[:, :, :past], scale=scale)
    triangle, triangle_lse = blocks.block(q, k[:, :, past:], v[:, :, past:], scale=scale, causal=True)
    out, lse = merge((rectangle, triangle), (rectangle_lse, triangle_lse))
    return out.to(q.dtype), lse


def _band(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    n, m = q.shape[2], k.shape[2]
    past = m - n
    whole = min(n, max(0, window - past))  # rows whose window still holds every key before them
    outs, lses = [], []
    if whole:
        out, lse = dense(q[:, :, :whole], k[:, :, : past + whole], v[:, :, : past + whole], scale=scale)
        outs.append(out)
        lses.append(lse)
    masks: dict[int, Tensor] = {}
    for start in range(whole, n, _BAND_ROWS):
        rows = min(_BAND_ROWS, n - start)
        low, high = past + start - window + 1, past + start + rows
        if rows not in masks:
            row, key = torch.arange(rows, device=q.device)[:, None], torch.arange(high - low, device=q.device)
            masks[rows] = (key >= row) & (key < row + window)
        keys, values = k[:, :, low:high], v[:, :, low:high]
        out, lse = blocks.block(q[:, :, start : start + rows], keys, values, scale=scale, mask=masks[rows])
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    keep: Callable[[int, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Float32 math in row blocks of bounded memory, any device; arguments and returns as `attend_plan`.

    Args:
        keep: keep(start, stop) says which pairs of these rows may be read, besides causality and window:
            [B, H, stop - start, M] bool with B and H as in q, or 1. None = all.
    """
    n, m = q.shape[2], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    step = max(1, min(rows_at_once(q, min(m, 2 * window)), window)) if window else rows_at_once(q, m)
    for start in range(0, n, step):
        stop = min(n, start + step)
        low, high = max(0, m - n + start - window + 1) if window else 0, m - n + stop
        key = torch.arange(low, high, device=q.device)
        position = torch.arange(m - n + start, m - n + stop, device=q.device)[:, None]
        allowed = key <= position
        if window:
            allowed = allowed & (key > position - window)
        if keep is not None:
            allowed = allowed & keep(start, stop)[..., low:high]
        keys, values = k[:, :, low:high], v[:, :, low:high]
        part, lse[:, :, start:stop] = plain(q[:, :, start:stop], keys, values, scale=scale, softcap=softcap, mask=allowed)
        out[:, :, start:stop] = part.to(q.dtype)
    return out, lse
