"""Fused attention on CUDA: cuDNN first, then torch's flash kernel, then float32 math. Imported without CUDA, run with it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from winnow.workers.attention.plain import plain, rows_at_once

log = logging.getLogger(__name__)
_SMALL_ROWS = 64  # at most this many rows: flash splits the keys over the whole device, cuDNN one row block over one unit
_refused: set[tuple[str, torch.dtype, int, bool, bool]] = set()  # what a kernel turned down once is not asked again


def fused(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over all keys given, or with causal over keys 0..i of row i (M = N).

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, M, D].

    Returns:
        out [B, Hq, N, D] in q's dtype and lse [B, Hq, N] float32, natural log.

    A kernel that turns a dtype or head size down is reported once in the log and the next one is used.
    """
    b, hq, n, d = q.shape
    hkv = k.shape[1]
    group = hq // hkv
    rows, height = q, n
    if group > 1 and not causal and group * n <= _SMALL_ROWS:
        rows, height = q.reshape(b, hkv, group * n, d), group * n  # the group's rows share their keys: decode
    if q.dtype != torch.float32:
        order = ("flash", "cudnn") if height <= _SMALL_ROWS else ("cudnn", "flash")
        for kernel in order:
            case = (kernel, q.dtype, d, causal, rows.shape[1] != hkv)
            if case in _refused:
                continue
            try:
                out, lse = _cudnn(rows, k, v, scale, causal) if kernel == "cudnn" else _flash(rows, k, v, scale, causal)
                return out.reshape(b, hq, n, d), lse.reshape(b, hq, n)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _refused.add(case)
                log.warning("attention: %s refused %s heads of %d, using the next kernel: %.200s", kernel, q.dtype, d, error)
    return _plain_rows(q, k, v, scale, causal)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _plain_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    n, m = q.shape[2], k.shape[2]
    outs, lses = [], []
    step = rows_at_once(q, m)
    for start in range(0, n, step):
        stop = min(n, start + step)
        high = stop if causal else m
        mask = None
        if causal:
            mask = torch.arange(high, device=q.device) <= torch.arange(start, stop, device=q.device)[:, None]
        out, lse = plain(q[:, :, start:stop], k[:, :, :high], v[:, :, :high], scale=scale, mask=mask)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
