"""The prefill plug-in point: a method looks at q and k of one layer and decides which key tiles each query tile reads."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from winnow.index.key_tiles import KeyTiles
from winnow.registry import Capabilities, Registry, modules_in
from winnow.types import MethodChoice
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.scoring import pool_mean

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel


class PrefillMethod(ABC):
    """Decides a `TilePlan`; the shared executor runs it. Subclasses are frozen dataclasses whose fields are parameters."""

    name: ClassVar[str] = ""
    caps: ClassVar[Capabilities]
    _state: ClassVar[KeyTiles | None] = None  # an instance's own after `for_prompt`

    def bind(self, model: LoadedModel) -> PrefillMethod:
        """The method ready for `model`; the engine calls it once per request, before any `plan`.

        A method that needs nothing of the model, the default, returns itself. One that was calibrated or trained for a model
        returns a copy that holds what `calibration.load` finds for it. Mutates nothing.

        Raises:
            Unsupported: not calibrated for this model, or the model's shape does not fit.
        """
        return self

    @property
    def spec(self) -> str:
        """As it is written on a command line: the name, and after a colon the parameters that are not at their defaults."""
        changed = {}
        for f in dataclasses.fields(self) if dataclasses.is_dataclass(self) else ():
            value = getattr(self, f.name)
            if f.init and value != f.default:
                changed[f.name] = str(value).lower() if isinstance(value, bool) else str(value)
        return MethodChoice(self.name, changed).spec

    @property
    def calibration_id(self) -> str:
        """Digest of what `bind` loaded, "" for nothing: KV made under another calibration is never reused."""
        return ""

    def for_prompt(self, known: KeyTiles | None = None) -> Self:
        """The method ready for one prompt: a copy with a state, for as long as the prompt's prefill lasts.

        What it plans is the same with and without a state; see `of_key_tiles`.

        Args:
            known: the state, of the segment that the prompt's keys are written to; None = a new one.
        """
        own = copy.copy(self)
        object.__setattr__(own, "_state", KeyTiles() if known is None else known)
        return own

    def of_key_tiles(self, name: Hashable, k: Tensor, tile: int, compute: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`compute(k, 0)`, of which the state, where there is one, knows the tiles of earlier chunks. For use by `plan`.

        Args: as `KeyTiles.extended`.
        """
        return compute(k, 0) if self._state is None else self._state.extended(name, k, tile, compute)

    def pooled_keys(self, k: Tensor, size: int, layer: LayerSpec) -> Tensor:
        """`scoring.pool_mean(k, size)`, through the state."""
        return self.of_key_tiles(("mean", layer.idx), k, size, lambda keys, _: pool_mean(keys, size))

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        """Choose what is read. Called for every layer of a pass; q and k are views of what is computed and cached: not to be
        written. On an accelerator it must not wait for the device.

        Args:
            q: [B, Hq, N, D] post-RoPE, float32, float16 or bfloat16.
            k: [B, Hkv, M, D] post-RoPE, q's dtype and device, M >= N; query row i may read key j iff j <= i + (M - N).
            layer: attention parameters (scale, softcap, window).
            raw: pre-RoPE q and k of the N rows, as `q` and `k`, where the caller has them.

        Returns:
            The plan, on q's device, or None for dense attention, as always where `layer.window` is set: dense attention reads the
            window alone there. A plan never lists a tile that causality forbids entirely.

        Raises:
            InvalidRequest: q and k do not fit each other or what the method learnt for its model.
            Unsupported: what the method needs and this model or caller lacks; the message says the way out.
            ContextTooLong: more keys than it was trained for.
        """


@dataclass(frozen=True)
class TileListMethod(PrefillMethod):
    """A method whose heads read listed tiles. Whatever chose them, what they leave out can be estimated.

    Attributes:
        correction: tiles left out join the softmax as their mean key with their mean value (`TilePlan.mean_correction`): 1 / Bk
            of dense attention more work, an output nearer to dense where much is left out. Its share of the attention mass is
            part of an estimate then, and not reported.
    """

    correction: bool = field(default=False, kw_only=True)


prefill_methods: Registry[PrefillMethod] = Registry(
    kind="prefill method",
    entry_points="winnow.prefill_methods",
    modules=modules_in("winnow.workers.prefill.methods"),
)
