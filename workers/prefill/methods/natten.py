"""Neighborhood attention as a prefill method: the causal 1-D form, a sliding window with dilation and stride."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.prefill.base import PrefillMethod, prefill_methods


@prefill_methods.register("neighborhood")
@dataclass(frozen=True)
class Neighborhood(PrefillMethod):
    """Read one's own class of positions modulo `dilation`, and of that class a causal window.

    With i % dilation = j % dilation, x = i // dilation, y = j // dilation, position i reads key j iff

        c - window < y <= x,   c = x - x % stride + stride - 1   (the last of the group of `stride` that share a window)

    so with stride 1 every row reads its `window` last keys, and with more the first rows of a group read fewer.

    Source: "Faster Neighborhood Attention" (arXiv 2403.04690, NeurIPS 2024) and its strided form (arXiv 2504.16922). Made for
    models trained with such a window. Deviations:
    - positions count from the first key of the whole sequence also when only its last N rows are computed (M > N);
    - a group cut short by the end of the sequence keeps the window it would have if it were whole. As published its window
      moves with the sequence's length, and a row's KV would depend on how much follows: chunks and cached prefixes would
      change the result. All other rows are as published;
    - window * dilation may exceed the sequence;
    - of the prompt only: decoding reads all cached keys, unless the model has the window itself.
    The non-causal form, where every row reads exactly `window` keys and windows at the borders move inward, reads keys after
    a row's own. A language model that writes from left to right must not, so it is not offered here; it is in
    `winnow.workers.attention.neighborhood`, for grids. Layers with a sliding window are left as they are.

    Attributes:
        window: keys of a row's class in its window, 2 or more.
        dilation: 1 or more. Above 1 keys are listed one by one, which costs an entry for each key read and runs slowly.
        stride: 1 to window.
    """

    caps = Capabilities(
        tensor_parallel=True,
        fallback="dense",
        training="model",
        notes="causal sliding window with dilation and stride, of the prompt; decoding reads all cached keys",
    )
    window: int = 4096
    dilation: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InvalidRequest(f"neighborhood: window must be 2 or more, got {self.window}")
        if self.dilation < 1:
            raise InvalidRequest(f"neighborhood: dilation must be 1 or more, got {self.dilation}; 1 = none")
        if not 1 <= self.stride <= self.window:
            raise InvalidRequest(f"neighborhood: stride must be 1 to the window of {self.window}, got {self.stride}")

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """The same keys for all sequences and heads, from N and M alone. See the class.

        Cost: O(N), with dilation O(N min(window, M / dilation)). Mutates nothing.
        """
        n, m, batch, device = q.shape[2], k.shape[2], q.shape[0], q.device
        if layer.window or (self.dilation == 1 and -(-m // self.stride) * self.stride <= self.window):
            return None
        if self.dilation == self.stride == 1:
            return TilePlan.streaming(batch=batch, mask_heads=1, n_rows=n, n_keys=m, sink=0, recent=self.window, device=device)
        # What is asked for beyond the sequence reads nothing more: it must not decide how much memory the lists take.
        dilation = min(self.dilation, m)
        longest = -(-m // dilation)  # keys of a class
        stride = min(self.stride, longest)
        window = min(self.window, -(-longest // stride) * stride)  # reaches back to the first key from every group
        position = torch.arange(m - n, m, device=device)
        x = position // dilation
        first = x - x % stride + stride - window  # of the window, in the row's class
        if self.dilation == 1:
            rows = torch.stack((first.clamp(min=0), position + 1), -1)
            return TilePlan.intervals(rows.expand(batch, 1, n, 2), n_keys=m)
        y = first[:, None] + torch.arange(window, device=device)  # [N, window]
        keys = y * dilation + (position % dilation)[:, None]
        others = TileLists.from_ids(keys.expand(batch, 1, -1, -1), ((y >= 0) & (y < x[:, None])).expand(batch, 1, -1, -1))
        own = TileLists.from_ids(position[:, None].expand(batch, 1, n, 1))
        head_class = torch.full((batch, 1), HeadClass.CSR, dtype=torch.int8, device=device)
        unused = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        return TilePlan(n, m, 1, 1, head_class, own, TileLists.empty(batch * n, device), unused, unused + 1, token_columns=others)
