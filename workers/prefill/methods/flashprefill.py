"""FlashPrefill: full-resolution queries against mean keys of tiles, and every tile near the best one is kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.scoring import pool_mean, quick_logits, score_kernels, slabs


@prefill_methods.register("flashprefill")
@dataclass(frozen=True)
class FlashPrefill(TileListMethod):
    """Per row of tiles, every tile whose energy is at least `alpha` of the best one's. Nothing is sorted or accumulated.

        E[I, J] = sum over rows i of I that see all of J of exp(scale q_i . kbar_J)

    Source: "FlashPrefill: Instantaneous Pattern Discovery and Thresholding for Ultra-Fast Long-Context Prefilling"
    (arXiv 2603.06199) and its published code; `per_kv_head`, `correction`, `dense_layers` and one alpha for all
    models from "FlashPrefill V2" (arXiv 2608.19758). Deviations:
    - energies are compared as logarithms, which is the same comparison without a maximum to subtract or an underflow;
    - runs for M > N and any length; rows beyond the end, which the published code counts with a score of 0, are left out;
    - `per_kv_head` takes query tiles of 64 positions at least (V2 packs 128 rows of a group, whatever its size): the executor
      has two heads of a group share what they read, at 64 rows each; keys are in tiles of `block` (V2 selects by 128 and lists
      them as two of 64);
    - the layer's own scale and soft-capping enter every score; the published code assumes 1 / sqrt(D).
    Layers with a sliding window, and prompts no longer than sink and window, are left dense.

    With `dense_tail` above 0, the default as published, the last rows of whatever is planned at once are dense: then the
    method is neither chunked nor prefix-safe. With 0 it is both, and its capabilities say so.

    Attributes:
        alpha: share of the best tile's energy that a tile needs, 0 to 1; 0 keeps everything.
        sink_tiles: first tiles, always kept.
        window_tiles: last tiles up to a row's own, always kept; 1 = its own only.
        dense_tail: last query tiles of the prompt that read everything.
        dense_layers: first layers of the model that stay dense.
        per_kv_head: the query heads of a group share one list, and query tiles have 64 positions, or `block` where that is less
            or the group has one head.
        block: tile size of keys, and of queries unless `per_kv_head`: 32, 64 or 128.
    """

    caps = Capabilities(
        chunked=False,
        prefix_safe=False,
        tensor_parallel=True,
        fallback="dense",
        notes="tiles near the best of each row by mean key; with dense_tail=0 also chunked and prefix-safe",
    )
    alpha: float = 0.1
    sink_tiles: int = 2
    window_tiles: int = 4
    dense_tail: int = 2
    dense_layers: int = 0
    per_kv_head: bool = False
    block: int = 128

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise InvalidRequest(f"flashprefill: alpha must be 0 (dense) to 1, got {self.alpha}; 0.1 is the published default")
        for name, least in (("sink_tiles", 0), ("window_tiles", 1), ("dense_tail", 0), ("dense_layers", 0)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"flashprefill: {name} must be {least} or more, got {getattr(self, name)}")
        if self.block not in (32, 64, 128):
            raise InvalidRequest(f"flashprefill: block must be 32, 64 or 128, got {self.block}")
        if self.dense_tail == 0:
            object.__setattr__(self, "caps", dataclasses.replace(self.caps, chunked=True, prefix_safe=True))

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head, or KV head, and row of tiles: sink, window, and tiles near the best. See the class.

        Cost: O(Hq N nK D) and nothing else of note. Holds at most about 1 GiB of scores at once. Mutates nothing.
        """
        n, m, b = q.shape[2], k.shape[2], self.block
        group = q.shape[1] // k.shape[1]
        block_q = min(b, 64) if self.per_kv_head and group > 1 else b
        n_q = -(-n // block_q)
        if layer.idx < self.dense_layers or layer.window:
            return None
        if m <= (self.sink_tiles + self.window_tiles) * b or n_q <= self.dense_tail:
            return None
        energy = self._log_energy(q, k, layer, block_q)
        best = energy.amax(-1, keepdim=True)
        mask = (energy > -torch.inf) & (energy >= best + (math.log(self.alpha) if self.alpha else -torch.inf))
        tile = torch.arange(energy.shape[-1], device=q.device)
        own = (torch.arange(n_q, device=q.device) * block_q + (m - n)) // b
        mask |= (tile < self.sink_tiles) | (tile > own[:, None] - self.window_tiles)  # what lies ahead is dropped by the plan
        if self.dense_tail:
            mask[..., -self.dense_tail :, :] = True
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=block_q, block_k=b, mean_correction=self.correction)

    def _log_energy(self, q: Tensor, k: Tensor, layer: LayerSpec, block_q: int) -> Tensor:
        """[B, Hq, nQ, nK] float32, or [B, Hkv, nQ, nK] if `per_kv_head`: log E, -inf where no row sees the whole tile."""
        batch, hq, n, d = q.shape
        hkv, m, b = k.shape[1], k.shape[2], self.block
        group, past = hq // hkv, m - n
        pooled = self.of_key_tiles(layer.idx, k, b, lambda keys, _: pool_mean(keys, b).to(keys.dtype))
        fast = score_kernels(q, layer)
        if fast is not None:
            found: Tensor = fast.pooled_energy(q, pooled, past=past, block=b, block_q=block_q, scale=layer.scale)
            return found.unflatten(1, (hkv, group)).logsumexp(2) if self.per_kv_head else found
        energy = torch.full((batch, hkv if self.per_kv_head else hq, -(-n // block_q), -(-m // b)), -torch.inf, device=q.device)
        for heads, first, end in slabs(hkv, n, m, block_q, 12.0 * batch * group / b):
            width = (end + past) // b  # tiles that the last row sees whole
            if width == 0:
                continue
            rows = q[:, heads.start * group : heads.stop * group, first:end].reshape(batch, -1, group * (end - first), d)
            logits = quick_logits(rows, pooled[:, heads, :width], layer).view(batch, -1, group, end - first, width)
            band = (first + past + 1) // b
            seen = (torch.arange(first, end, device=q.device) + (past + 1)) // b
            logits[..., band:].masked_fill_(torch.arange(band, width, device=q.device) >= seen[:, None], -torch.inf)
            logits = torch.nn.functional.pad(logits, (0, 0, 0, -(end - first) % block_q), value=-torch.inf)
            tiles = logits.float().unflatten(3, (-1, block_q))  # [B, heads, group, tiles, Bq, width]
            found = tiles.logsumexp((2, 4)) if self.per_kv_head else tiles.logsumexp(4).flatten(1, 2)
            at = heads if self.per_kv_head else slice(heads.start * group, heads.stop * group)
            energy[:, at, first // block_q : -(-end // block_q), :width] = found
        return energy
