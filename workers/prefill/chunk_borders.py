"""Where a text falls into chunks, read off its keys by a small trained network: DHSA's first version cuts with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.workers.prefill import scoring
from winnow.workers.prefill.scoring import keep_top

HIDDEN = 256
MOST_REACH = 4096  # tokens on each side of a gap; what attends over them grows with its square
_HEADS = 8
_EPS = 1e-5


def parameter_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one predictor's parameters for keys of C channels (all KV heads of a token side by side)."""
    return {
        "qkv": (channels, 3 * channels),
        "qkv_bias": (3 * channels,),
        "out": (channels, channels),
        "out_bias": (channels,),
        "norm": (channels,),
        "norm_bias": (channels,),
        "hidden": (4 * channels + 1, HIDDEN),
        "hidden_bias": (HIDDEN,),
        "score": (HIDDEN,),
        "score_bias": (),
    }


@dataclass(frozen=True, eq=False)
class BorderPredictor:
    """Scores each gap between two tokens by the `reach` keys on either side of it.

        x = (key - mean) / deviation;  y = norm(x + attention(x over the 2 reach tokens))
        l, r = mean of y over the left and the right half
        score = w2 . gelu(W1 [l, r, |l - r|, l * r, cos(l, r)] + b1) + b2

    Attributes:
        params: by the names of `parameter_shapes`, float32.
        mean, deviation: [C] float32, of the keys it was trained on.
        reach: tokens looked at on each side.

    Source: as `methods.dhsa_v1`. Deviation: keys are standardised by channel first; their channels differ in size by
    orders of magnitude. The nonlinearity is not published; GELU is used.
    """

    params: Mapping[str, Tensor]
    mean: Tensor
    deviation: Tensor
    reach: int

    def window_scores(self, windows: Tensor, is_token: Tensor) -> Tensor:
        """Scores of gaps.

        Args:
            windows: [G, 2 reach, C] keys around each gap, any float dtype.
            is_token: [G, 2 reach] bool, false beyond either end of the text; each half has one true at least.

        Returns:
            [G] float32, a logit.
        """
        p = self.params
        gaps, width, channels = windows.shape
        heads = next(h for h in (_HEADS, 4, 2, 1) if channels % h == 0)
        x = (windows.float() - self.mean) / self.deviation
        qkv = (x @ p["qkv"] + p["qkv_bias"]).view(gaps, width, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [3, G, h, 2 reach, C / h]
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=is_token[:, None, None])
        y = x + mixed.transpose(1, 2).reshape(gaps, width, channels) @ p["out"] + p["out_bias"]
        y = F.layer_norm(y, (channels,), p["norm"], p["norm_bias"], _EPS) * is_token.unsqueeze(-1)
        halves = y.view(gaps, 2, self.reach, channels).sum(2) / is_token.view(gaps, 2, self.reach).sum(2).unsqueeze(-1)
        left, right = halves.unbind(1)
        features = torch.cat(
            (left, right, (left - right).abs(), left * right, F.cosine_similarity(left, right, dim=-1).unsqueeze(-1)), -1
        )
        hidden = F.gelu(features @ p["hidden"] + p["hidden_bias"])
        return hidden @ p["score"] + p["score_bias"]

    def scores(self, keys: Tensor) -> Tensor:
        """keys [T, C] -> [T] float32: entry p is the score of a border before token p; -inf at 0. In slabs of bounded memory."""
        tokens, channels = keys.shape
        out = torch.full((tokens,), -torch.inf, device=keys.device)
        step = max(1, scoring.SLAB_BYTES // (4 * 2 * self.reach * 8 * channels))
        for first in range(1, tokens, step):
            gaps = torch.arange(first, min(first + step, tokens), device=keys.device)
            windows, is_token = windows_at(keys, gaps, self.reach)
            out[gaps] = self.window_scores(windows, is_token)
        return out


def windows_at(keys: Tensor, gaps: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Keys around gaps: keys [T, C], gaps [G] in 1..T-1 -> [G, 2 reach, C], and [G, 2 reach] bool: is a token of the text."""
    at = gaps[:, None] + torch.arange(-reach, reach, device=keys.device)
    is_token = (at >= 0) & (at < keys.shape[0])
    return keys[at.clamp(0, keys.shape[0] - 1)], is_token


def pick_borders(scores: Tensor, *, threshold: float, apart: int, most: int) -> Tensor:
    """The gaps that become borders.

    Args:
        scores: [B, T] float, -inf where no border may be.
        threshold: borders score above it. apart: a border has the largest score within so many gaps on either side; of equal
            ones the first. most: the largest `most` of them are taken.

    Returns:
        [B, T] bool.
    """
    before = F.pad(_largest_upto(scores, apart)[:, :-1], (1, 0), value=-torch.inf)
    after = _largest_upto(scores.flip(-1), apart + 1).flip(-1)
    peak = (scores > threshold) & (scores >= after) & (scores > before)
    return keep_top(scores.masked_fill(~peak, -torch.inf), most)


def _largest_upto(x: Tensor, width: int) -> Tensor:
    """x [B, T] -> [B, T]: the largest of each entry and the width - 1 before it. Cost: O(B T log(min(width, T)))."""
    width, seen = min(width, x.shape[-1]), 1  # a user's width may be beyond any memory
    while seen < width:
        step = min(seen, width - seen)
        x = torch.maximum(x, F.pad(x[:, :-step], (step, 0), value=-torch.inf))
        seen += step
    return x
