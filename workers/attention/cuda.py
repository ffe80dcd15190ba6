"""Fused attention on CUDA: cuDNN first, then torch's flash kernel, then float32 math. Imported without CUDA, run with it."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from winnow.workers.attention.lse import merge
from winnow.workers.attention.plain import plain, rows_at_once

log = logging.getLogger(__name__)
_SMALL_ROWS = 64  # at most this many rows: flash splits the keys over the whole device, cuDNN one row block over one unit
_PIECE_KEYS = 16_384  # of a piece of the keys, at least: merging two takes as long as reading a few thousand
# Shapes that a kernel turned down, by kernel, dtype, head size, causality and grouping. None is asked for again, and after two
# nothing of their kind: then it was not the shape.
_refused: dict[tuple[str, torch.dtype, int, bool, bool], set[tuple[int, ...]]] = {}


def fused(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over all keys given, or with causal over keys 0..i of row i (M = N).

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, M, D].

    Returns:
        out [B, Hq, N, D] in q's dtype and lse [B, Hq, N] float32, natural log.

    A kernel that turns a case down is reported once in the log and the next one is used.

    Raises:
        torch.AcceleratorError, torch.OutOfMemoryError: what no other kernel can make good.
    """
    b, hq, n, d = q.shape
    hkv = k.shape[1]
    group = hq // hkv
    rows, height = q, n
    if group > 1 and not causal and group * n <= _SMALL_ROWS:
        rows, height = q.reshape(b, hkv, group * n, d), group * n  # the group's rows share their keys: decode
    if q.dtype != torch.float32:
        kernels = [_flash, _cudnn] if height <= _SMALL_ROWS else [_cudnn, _flash]
        if height > _SMALL_ROWS and not causal and _pieces(rows, k) > 1:
            kernels.insert(0, _in_pieces)
        for kernel in kernels:
            case = (kernel.__name__, q.dtype, d, causal, rows.shape[1] != hkv)
            shape, refused = (*rows.shape, k.shape[2]), _refused.get(case, set())
            if shape in refused or len(refused) > 1:
                continue
            try:
                out, lse = kernel(rows, k, v, scale, causal)
                return out.reshape(b, hq, n, d), lse.reshape(b, hq, n)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except RuntimeError as error:
                _refused[case] = {*refused, shape}
                log.warning("attention: %s refused %s %s, using the next: %.200s", kernel.__name__, q.dtype, shape, error)
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


def _pieces(q: Tensor, k: Tensor) -> int:
    """Pieces of the keys that give all of the device work where the row blocks of one sequence do not: two a processor."""
    if q.shape[0] > 1:
        return 1
    row_blocks = q.shape[1] * -(-q.shape[2] // 64)
    return min(2 * _processors(q.device.index) // row_blocks, k.shape[2] // _PIECE_KEYS)


@functools.cache
def _processors(device: int | None) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _in_pieces(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Every row over all keys, which are cut into equal pieces and merged: q [1, Hq, N, D], few rows, and k [1, Hkv, M, D]."""
    assert not causal
    pieces = _pieces(q, k)
    size = k.shape[2] // pieces
    keys, values = (x[0, :, : pieces * size].unflatten(1, (pieces, size)).transpose(0, 1) for x in (k, v))
    out, lse = _cudnn(q.expand(pieces, -1, -1, -1).contiguous(), keys, values, scale, causal)
    out, lse = out.view(pieces, 1, *q.shape[1:]), lse.view(pieces, 1, *q.shape[1:3])
    shares = torch.softmax(lse, 0).unsqueeze(-1)
    merged, total = (out * shares).sum(0), lse.logsumexp(0)
    if pieces * size < k.shape[2]:
        rest, rest_lse = _cudnn(q, k[:, :, pieces * size :], v[:, :, pieces * size :], scale, causal)
        merged, total = merge((merged, rest), (total, rest_lse.view(total.shape)))
    return merged.to(q.dtype), total


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
