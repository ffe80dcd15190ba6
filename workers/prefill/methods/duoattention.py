"""DuoAttention: some heads read everything, the others the first tokens and the last ones."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.errors import CorruptBlock, InvalidRequest, Unsupported
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.model.spec import ModelSpec
from winnow.workers.prefill import calibration
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.calibration import Calibration

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

_TILE = 64  # granularity of the published chunk rule here, and of the executor's lists


@dataclass(frozen=True, eq=False)
class HeadClasses:
    """Which KV heads of a model stream, fixed once for all prompts.

    Attributes:
        streaming: [L, Hkv] bool on the model's device.
        counts: streaming KV heads of each layer, on the host.
        digest: of the calibration they come from.
    """

    streaming: Tensor
    counts: tuple[int, ...]
    digest: str = ""

    @classmethod
    def of(cls, streaming: Tensor, digest: str = "", device: torch.device | str = "cpu") -> HeadClasses:
        """From [L, Hkv] bool on the CPU."""
        return cls(streaming.to(device), tuple(streaming.sum(1).tolist()), digest)


@prefill_methods.register("duoattention")
@dataclass(frozen=True)
class DuoAttention(PrefillMethod):
    """Retrieval heads are dense; streaming heads read `sink` first tokens and the `recent` last, exact to the token.

    Which KV heads stream is fixed for the model: those with the lowest scores that `winnow calibrate duoattention` learnt. A
    streaming KV head takes its whole group of query heads along. Row i reads key j of a streaming head iff
    j < sink or i - j < recent, however the prompt is cut into chunks.

    Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (arXiv 2410.10819, ICLR
    2025) and the published code's defaults. Deviations:
    - the rule above holds for every row; the published prefill lets a streaming head read its whole chunk and the `recent`
      tokens before it, which makes the first chunk, and so most prompts, dense. `chunk` gives that rule, for comparison;
    - exactly round(sparsity x heads) heads stream, equal scores in the order of layer and head; the published threshold is a
      quantile after noise of 1e-6;
    - heads of layers with a sliding window are neither counted nor changed, unless every layer has one;
    - heads are not reordered: the executor takes a class per head.
    Prompts of up to sink + recent tokens, and layers with a sliding window, are dense.

    Attributes:
        sparsity: share of all KV heads that stream, in [0, 1]. Published: 0.5 for grouped heads, 0.75 for one KV head per
            query head.
        sink, recent: tokens a streaming head reads; sink >= 0, recent >= 1.
        chunk: 0 = the rule above; more = the published rule for chunks of this many tokens: position p of the chunk that
            begins at c reads j < sink and j >= c - recent. sink, recent and chunk are then whole tiles of 64.
    """

    caps = Capabilities(
        fallback="dense",
        training="calibration",
        notes="per KV head: dense, or sink and recent tokens",
    )
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256
    chunk: int = 0
    classes: HeadClasses | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise InvalidRequest(
                f"duoattention: sparsity must be in [0, 1], got {self.sparsity}; 0.5 lets half of the heads stream"
            )
        if self.sink < 0 or self.recent < 1:
            raise InvalidRequest(
                f"duoattention: needs sink >= 0 and recent >= 1 tokens, got {self.sink} and {self.recent}; 64 and 256 are usual"
            )
        if self.chunk < 0 or (self.chunk and (self.chunk % _TILE or self.sink % _TILE or self.recent % _TILE)):
            raise InvalidRequest(
                f"duoattention: chunk must be 0 or, with sink and recent, a multiple of {_TILE} tokens, "
                f"got chunk {self.chunk}, sink {self.sink}, recent {self.recent}"
            )

    def bind(self, model: LoadedModel) -> DuoAttention:
        """See `PrefillMethod.bind`. At sparsity 0 no head streams and nothing is loaded.

        Raises:
            Unsupported: not calibrated for this model. CorruptBlock: the file is damaged or does not fit the model.
        """
        if self.sparsity == 0.0:
            return self.with_classes(HeadClasses.of(torch.zeros(model.spec.n_layers, model.spec.n_kv_heads, dtype=torch.bool)))
        found = calibration.load(self.name, model.fingerprint)
        return self.with_classes(_classes(found, model.spec, self.sparsity, model.decoder.device))

    def with_classes(self, classes: HeadClasses) -> DuoAttention:
        """A copy whose heads have these classes."""
        bound = copy.copy(self)
        object.__setattr__(bound, "classes", classes)
        return bound

    @property
    def calibration_id(self) -> str:
        """See `PrefillMethod.calibration_id`."""
        return self.classes.digest if self.classes is not None else ""

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """The layer's head classes as a plan; looks at shapes only. Mutates nothing.

        Raises:
            Unsupported: no head classes are bound. InvalidRequest: k does not have the heads they are for.
        """
        if self.classes is None:
            raise Unsupported("duoattention: no head classes are bound; let the engine bind it to a model, or give sparsity=0")
        batch, hkv, n, m = q.shape[0], k.shape[1], q.shape[2], k.shape[2]
        if self.classes.streaming.shape[1] != hkv:
            raise InvalidRequest(
                f"duoattention: its head classes are for {self.classes.streaming.shape[1]} KV heads, got {hkv}; "
                "use the model they were found for"
            )
        count = self.classes.counts[layer.idx]
        if count == 0 or m <= self.sink + self.recent or layer.window:
            return None
        streaming = self.classes.streaming[layer.idx]
        if self.chunk:
            return self._chunk_plan(streaming, batch, n, m)
        if count == hkv:
            return TilePlan.streaming(
                batch=batch,
                mask_heads=hkv,
                n_rows=n,
                n_keys=m,
                sink=self.sink,
                recent=self.recent,
                block_k=_TILE,
                device=q.device,
            )
        class_ = torch.where(streaming, int(HeadClass.STREAMING), int(HeadClass.DENSE)).to(torch.int8).expand(batch, hkv)
        tokens = torch.ones(batch, hkv, dtype=torch.int32, device=q.device)
        none = TileLists.empty(batch * hkv * -(-n // 128), q.device)
        kinds = frozenset({HeadClass.STREAMING, HeadClass.DENSE})
        return TilePlan(n, m, 128, _TILE, class_, none, none, tokens * self.sink, tokens * self.recent, kinds)

    def _chunk_plan(self, streaming: Tensor, batch: int, n: int, m: int) -> TilePlan | None:
        """The published rule in whole tiles. A tile of rows across two chunks reads what its first row's chunk does."""
        if m <= self.chunk:
            return None
        position = torch.arange(0, n, _TILE, device=streaming.device)[:, None] + (m - n)
        key = torch.arange(0, m, _TILE, device=streaming.device)
        read = (key < self.sink) | (key >= position // self.chunk * self.chunk - self.recent)
        mask = (read | ~streaming[:, None, None]).expand(batch, -1, -1, -1)
        return TilePlan.from_mask(mask, n_rows=n, n_keys=m, block_q=_TILE, block_k=_TILE)


def streaming_heads(scores: Tensor, sparsity: float, spec: ModelSpec) -> Tensor:
    """[L, Hkv] bool: the round(sparsity x heads) KV heads with the lowest scores [L, Hkv], equal ones in order.

    Heads of layers with a sliding window are left out unless there are no others.
    """
    counted = counted_layers(spec)[:, None].expand(scores.shape)
    order = scores.float().masked_fill(~counted, torch.inf).flatten().argsort(stable=True)
    streaming = torch.zeros(scores.numel(), dtype=torch.bool)
    streaming[order[: round(sparsity * int(counted.sum()))]] = True
    return streaming.view(scores.shape)


def counted_layers(spec: ModelSpec) -> Tensor:
    """[L] bool: layers whose heads may be given classes."""
    full = torch.tensor([layer.window == 0 for layer in spec.layers])
    return full if bool(full.any()) else torch.ones_like(full)


@functools.lru_cache(maxsize=16)
def _classes(found: Calibration, spec: ModelSpec, sparsity: float, device: torch.device) -> HeadClasses:
    scores = found.tensors.get("scores")
    if scores is None or tuple(scores.shape) != (spec.n_layers, spec.n_kv_heads) or not bool(scores.isfinite().all()):
        raise CorruptBlock(
            "duoattention: its calibration file holds head scores that do not fit this model; run `winnow calibrate duoattention`"
        )
    return HeadClasses.of(streaming_heads(scores, sparsity, spec), found.digest, device)
