"""Scores of mean queries against mean keys that know what pooling does to a rotary embedding. For any method that pools both.

The mean over B positions of a rotary pair of angle theta is about sinc(B theta / 2 pi) of its size: fast pairs cancel, slow pairs
drown what is left of them in one common score. So fast and slow pairs are scored apart, each at its own temperature.

Source: "Prism: Spectral-Aware Block-Sparse Attention" (arXiv 2602.08426, ICML 2026), which keeps what either band finds
(`methods.prism`). One score a tile from both, for methods that rank or add up scores, is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.prefill.scoring import logits_of

HIGH_SHARE, LOW_SHARE = 0.5, 0.75  # of the rotary pairs, published for 128 dimensions; the bands overlap
POOLINGS = ("mean", "bands")
_EPS = 1e-6


def check_pooling(method: str, pooling: str) -> None:
    """Raises InvalidRequest unless it is one of `POOLINGS`."""
    if pooling not in POOLINGS:
        raise InvalidRequest(f"{method}: pooling must be one of {', '.join(POOLINGS)}, got {pooling!r:.40}")


def pooled_logits(
    pooled_q: Tensor, pooled_k: Tensor, layer: LayerSpec, forbidden: Tensor | None = None, *, pooling: str
) -> Tensor:
    """Scores of tiles by their means: logits, or with pooling "bands" the logarithm of the larger share of two bands.

        bands:  score[I, J] = max over z of (l_z[I, J] - ln sum_J' exp l_z[I, J']),   l_z from `band_logits`

    A tile ranks by the band that sees it best, and what `softmax` makes of a row is again shares of tiles.

    Args:
        pooled_q: [B, Hq, nQ, D], pooled_k: [B, Hkv, nK, D], float32. forbidden: [nQ, nK] bool, tiles without a score.

    Returns:
        [B, Hq, nQ, nK] float32, -inf where forbidden.
    """
    if pooling == "mean":
        rows = pooled_q.unflatten(1, (pooled_k.shape[1], -1)).flatten(2, 3)  # a group's query heads under each other
        scores = logits_of(rows, pooled_k, layer).view(*pooled_q.shape[:3], -1)
        return scores if forbidden is None else scores.masked_fill(forbidden, -torch.inf)
    found = []
    for band in bands(pooled_q.shape[3], HIGH_SHARE, LOW_SHARE, pooled_q.device):
        logits = band_logits(pooled_q, pooled_k, band, layer)
        found.append(torch.log_softmax(logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf), -1))
    return torch.maximum(*found)


def bands(head_size: int, high_share: float, low_share: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Dimensions of the high and the low band, int64.

    The decoder rotates dimension j together with j + D / 2, by an angle that shrinks as j grows (`workers/model/rope.py`):
    the fast pairs are the first of both halves, the slow ones the last of both.
    """
    half = head_size // 2
    n_high, n_low = (max(1, round(share * half)) for share in (high_share, low_share))
    pair = torch.arange(half, device=device)
    high, low = pair[:n_high], pair[half - n_low :]
    return torch.cat((high, high + half)), torch.cat((low, low + half))


def band_logits(pooled_q: Tensor, pooled_k: Tensor, band: Tensor, layer: LayerSpec) -> Tensor:
    """[B, Hq, nQ, nK] float32: logits of one band at its temperature.

    Args:
        pooled_q: [B, Hq, nQ, D], pooled_k: [B, Hkv, nK, D], float32. band: its dimensions.
    """
    batch, hq, n_q, d = pooled_q.shape
    hkv, n_k = pooled_k.shape[1], pooled_k.shape[2]
    share = band.numel() / d
    band_q, band_k = pooled_q[..., band], pooled_k[..., band]
    # scale / share / (their ratios) is the published 1 / (sqrt(d_z) t_z) where scale is 1 / sqrt(D)
    band_q = band_q / (share * _rms(band_q) / _rms(pooled_q)).clamp(min=_EPS)
    band_k = band_k / (_rms(band_k) / _rms(pooled_k)).clamp(min=_EPS)
    rows = band_q.reshape(batch, hkv, hq // hkv * n_q, -1)
    return logits_of(rows, band_k, layer).view(batch, hq, n_q, n_k)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over tiles and dimensions, [B, H, 1, 1]."""
    return x.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=_EPS)
