"""Neighborhood attention: the mask rule on any number of axes, and attention over a 2-D grid of tokens.

The rule is the published one. The non-causal form lets a token read tokens after it; it is for grids (images, maps), never for
a language model that writes from left to right. The causal 1-D form is the prefill method "neighborhood".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.blocks import check_inputs
from winnow.workers.attention.plain import plain, rows_at_once


@dataclass(frozen=True)
class Axis:
    """One axis of a grid and the window on it.

    Attributes:
        length: tokens L.
        window: keys w a token reads on this axis, 1 or more.
        dilation: only tokens whose index is the same modulo `dilation` see each other; the window counts among those.
        stride: this many neighbours of such a class share the window of one of them, the leader; at most `window`.
        causal: read no token after one's own. Only then may window * dilation exceed the length.
    """

    length: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "window", "dilation", "stride"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"neighborhood: {name} must be 1 or more, got {getattr(self, name)}")
        if self.stride > self.window:
            raise InvalidRequest(f"neighborhood: stride must be at most the window of {self.window}, got {self.stride}")
        if not self.causal and self.window * self.dilation > self.length:
            raise InvalidRequest(
                f"neighborhood: window * dilation must be at most the axis' {self.length} tokens, got {self.window} * "
                f"{self.dilation}; make one smaller, or the axis causal"
            )

    def spans(self) -> tuple[Tensor, Tensor]:
        """(first, end), each [L] int64: token i reads i % d + d t for first[i] <= t < end[i].

        With x = i // d in a class of n tokens, and left = w // 2, right = w - 1 - left:
        non-causal: leader c = min(x - x % s + s // 2, n - 1); w tokens from max(c - left, 0), moved back where they overhang.
        causal: leader c = min(x - x % s + s - 1, n - 1); tokens max(c - w + 1, 0) .. x.

        Source: "Faster Neighborhood Attention" (arXiv 2403.04690) and its strided form (arXiv 2504.16922).
        """
        i = torch.arange(self.length)
        x, n = i // self.dilation, (self.length - 1 - i % self.dilation) // self.dilation + 1
        w, s = self.window, self.stride
        if self.causal:
            leader = torch.minimum(x - x % s + s - 1, n - 1)
            return (leader - w + 1).clamp(min=0), x + 1
        leader = torch.minimum(x - x % s + s // 2, n - 1)
        overhang = (leader + (w - 1 - w // 2) - (n - 1)).clamp(min=0)
        first = (leader - w // 2).clamp(min=0) - overhang
        return first, first + w

    def mask(self) -> Tensor:
        """[L, L] bool: whether a token (row) reads a token (column)."""
        first, end = self.spans()
        j = torch.arange(self.length)
        t = j // self.dilation
        same_class = j[:, None] % self.dilation == j % self.dilation
        return same_class & (t >= first[:, None]) & (t < end[:, None])


def neighborhood_mask(axes: Sequence[Axis]) -> Tensor:
    """[T, T] bool over the T tokens of a grid, the last axis running fastest: a pair must be allowed on every axis."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        mask = torch.kron(mask, axis.mask())
    return mask


def tile_order(grid: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """Row-major tokens in the order in which tiles lie one after the other, row-major inside a tile too.

    Returns:
        [nTiles, tile[0] * tile[1]] int64, token indices; -1 where a tile hangs over the grid's edge.

    A model may keep its tokens in this order through all layers (what it does per token does not care) and go back once.
    """
    (height, width), (rows, columns) = grid, tile
    tokens = torch.nn.functional.pad(
        torch.arange(height * width).view(height, width), (0, -width % columns, 0, -height % rows), value=-1
    )
    tiles: Tensor = tokens.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2).flatten(0, 1)
    return tiles


def neighborhood_attention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    causal: tuple[bool, bool] = (False, False),
    *,
    scale: float | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention over a grid of tokens. Not autoregressive unless both axes are causal.

    Tokens are laid out tile after tile; a query tile reads the key tiles that hold some token's neighbour, and the exact
    mask is applied inside them. Float32 math on any device: the definition for a kernel, not a fast one.

    Args:
        q: [B, Hq, H * W, D]; k, v: [B, Hkv, H * W, D], row-major tokens of the grid, Hq a multiple of Hkv, any float dtype.
        grid: (H, W).
        window, dilation, stride, causal: per axis, see `Axis`.
        scale: factor on q.k; default 1 / sqrt(D).
        tile: tokens of a tile per axis; None = 128 of them, 16 rows of the grid at most: a sequence (H = 1) has tiles of 128.
            It changes the order of the work, not the result.

    Returns:
        out [B, Hq, H * W, D] in q's dtype and lse [B, Hq, H * W] float32, natural log, in row-major order.

    Raises:
        InvalidRequest: sizes that do not fit each other, or a parameter out of range.

    Source: "Faster Neighborhood Attention" (arXiv 2403.04690), section 3: spatial tiles made contiguous by a permutation, halo,
    exact mask on partial tiles. Deviation: every read tile is masked; which tiles are whole is not told apart.
    Cost: the pairs of all tiles read; memory of one slab of query tiles. Mutates nothing.
    """
    check_inputs(q, k, v)
    if q.shape[2] != k.shape[2] or q.shape[2] != grid[0] * grid[1]:
        raise InvalidRequest(
            f"neighborhood: a grid of {grid[0]} x {grid[1]} needs as many q and k, got {q.shape[2]}, {k.shape[2]}"
        )
    if tile is None:
        tile = (min(16, grid[0]), 128 // min(16, grid[0]))
    if min(tile) < 1:
        raise InvalidRequest(f"neighborhood: tile must be 1 or more on both axes, got {list(tile)}")
    axes = [Axis(*args) for args in zip(grid, window, dilation, stride, causal, strict=True)]
    masks = [axis.mask() for axis in axes]
    order = tile_order(grid, tile)
    n_tiles, size = order.shape
    key_tiles = _read_tiles(masks, tile)  # [nTiles, most], -1 = none
    masks = [mask.to(q.device) for mask in masks]
    order, key_tiles = order.to(q.device), key_tiles.to(q.device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    step = max(1, rows_at_once(q, key_tiles.shape[1] * size) // size)
    for first in range(0, n_tiles, step):
        rows, tiles = order[first : first + step], key_tiles[first : first + step]  # [tiles, size], [tiles, most]
        keys = torch.where(tiles[:, :, None] >= 0, order[tiles.clamp(min=0)], -1).flatten(1)
        row, key = rows.clamp(min=0)[:, :, None], keys.clamp(min=0)[:, None, :]
        allowed = masks[0][row // grid[1], key // grid[1]] & masks[1][row % grid[1], key % grid[1]] & (keys >= 0)[:, None]
        tiles_q, tiles_k, tiles_v = (x[:, :, y.clamp(min=0)].transpose(1, 2) for x, y in ((q, rows), (k, keys), (v, keys)))
        part, part_lse = plain(
            tiles_q.flatten(0, 1), tiles_k.flatten(0, 1), tiles_v.flatten(0, 1), scale=scale,
            mask=allowed.repeat(q.shape[0], 1, 1).unsqueeze(1),
        )  # fmt: skip
        real = rows >= 0
        shape = (q.shape[0], rows.shape[0], q.shape[1], size)
        out[:, :, rows[real]] = part.view(*shape, -1).permute(0, 2, 1, 3, 4)[:, :, real].to(q.dtype)
        lse[:, :, rows[real]] = part_lse.view(shape).transpose(1, 2)[:, :, real]
    return out, lse


def _read_tiles(masks: Sequence[Tensor], tile: tuple[int, int]) -> Tensor:
    """[nTiles, most] int64: the key tiles that a query tile must read, ascending, -1 after the last."""
    touched = []
    for mask, size in zip(masks, tile, strict=True):
        pad = -mask.shape[0] % size
        wide = torch.nn.functional.pad(mask, (0, pad, 0, pad))
        touched.append(wide.unflatten(1, (-1, size)).any(2).unflatten(0, (-1, size)).any(1))
    both = torch.kron(*touched)
    ids = torch.where(both, torch.arange(both.shape[1]), both.shape[1]).sort(-1).values[:, : int(both.sum(-1).max())]
    return torch.where(ids < both.shape[1], ids, -1)
