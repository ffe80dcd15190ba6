"""What a selector has computed of whole tiles of keys, pooled keys say. Kept beside a segment's KV, in this process."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class KeyTiles:
    """Results of tiles that later chunks of the same prompt, and prompts that begin with its KV, need not compute again.

    They belong to one sequence of keys and one method. Not thread-safe: whoever computes the keys writes them, and once the
    segment is sealed nobody does.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, Tensor]] = {}  # keys of a tile, and [B, H, tiles, ...] of the first whole tiles

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(found.nbytes for _, found in self._known.values())

    def extended(self, name: Hashable, k: Tensor, tile: int, compute: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`compute(k, 0)`, computed only of tiles that are new.

        Args:
            name: of these keys: the same name stands for the same layer, heads and function, with more keys each time.
            k: [B, H, M, D]. tile: keys of a tile; the last one may be shorter, and is computed anew each time.
            compute: (keys from the first one of some tile on, its position) -> [B, H, tiles of them, ...].

        Keeps the result of the whole tiles. A chunk that was not asked for, or KV that came without them, is made up for once.
        """
        _, known = self._known.get(name, (tile, None))
        if known is None or known.shape[1] != k.shape[1]:  # heads cut into other slabs than before
            found = compute(k, 0)
        else:
            known, first = known.to(k.device), known.shape[2] * tile
            found = torch.cat((known, compute(k[:, :, first:], first)), 2) if first < k.shape[2] else known
        self._known[name] = tile, found[:, :, : k.shape[2] // tile]
        return found

    def copy_prefix_from(self, other: KeyTiles, n_tokens: int) -> None:
        """Take what `other` knows of the tiles that lie within the first n_tokens keys. Copies: `other` may be freed."""
        for name, (tile, found) in other._known.items():
            if n_tokens >= tile:
                self._known[name] = tile, found[:, :, : n_tokens // tile].clone()

    def truncate(self, n_tokens: int) -> None:
        """Forget tiles that do not lie within the first n_tokens keys."""
        self._known = {name: (tile, found[:, :, : n_tokens // tile]) for name, (tile, found) in self._known.items()}

    def move(self, device: torch.device) -> None:
        """Keep it there from now on, in no more memory than `size_bytes` says."""
        # cloned: a slice of whole tiles keeps the memory of the ragged one behind them
        self._known = {name: (tile, found.clone().to(device)) for name, (tile, found) in self._known.items()}

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
