"""ProxyAttn: heads are averaged into a few proxies that rank the tiles; each head only says how many of them it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.scoring import SLAB_BYTES, logits_of, pool_max, pool_sum, recent_mass, score_kernels, slabs

if TYPE_CHECKING:
    from winnow.workers.attention.backend import RawQK
    from winnow.workers.model.loader import LoadedModel


@prefill_methods.register("proxyattn")
@dataclass(frozen=True)
class ProxyAttn(TileListMethod):
    """Tiles ranked by the strided attention of averaged heads, as many per head as hold `gamma` of its last rows' mass.

    Source: "ProxyAttn: Guided Sparse Attention via Representative Heads" (arXiv 2509.24745, ICLR 2026), sections 3.1 to 3.3.
    The published code was not at hand. What the paper leaves open is an option: `row_scaled`, `keep_first`, `block`.
    Deviations:
    - runs for M > N and any length; a strided row sees the strided keys up to its own position;
    - tiles are ranked by the logarithm of the largest weight in them: the same order, without the ties of underflow;
    - the mass of the last rows is summed per tile instead of averaged and normalised: equal but for a ragged last tile;
    - the last `block` rows give the budget, not the rows of a shorter last tile;
    - `groups` may also cut a KV head's query heads apart, up to one proxy per query head;
    - the layer's own scale and soft-capping enter every score.
    Heads of one proxy whose queries point away from each other cancel out: more groups help. A match narrower than `stride`
    keys may fall between the keys that are looked at. Layers with a sliding window, and prompts within
    `min_budget`, are left dense.

    Attributes:
        gamma: attention mass of the last rows that a head's tiles hold, 0 < gamma; 1 or more covers everything.
        groups: proxies: 1, a divisor of the KV heads, or a multiple of them that divides the query heads.
        stride: of every `stride` tokens the first stands for all; divides block.
        min_budget: fewest tokens of tiles a row gets.
        block: tile size of queries and keys: 32, 64 or 128.
        row_scaled: a head's share is of the tiles a row may read; false = of those the last row may read.
        keep_first: every row also reads the first tile.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        fallback="dense",
        notes="tiles ranked by averaged heads; budgets per head from the last block of queries",
    )
    gamma: float = 0.95
    groups: int = 1
    stride: int = 4
    min_budget: int = 2048
    block: int = 128
    row_scaled: bool = True
    keep_first: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma < float("inf"):
            raise InvalidRequest(f"proxyattn: gamma must be above 0, got {self.gamma}; 0.95 is the published default")
        if self.groups < 1:
            raise InvalidRequest(f"proxyattn: groups must be 1 or more, got {self.groups}; 1 merges all heads")
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"proxyattn: block must be 32, 64 or 128, got {self.block}")
        if self.stride < 1 or self.block % self.stride:
            raise InvalidRequest(
                f"proxyattn: stride must divide block {self.block}, got {self.stride}; 4 is the published default"
            )
        if self.min_budget < 1:
            raise InvalidRequest(f"proxyattn: min_budget must be 1 token or more, got {self.min_budget}")

    def bind(self, model: LoadedModel) -> ProxyAttn:
        """Itself.

        Raises:
            Unsupported: the model's heads cannot be cut into `groups`.
        """
        self._check_heads(model.spec.n_q_heads, model.spec.n_kv_heads)
        return self

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head: the best tiles of its proxy's ranking, as many as its budget says. See the class.

        Cost: O(G N M D / stride^2) for the proxies, O(Hq block M D) for the budgets, O(G nQ nK log nK) for the ranking.

        Raises:
            Unsupported: as `bind`.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        hq = q.shape[1]
        self._check_heads(hq, k.shape[1])
        if m <= max(b, self.min_budget) or layer.window:
            return None
        scores = self._proxy_scores(q, k, layer)  # [B, G, nQ, nK]
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=q.device).expand_as(order))
        mask = rank.repeat_interleave(hq // self.groups, 1) < self._budgets(q, k, layer).unsqueeze(-1)
        if self.keep_first:
            mask[..., 0] = True
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=b, block_k=b, mean_correction=self.correction)

    def _check_heads(self, hq: int, hkv: int) -> None:
        if hkv % self.groups and (self.groups % hkv or hq % self.groups):
            able = [g for g in range(1, hq + 1) if hkv % g == 0 or (g % hkv == 0 and hq % g == 0)]
            raise Unsupported(
                f"proxyattn: {hq} query heads over {hkv} KV heads cannot be cut into groups={self.groups}; use one of {able}"
            )

    def _proxy_scores(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """[B, G, nQ, nK] float32: logarithm of the largest weight a proxy gives in a tile; -inf = forbidden."""
        batch, _, n, _ = q.shape
        hkv, m = k.shape[1], k.shape[2]
        g, stride, cell = self.groups, self.stride, self.block // self.stride
        rows = q[:, :, ::stride].unflatten(1, (g, -1)).mean(2, dtype=torch.float32)  # [B, G, N / stride, D]
        keys = k[:, :, ::stride]
        keys = (
            keys.unflatten(1, (g, -1)).mean(2, dtype=torch.float32) if g <= hkv else keys.float().repeat_interleave(g // hkv, 1)
        )
        row_at = torch.arange(0, n, stride, device=q.device) + (m - n)
        key_at = torch.arange(0, m, stride, device=q.device)
        fast = score_kernels(q, layer)
        if fast is not None:
            seen, parts = row_at // stride + 1, []
            width = max(1, SLAB_BYTES // (8 * batch * rows.shape[2] * -(-m // self.block)))
            for first in range(0, g, width):
                own = (x[:, first : first + width].to(q.dtype) for x in (rows, keys))
                lse, top = fast.tile_lse(*own, seen, scale=layer.scale, block=cell, top=True)
                parts.append(pool_max((top - lse.logsumexp(-1, keepdim=True)).transpose(-1, -2), cell).transpose(-1, -2))
            return torch.cat(parts, 1)
        out = torch.full((batch, g, -(-n // self.block), -(-m // self.block)), -torch.inf, device=q.device)
        for heads, first, stop in slabs(g, rows.shape[2], keys.shape[2], cell, 8 * batch):
            seen = -(-((stop - 1) * stride + m - n + 1) // stride)  # strided keys up to the last of these rows
            logits = logits_of(rows[:, heads, first:stop], keys[:, heads, :seen], layer)
            logits.masked_fill_(key_at[:seen] > row_at[first:stop, None], -torch.inf)
            lse = logits.logsumexp(-1, keepdim=True)
            best = pool_max(pool_max(logits, cell).sub_(lse).transpose(-1, -2), cell).transpose(-1, -2)
            tile = first // cell
            out[:, heads, tile : tile + best.shape[2], : best.shape[3]] = best
        return out

    def _budgets(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """[B, Hq, nQ] int64: tiles each query tile of each head keeps."""
        n, m, b = q.shape[2], k.shape[2], self.block
        mass = pool_sum(recent_mass(q[:, :, -min(b, n) :], k, layer)[0], b)  # [B, Hq, nK]
        n_k = mass.shape[-1]
        if self.gamma >= 1.0:  # sums round to just above or below 1
            share = torch.full(mass.shape[:2], n_k, device=q.device)
        else:
            ordered = mass.sort(dim=-1, descending=True).values
            share = (ordered.cumsum(-1) - ordered < self.gamma * ordered.sum(-1, keepdim=True)).sum(-1)
        tiles = torch.full((-(-n // b),), n_k, device=q.device)
        if self.row_scaled:
            tiles = (torch.clamp(torch.arange(b, n + b, b, device=q.device), max=n) - 1 + m - n) // b + 1
        wanted = (share.unsqueeze(-1) * tiles + n_k - 1) // n_k  # whole numbers: a share of all tiles is all of them
        return wanted.clamp(min=math.ceil(self.min_budget / b))
