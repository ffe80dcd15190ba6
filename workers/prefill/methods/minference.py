"""MInference: each head's vertical lines and slashes, read off the attention of the last queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TileLists, TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.scoring import keep_top, recent_mass


@prefill_methods.register("minference")
@dataclass(frozen=True)
class MInference(TileListMethod):
    """The keys (verticals) and the distances (slashes) that hold most of the last queries' attention, for every row.

    A slash is executed as the tiles it passes through; a vertical that lies in no such tile is read as a single key.
    Source: "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention" (arXiv 2407.02490,
    NeurIPS 2024), its vertical-slash pattern, and the published code's constants. Deviations:
    - every head is vertical-slash with the same two budgets, which the published code takes for models that it has no
      offline search for; the other two patterns and the search over budgets are not offered;
    - tiles lie on the grid of keys: a lone slash passes through two of them. The published index moves tiles of 64 to each
      slash and then merges neighbours, whose union is wider than the slashes by up to a tile. With small budgets that reads
      about a fifth less than this does;
    - runs for M > N and any length; the last, shorter query tile gets the tiles of a whole one;
    - budgets below what is forced count as what is forced;
    - the layer's own scale and soft-capping enter every score; the published code assumes 1 / sqrt(D);
    - K is not repeated for grouped heads, and nothing loops over heads.
    The last queries steer all rows: not prefix-safe, not chunked. Layers with a sliding window, and
    prompts within either budget, are left dense: with the published 6,096 diagonals little is saved below twice that.

    Attributes:
        vertical_tokens: keys each head keeps, the forced ones among them.
        slash_tokens: distances each head keeps, the forced ones among them.
        sink_tokens: first keys, always kept.
        recent_tokens: shortest distances, always kept; 1 = a row's own key only.
        probe_rows: last queries that are looked at.
        block: tile size of queries and keys: 32, 64 or 128.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="vertical lines and slashes with fixed budgets, steered by the last 64 queries; sparse above 6,096 tokens only",
    )
    vertical_tokens: int = 1000
    slash_tokens: int = 6096
    sink_tokens: int = 30
    recent_tokens: int = 100
    probe_rows: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        for name, least in (
            ("vertical_tokens", 0), ("slash_tokens", 1), ("sink_tokens", 0), ("recent_tokens", 1), ("probe_rows", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InvalidRequest(f"minference: {name} must be {least} or more, got {getattr(self, name)}")
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"minference: block must be 32, 64 or 128, got {self.block}; 64 is the published size")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head: tiles of the kept distances, and the kept keys outside them. See the class.

        Cost: O(Hq probe_rows M D) for the probe, O(Hq M log M) for the budgets, O(Hq nQ (nK + vertical_tokens)) for the lists.
        Holds at most about 1 GiB of probe scores at once. Mutates nothing.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        n_vertical, n_slash = max(self.vertical_tokens, self.sink_tokens), max(self.slash_tokens, self.recent_tokens)
        if m <= max(n_vertical, n_slash) or layer.window:
            return None
        vertical, slash = recent_mass(q[:, :, -min(self.probe_rows, n) :], k, layer)
        vertical[..., : self.sink_tokens] = torch.inf
        slash[..., : self.recent_tokens] = torch.inf
        columns = vertical.sort(dim=-1, descending=True, stable=True).indices[..., :n_vertical].sort(dim=-1).values
        mask = tiles_of_distances(keep_top(slash, n_slash), n, b)
        lists = TileLists.from_ids(columns.unsqueeze(2).expand(-1, -1, mask.shape[2], -1))  # from_mask drops those in tiles
        return TilePlan.from_mask(
            mask, n_rows=n, n_keys=m, block_q=b, block_k=b, token_columns=lists, mean_correction=self.correction
        )


def tiles_of_distances(keep: Tensor, n: int, block: int) -> Tensor:
    """[B, Hq, nQ, nK] bool: tiles that hold, for some row of a whole query tile, a key at one of the kept distances.

    Tiles after the one of the first row's own key are left out; they are on the diagonal, and so in every plan.

    Args:
        keep: [B, Hq, M] bool, by distance p - j. n: query rows; the last of them is at position M - 1.
    """
    m = keep.shape[-1]
    below = torch.nn.functional.pad(keep.cumsum(-1, dtype=torch.int32), (1, 0))  # kept distances smaller than each
    into = (m - n) % block  # of a query tile's first row, in its own key tile
    start = torch.arange(-(-m // block), device=keep.device) * block + into  # from the first row to a tile's first key
    low, high = ((start + edge).clamp(0, m) for edge in (1 - block, block))
    on_diagonal = below[..., high] > below[..., low]  # [B, Hq, nK], by tiles back from the own one
    own = torch.arange(0, n, block, device=keep.device)[:, None] // block + (m - n) // block
    back = own - torch.arange(start.numel(), device=keep.device)
    return on_diagonal[..., back.clamp(min=0)] & (back >= 0)
