"""SeerAttention: a small learnt gate per layer says which tiles matter."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.prefill import calibration, scoring
from winnow.workers.prefill.base import TileListMethod, prefill_methods
from winnow.workers.prefill.calibration import Calibration
from winnow.workers.prefill.pre_rope import PreRope
from winnow.workers.prefill.scoring import diagonal_tiles, forbidden_tiles, gate_kernels, keep_top, pool_mean
from winnow.workers.prefill.tile_truth import normalised, tile_probabilities

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

BLOCK = 64  # tokens of a tile; the gates are trained for it


@dataclass(frozen=True, eq=False)
class Gates:
    """The learnt maps of a model, G wide, on its device.

    Attributes:
        q: [L, Hq, D, G] float32, for pooled queries. k: [L, Hkv, 3 D, G] float32, for keys pooled by max, min and mean.
        frequencies: [L, G / 2] float32, rotary angle per token of each pair of a gate's dimensions.
        pre_rope: takes q and k back to what the gates were trained on.
        digest: of the calibration they come from.
    """

    q: Tensor
    k: Tensor
    frequencies: Tensor
    pre_rope: PreRope
    digest: str = ""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], spec: ModelSpec, dtype: torch.dtype, device: torch.device, digest: str = "") -> Gates:
        """From the tensors "q" and "k" of a calibration, any float dtype, for the model of `spec`.

        Raises:
            CorruptBlock: a tensor is missing, is not finite or does not fit the model.
        """
        q, k = tensors.get("q"), tensors.get("k")
        wanted_q, wanted_k = (spec.n_layers, spec.n_q_heads, spec.head_size), (spec.n_layers, spec.n_kv_heads, 3 * spec.head_size)
        fits = q is not None and k is not None and q.dim() == 4 and q.shape[:3] == wanted_q and k.shape == (*wanted_k, q.shape[3])
        if q is None or k is None or not fits or q.shape[3] < 2 or q.shape[3] % 2 or not calibration.are_numbers((q, k)):
            raise CorruptBlock(
                "seerattention: its calibration file holds gates that do not fit this model; run `winnow calibrate seerattention`"
            )
        frequencies = torch.stack([gate_frequencies(spec.ropes[i], q.shape[3]) for i in spec.layer_ropes])
        return cls(
            q.to(device, torch.float32), k.to(device, torch.float32), frequencies.to(device), PreRope(spec, dtype, device), digest
        )


@prefill_methods.register("seerattention")
@dataclass(frozen=True)
class SeerAttention(TileListMethod):
    """Tiles of 64 x 64 chosen by a gate that was trained, on the frozen model, to predict the tiles' attention.

        Qg = rope(mean(q) Wq),  Kg = rope([max(k), min(k), mean(k)] Wk),  S = Qg Kg^T / sqrt(G)

    q and k are taken before RoPE and pooled over a tile, maps are per head, and the pooled vectors are rotated as the first
    token of their tile. A row of tiles keeps those whose share in softmax(S) reaches `threshold`, or the largest ones up to
    the share `density` of the tiles it may read.

    Source: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (arXiv 2410.13276, NeurIPS 2025) and the
    published code's gate and constants. Deviations:
    - the diagonal tiles are always kept, and count first under `density`; a published row whose tiles all miss the threshold
      divides zero by zero;
    - `density` keeps that share of the tiles each row may read, so that a row's plan does not depend on what follows it; the
      published ratio gives every row the same number, which depends on the length of the prompt;
    - the gate may be narrower than the published 128; its pairs then turn with evenly picked frequencies of the model's, and
      at the head's width with exactly the model's;
    - q and k before RoPE are computed back from the rotated ones, which alone are there for earlier chunks;
    - runs for M > N and any length: means, maxima and minima of a ragged last tile are over its real tokens;
    - a share equal to the threshold is kept, so that 0 keeps every tile; the option to leave the last two rows of tiles dense
      is not offered: which rows are last is not known when a prompt comes in chunks;
    - of the prompt only: the later gate for decoding is not here, and decoding reads all cached keys.
    Layers with a sliding window are left dense.

    Attributes:
        threshold: least share of a tile in its row's softmax, 0 to 1. Published: 2e-3 (LongBench), 5e-4 (RULER, 4K to 128K),
            3e-2 (short). The share of one tile among equals falls with the length, so a threshold belongs to a length.
        density: share of the causal tiles to keep, in (0, 1]; 0 = go by the threshold.
        oracle: choose by the true largest probability of each tile, which costs what dense attention costs, instead of a gate:
            the most that any gate can reach, for evaluation. Needs no calibration.
    """

    caps = Capabilities(
        fallback="dense",
        training="calibration",
        notes="tiles of 64 by gates trained for the model; chunks must be whole tiles; decoding reads all cached keys",
    )
    threshold: float = 2e-3
    density: float = 0.0
    oracle: bool = False
    gates: Gates | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise InvalidRequest(
                f"seerattention: threshold must be in [0, 1], got {self.threshold}; 0.002 is the published default"
            )
        if not 0.0 <= self.density <= 1.0:
            raise InvalidRequest(
                f"seerattention: density must be in (0, 1], or 0 to go by the threshold, got {self.density}; 0.1 keeps a tenth"
            )

    def bind(self, model: LoadedModel) -> SeerAttention:
        """See `PrefillMethod.bind`. The oracle needs no gates.

        Raises:
            Unsupported: not calibrated for this model. CorruptBlock: the file is damaged or does not fit the model.
        """
        if self.oracle:
            return self
        found = calibration.load(self.name, model.fingerprint)
        return self.with_gates(_gates(found, model.spec, model.decoder.dtype, model.decoder.device))

    def with_gates(self, gates: Gates) -> SeerAttention:
        """A copy that chooses by these gates."""
        bound = copy.copy(self)
        object.__setattr__(bound, "gates", gates)
        return bound

    @property
    def calibration_id(self) -> str:
        """See `PrefillMethod.calibration_id`."""
        return self.gates.digest if self.gates is not None else ""

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Per query head and row of tiles: the diagonal, and the tiles its gate gives most. See the class.

        Cost: O(H M D) to undo RoPE and pool, O(H nQ nK G) for the gate. KV heads are done in slabs of about
        `scoring.SLAB_BYTES`. Mutates nothing.

        Raises:
            Unsupported: no gates are bound. InvalidRequest: q or k does not have the heads the gates were trained for.
        """
        n, m = q.shape[2], k.shape[2]
        if m <= BLOCK or layer.window:
            return None
        self._check(q, k)
        n_q, n_k = -(-n // BLOCK), -(-m // BLOCK)
        group = q.shape[1] // k.shape[1]
        forbidden, diagonal = (f(n, m, BLOCK, BLOCK, q.device) for f in (forbidden_tiles, diagonal_tiles))
        kernels = None if self.oracle else gate_kernels(q, n_k)
        pooling = 0 if kernels is not None else 16 * (m + group * n) * q.shape[3]
        held = q.shape[0] * (pooling + (8 if kernels is not None else 40) * group * n_q * n_k)  # bytes of one KV head's group
        step = max(1, scoring.SLAB_BYTES // held)
        masks = []
        for first in range(0, k.shape[1], step):
            heads = slice(first, min(first + step, k.shape[1]))
            rows = slice(heads.start * group, heads.stop * group)
            scores = self._scores(q[:, rows], k[:, heads], layer, rows, heads, kernels)
            if kernels is not None:
                counts = tile_counts(self.density, forbidden) if self.density > 0.0 else None
                masks.append(kernels.choose_tiles(scores, n=n, m=m, block=BLOCK, counts=counts, threshold=self.threshold))
            elif self.density > 0.0:
                masks.append(largest_tiles(scores, self.density, forbidden, diagonal))
            else:
                shares = torch.softmax(scores.masked_fill(forbidden, -torch.inf), -1)
                masks.append(((shares >= self.threshold) & ~forbidden) | diagonal)
        mask = masks[0] if len(masks) == 1 else torch.cat(masks, 1)
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=BLOCK, block_k=BLOCK, mean_correction=self.correction)

    def _check(self, q: Tensor, k: Tensor) -> None:
        if self.oracle:
            return
        if self.gates is None:
            raise Unsupported("seerattention: no gates are bound; let the engine bind it to a model, or give oracle=true")
        known = (self.gates.q.shape[1], self.gates.k.shape[1], self.gates.q.shape[2])
        if known != (q.shape[1], k.shape[1], q.shape[3]):
            raise InvalidRequest(
                f"seerattention: its gates are for {known[0]} query and {known[1]} KV heads of size {known[2]}, got "
                f"{q.shape[1]} and {k.shape[1]} of size {q.shape[3]}; use the model they were trained for"
            )

    def _scores(
        self, q: Tensor, k: Tensor, layer: LayerSpec, rows: slice, heads: slice, kernels: ModuleType | None = None
    ) -> Tensor:  # fmt: skip
        """[B, heads, nQ, nK] float32, the logarithm of each tile's share up to a constant of the row."""
        n, m = q.shape[2], k.shape[2]
        if self.oracle:
            return normalised(tile_probabilities(q, k, layer, BLOCK)[0]).log()
        assert self.gates is not None
        gates, idx = self.gates, layer.idx

        def pooled(x: Tensor, first: int, extremes: bool) -> Tensor:
            if kernels is not None:
                turned = gates.pre_rope.rows(idx, first, x.shape[2])
                x = x if x.stride(-1) == 1 else x.contiguous()
                return cast(Tensor, kernels.pool(x, *turned, BLOCK, extremes=extremes))
            return (pool_keys if extremes else pool_mean)(gates.pre_rope.undo(x, idx, first), BLOCK)

        pooled_q = pooled(q, m - n, False)
        pooled_k = self.of_key_tiles((idx, heads.start), k, BLOCK, lambda keys, at: pooled(keys, at, True))
        return gate_logits(
            pooled_q, pooled_k, gates.q[idx, rows], gates.k[idx, heads], gates.frequencies[idx], first_position=m - n
        )


def largest_tiles(scores: Tensor, density: float, forbidden: Tensor, diagonal: Tensor) -> Tensor:
    """The best tiles up to a share of those that each row may read, the diagonal ones first.

    Args:
        scores: [..., nQ, nK] float. density: in (0, 1]. forbidden, diagonal: [nQ, nK] bool, see `scoring`.

    Returns:
        [..., nQ, nK] bool; round(density x allowed tiles) in each row, at least the diagonal. Ties go to the lower index.
    """
    count = tile_counts(density, forbidden)
    return keep_top(scores.masked_fill(forbidden, -torch.inf).masked_fill(diagonal, torch.inf), count) | diagonal


def tile_counts(density: float, forbidden: Tensor) -> Tensor:
    """[nQ] int64: tiles that each row keeps of those not forbidden [nQ, nK]; at least one."""
    return torch.floor(density * (~forbidden).sum(-1) + 0.5).long().clamp(min=1)


def pool_keys(k: Tensor, size: int) -> Tensor:
    """[B, H, M, D] -> [B, H, ceil(M / size), 3 D] float32: max, min and mean over the real tokens of each tile."""
    wide = k.float()
    room = (0, 0, 0, -k.shape[2] % size)
    largest = torch.nn.functional.pad(wide, room, value=-torch.inf).unflatten(2, (-1, size)).amax(3)
    least = torch.nn.functional.pad(wide, room, value=torch.inf).unflatten(2, (-1, size)).amin(3)
    return torch.cat((largest, least, pool_mean(wide, size)), -1)


def gate_frequencies(rope: RopeSpec, width: int) -> Tensor:
    """[width / 2] float32: the model's rotary frequencies, or as many evenly picked from them."""
    of_model = torch.tensor(rope.inv_freq, dtype=torch.float32)
    return of_model[torch.arange(width // 2) * len(rope.inv_freq) // (width // 2)]


def gate_logits(
    pooled_q: Tensor, pooled_k: Tensor, q_map: Tensor, k_map: Tensor, frequencies: Tensor, *, first_position: int = 0
) -> Tensor:
    """What the gates say about every tile; differentiable. The caller masks what causality forbids.

    Args:
        pooled_q: [..., Hq, nQ, D] means. pooled_k: [..., Hkv, nK, 3 D], see `pool_keys`.
        q_map: [..., Hq, D, G]. k_map: [..., Hkv, 3 D, G]. Leading axes broadcast.
        frequencies: [..., G / 2], its leading axes those before the heads' axis.
        first_position: of the first query tile's first token; key tiles begin at 0.

    Returns:
        [..., Hq, nQ, nK] float32.
    """
    n_q, n_k, hkv, width = pooled_q.shape[-2], pooled_k.shape[-2], pooled_k.shape[-3], q_map.shape[-1]
    tile = torch.arange(max(n_q, n_k), device=pooled_q.device) * BLOCK
    # scaled before the product, which makes nQ nK numbers of nQ G
    q = _rotate(torch.matmul(pooled_q, q_map) / width**0.5, tile[:n_q] + first_position, frequencies)
    k = _rotate(torch.matmul(pooled_k, k_map), tile[:n_k], frequencies)
    logits = torch.matmul(q.unflatten(-3, (hkv, -1)).flatten(-3, -2), k.transpose(-1, -2))
    by_head: Tensor = logits.unflatten(-2, (-1, n_q)).flatten(-4, -3)
    return by_head


def _rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x [..., H, T, G] turned by positions [T] times frequencies [..., G / 2]."""
    angles = (positions[:, None] * frequencies[..., None, :]).unsqueeze(-3)  # [..., 1, T, G / 2]
    cos, sin = angles.cos(), angles.sin()
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


@functools.lru_cache(maxsize=4)
def _gates(found: Calibration, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Gates:
    """One copy on the device however many requests are bound."""
    return Gates.of(dict(found.tensors), spec, dtype, device, found.digest)
