"""SALE: every query-key pair is scored with 4-bit operands against the exact softmax of sink and local window."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.plan import HeadClass, TilePlan
from winnow.workers.prefill import calibration, scoring
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.scoring import code_kernels, forbidden_tiles, logits_of, on_device, slabs

if TYPE_CHECKING:
    from winnow.workers.attention.backend import RawQK
    from winnow.workers.model.loader import LoadedModel

BLOCK_Q, BLOCK_K = 64, 32
DENSE_TAU = 1e-5  # a threshold below it marks a head that reads everything
_TINY = 1e-12  # least size that is coded; products of two smaller units would leave float32
_FLOAT16_BITS = 5  # sums of 256 products of larger codes may leave float16


@prefill_methods.register("sale")
@dataclass(frozen=True)
class SALE(TileListMethod):
    """Keep a tile iff one of its pairs is larger than `tau` of what its row gives to sink and local window together.

        kept(I, J)  iff  max over i in I, j in J of  s~_ij - lse_i  >  ln tau

    s~ is the logit from 4-bit operands, lse_i the exact log-sum-exp of row i over the sink and its local window, which are
    read anyway. Nothing is pooled before the comparison: a tile that hides one strong key is found.

    Source: "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling" (arXiv 2505.24179),
    sections 3.1 to 3.3; which keys share a scale is read off the layout of its matrix instruction. Deviations:
    - smoothing that a later token cannot change: keys are shifted by the mean of the first `dense_below` keys, not of all
      keys, and queries by the mean of their own tile, not of all queries; both shifts are given back exactly, so they only
      steer rounding. With that, plans are prefix-safe;
    - rows before `dense_below` are dense in every prompt; published: prompts up to that length;
    - the two-pass form only: lse_i is not tightened while tiles are added;
    - keys are coded anew for each chunk, which reads them once: kept with the KV their codes would take a quarter more memory;
    - codes are multiplied as 8-bit numbers on CUDA (`kernels.code_scores`: Hopper has no 4-bit product), in float16, or from six
      bits on float32, where that kernel has no words for the layer, in float32 on a CPU;
    - runs for M > N and any length; the layer's own scale and soft-capping enter every score.
    Layers with a sliding window are left dense.

    Attributes:
        tau: threshold of every head; 0 = dense; -1 = each head's own, from `winnow calibrate sale`.
        bits: of the codes, 2 to 8; 0 = exact scores, to see what the codes cost.
        token_scales: a scale per token; false = one for the 8 keys, or 2 queries, that a thread of the instruction holds.
        sink: first keys, a multiple of 32, read by every row.
        local: fewest keys before a query tile that all its rows read, extended down to a multiple of segment.
        segment: a multiple of 32 keys.
        dense_below: rows at positions before it read everything; 32 or more.
    """

    caps = Capabilities(
        chunked=True,
        prefix_safe=True,
        fallback="dense",
        training="calibration",
        notes="4-bit scores of all pairs against a threshold per head, or one for all with tau and no calibration",
    )
    tau: float = -1.0
    bits: int = 4
    token_scales: bool = False
    sink: int = 32
    local: int = 128
    segment: int = 128
    dense_below: int = 1024
    _calibrated: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [L, Hq] float32, on the CPU
    _digest: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tau != -1.0 and not 0.0 <= self.tau < float("inf"):
            raise InvalidRequest(f"sale: tau must be 0 or more, or -1 for the calibrated thresholds, got {self.tau}")
        if self.bits != 0 and not 2 <= self.bits <= 8:
            raise InvalidRequest(f"sale: bits must be 2 to 8, or 0 for exact scores, got {self.bits}; 4 is the published default")
        if self.sink < 0 or self.sink % BLOCK_K:
            raise InvalidRequest(f"sale: sink must be a multiple of {BLOCK_K}, got {self.sink}")
        if self.local < 1:
            raise InvalidRequest(f"sale: local must be 1 token or more, got {self.local}; 128 is the published default")
        if self.segment < BLOCK_K or self.segment % BLOCK_K:
            raise InvalidRequest(f"sale: segment must be a multiple of {BLOCK_K} above 0, got {self.segment}")
        if self.dense_below < BLOCK_K:
            raise InvalidRequest(f"sale: dense_below must be {BLOCK_K} tokens or more, got {self.dense_below}")

    def bind(self, model: LoadedModel) -> SALE:
        """With tau = -1 a copy that holds the model's thresholds, else itself.

        Raises:
            Unsupported: tau = -1 and not calibrated for this model. CorruptBlock: its file is damaged.
        """
        if self.tau >= 0:
            return self
        try:
            found = calibration.load(self.name, model.fingerprint)
        except Unsupported as error:
            raise Unsupported(f"{error}, or give a threshold for all heads, e.g. {self.name}:tau=0.004") from None
        tau = found.tensors.get("tau")
        if tau is None or tau.shape != (model.spec.n_layers, model.spec.n_q_heads):
            raise CorruptBlock(
                f"sale: its calibration has no threshold per layer and head; run `winnow calibrate {self.name}` again"
            )
        return self.with_thresholds(tau, found.digest)

    def with_thresholds(self, tau: Tensor, digest: str = "") -> SALE:
        """A copy that uses tau [L, Hq] in place of calibrated thresholds. Values below 1e-5 mark dense heads."""
        copy = dataclasses.replace(self, tau=-1.0)
        object.__setattr__(copy, "_calibrated", tau.detach().float().cpu())
        object.__setattr__(copy, "_digest", digest)
        return copy

    @property
    def calibration_id(self) -> str:
        return self._digest

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head: sink, local window and every 64x32 tile with a pair above the head's threshold. See the class.

        Cost: O(Hq N M D) low-bit and O(Hq N (sink + local + segment) D) exact products.

        Raises:
            Unsupported: tau = -1 without `bind`.
        """
        n, m = q.shape[2], k.shape[2]
        if m <= max(self.dense_below, self.local + self.sink) or layer.window:
            return None
        tau = self._thresholds(layer, q.shape[1])
        if bool((tau < DENSE_TAU).all()):
            return None
        limit = tau.log().masked_fill(tau < DENSE_TAU, torch.inf)  # nobody looks at what dense heads would keep
        limit = on_device(limit, q.device)
        mask = self.forced_tiles(n, m, q.device).repeat(q.shape[0], q.shape[1], 1, 1)
        if not self._fused(q, k, layer, mask, limit):
            for heads, tile, scores in self._slabs(q, k, layer):
                part = mask[:, heads, tile : tile + scores.shape[2], : scores.shape[3]]
                part |= scores > limit[heads, None, None]
        return dataclasses.replace(self.plan_of(mask, tau, n, m), mean_correction=self.correction)

    def tile_scores(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
        """[B, Hq, nQ, nK] float32: ln of a tile's largest relative score, what `tau` is compared with; inf where always kept."""
        n, m = q.shape[2], k.shape[2]
        forced = self.forced_tiles(n, m, q.device)
        out = torch.full((*q.shape[:2], *forced.shape), -torch.inf, device=q.device)
        if not self._fused(q, k, layer, out, None):
            for heads, tile, scores in self._slabs(q, k, layer):
                out[:, heads, tile : tile + scores.shape[2], : scores.shape[3]] = scores
        out.masked_fill_(forbidden_tiles(n, m, BLOCK_Q, BLOCK_K, q.device), -torch.inf)
        return out.masked_fill_(forced, torch.inf)

    @staticmethod
    def plan_of(mask: Tensor, tau: Tensor, n: int, m: int) -> TilePlan:
        """The plan of mask [B, Hq, nQ, nK] with the heads dense whose tau [Hq], on the CPU, says so."""
        class_ = None
        if bool((tau < DENSE_TAU).any()):
            class_ = torch.where(tau < DENSE_TAU, int(HeadClass.DENSE), int(HeadClass.CSR)).expand(mask.shape[0], -1)
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=BLOCK_Q, block_k=BLOCK_K, head_class=class_)

    def forced_tiles(self, n: int, m: int, device: torch.device) -> Tensor:
        """[nQ, nK] bool: what is read without looking: sink, local window, and all of rows before dense_below."""
        tile = torch.arange(-(-m // BLOCK_K), device=device) * BLOCK_K
        early = torch.arange(-(-n // BLOCK_Q), device=device) * BLOCK_Q + (m - n) < self.dense_below
        near = (tile < self.sink) | (tile >= self._local_start(n, m, device)[:, None]) | early[:, None]
        return near & ~forbidden_tiles(n, m, BLOCK_Q, BLOCK_K, device)

    def _thresholds(self, layer: LayerSpec, hq: int) -> Tensor:
        """[Hq] float32 on the CPU."""
        if self.tau >= 0:
            return torch.full((hq,), self.tau)
        if self._calibrated is None:
            raise Unsupported("sale: has no thresholds; give tau, or bind it to a model that it was calibrated for")
        tau = self._calibrated[layer.idx]
        assert tau.shape[0] == hq, f"{tau.shape[0]} thresholds for {hq} heads"
        return tau

    def _local_start(self, n: int, m: int, device: torch.device) -> Tensor:
        """[nQ] int64: first key of each query tile's local window."""
        first = torch.arange(-(-n // BLOCK_Q), device=device) * BLOCK_Q + (m - n)
        return (first + 1 - self.local).clamp(min=0) // self.segment * self.segment

    def _fused(self, q: Tensor, k: Tensor, layer: LayerSpec, out: Tensor, limits: Tensor | None) -> bool:
        """Whether kernels have written what `_slabs` yields: into out [B, Hq, nQ, nK] float32, or, with limits [Hq] on the
        device, true where a score exceeds its head's into out bool."""
        kernels = code_kernels(q, layer) if self.bits else None
        if kernels is None:
            return False
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        kernels.tile_maxima(
            q, k, self._shift(k), kernels.Known(self.sink, self.local, self.segment, self.dense_below), out, limits,
            scale=layer.scale, bits=self.bits, token_scales=self.token_scales, slab_bytes=scoring.SLAB_BYTES,
        )  # fmt: skip
        return True

    def _shift(self, k: Tensor) -> Tensor:
        """[B, Hkv, 1, D] float32: what is taken off every key before it is coded."""
        return k[:, :, : self.dense_below].mean(2, keepdim=True, dtype=torch.float32)

    def _slabs(self, q: Tensor, k: Tensor, layer: LayerSpec) -> Iterator[tuple[slice, int, Tensor]]:
        """Scores of the tiles before the local window, a part at a time.

        Yields:
            (query heads, first query tile, ln of the largest relative score [B, heads, tiles, key tiles] float32).
        """
        batch, hq, n, d = q.shape
        hkv, m = k.shape[1], k.shape[2]
        group, past = hq // hkv, m - n
        low = self._product_dtype(q.device)
        shift = self._shift(k)
        starts = self._local_start(n, m, q.device)
        for heads, first, stop in slabs(hkv, n, m, BLOCK_Q, 12 * batch * group):
            last_start = max(0, (past + (stop - 1) // BLOCK_Q * BLOCK_Q + 1 - self.local) // self.segment * self.segment)
            if last_start == 0 or past + stop <= self.dense_below:
                continue  # all of it is read anyway
            keys = k[:, heads]
            width, tiles = keys.shape[1], -(-(stop - first) // BLOCK_Q)
            rows = q[:, heads.start * group : heads.stop * group, first:stop].float()
            rows = torch.nn.functional.pad(rows, (0, 0, 0, first + tiles * BLOCK_Q - stop))
            rows = rows.view(batch, width, group, tiles, BLOCK_Q, d)
            is_row = torch.arange(first, first + tiles * BLOCK_Q, device=q.device).view(tiles, BLOCK_Q) < n
            known = self._known_lse(rows, keys, starts[first // BLOCK_Q : first // BLOCK_Q + tiles], first + past, layer)
            known = known.masked_fill(~is_row, torch.inf)  # rows past the end want nothing

            mean = rows.sum(-2, keepdim=True) / is_row.sum(-1)[:, None, None]
            centred_q = (rows - mean) * is_row[..., None]
            centred_k = keys[:, :, :last_start].float() - shift[:, heads]
            codes_q, unit_q = self._coded(centred_q, (2, 8), low)
            codes_k, unit_k = self._coded(centred_k[:, :, None], (4, 4, 2), low)
            unit = unit_q * unit_k * layer.scale  # [B, heads, g, 1, 1, 1]
            estimate = torch.matmul(codes_q.reshape(batch, width, -1, d), codes_k[:, :, 0].transpose(-1, -2))
            estimate = estimate.view(batch, width, group, tiles, BLOCK_Q, last_start).float()
            of_mean = torch.matmul(mean.reshape(batch, width, -1, d), centred_k.transpose(-1, -2)) * layer.scale
            of_mean = of_mean.view(batch, width, group, tiles, 1, last_start)
            of_shift = (rows * shift[:, heads, :, None, None]).sum(-1) * layer.scale  # [B, heads, g, tiles, Bq]
            if layer.softcap:
                logits = estimate * unit + of_mean + of_shift[..., None]
                over = torch.tanh(logits / layer.softcap) * layer.softcap - known[..., None]
                unit = torch.ones_like(unit)
            else:
                over = estimate.add_(of_mean / unit).sub_(((known - of_shift) / unit[..., 0])[..., None])
            best = over.unflatten(-1, (-1, BLOCK_K)).amax((-3, -1)) * unit[..., 0]  # [B, heads, g, tiles, key tiles]
            yield slice(heads.start * group, heads.stop * group), first // BLOCK_Q, best.flatten(1, 2)

    def _product_dtype(self, device: torch.device) -> torch.dtype:
        """Of codes and their sums. A CPU multiplies float16 very slowly."""
        return torch.float16 if device.type == "cuda" and self.bits <= _FLOAT16_BITS else torch.float32

    def _known_lse(self, rows: Tensor, k: Tensor, starts: Tensor, position: int, layer: LayerSpec) -> Tensor:
        """Exact log-sum-exp of rows over the sink and their local window.

        Args:
            rows: [B, h, g, tiles, Bq, D] float32. k: [B, h, M, D]. starts: [tiles], first key of each tile's window.
            position: of the first row.

        Returns:
            [B, h, g, tiles, Bq] float32.
        """
        batch, width, group, tiles, _, d = rows.shape
        m = k.shape[2]
        at = position + torch.arange(tiles * BLOCK_Q, device=k.device).view(tiles, BLOCK_Q, 1)
        window = starts[:, None] + torch.arange(min(m, self.local + self.segment + BLOCK_Q - 2), device=k.device)
        near = k[:, :, window.clamp(max=m - 1)]  # [B, h, tiles, W, D]
        by_tile = rows.transpose(2, 3).reshape(batch, width, tiles, group * BLOCK_Q, d)
        logits = logits_of(by_tile, near, layer).view(batch, width, tiles, group, BLOCK_Q, -1)
        logits = logits.masked_fill((window[:, None] > at)[:, None], -torch.inf)
        sink = logits_of(by_tile, k[:, :, None, : self.sink], layer).view(batch, width, tiles, group, BLOCK_Q, -1)
        sink_at = torch.arange(sink.shape[-1], device=k.device)
        sink = sink.masked_fill((sink_at >= starts[:, None])[:, None, None], -torch.inf)
        return torch.cat((sink, logits), -1).logsumexp(-1).transpose(2, 3)

    def _coded(self, x: Tensor, cell: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Symmetric codes times their scales, in units of a power of two that keeps them near the size of a code.

        Args:
            x: [B, h, g, ..., tokens, D] float32. cell: how tokens divide; those along its first and last axis, or its first of
                two, share a scale.

        Returns:
            values of x's shape in dtype, and the unit [B, h, g, 1, 1, 1] float32 that they are multiples of.
        """
        top = float(2 ** (max(self.bits, 2) - 1) - 1)
        peak = x.abs().amax(-1)
        if not self.token_scales:
            apart = peak.unflatten(-1, (-1, *cell))
            shared = apart.amax((-3, -1) if len(cell) == 3 else -2, keepdim=True)
            peak = shared.expand_as(apart).reshape(peak.shape)
        scale = peak.clamp(min=_TINY) / top
        values = x if self.bits == 0 else torch.round(x / scale.unsqueeze(-1)) * scale.unsqueeze(-1)
        unit = torch.exp2(torch.ceil(torch.log2(scale.flatten(3).amax(-1))))[..., None, None, None]
        unit = unit if self.bits else torch.ones_like(unit)
        return (values / unit.view(*unit.shape[:3], *[1] * (x.dim() - 3))).to(dtype if self.bits else torch.float32), unit
