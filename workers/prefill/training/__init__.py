"""What makes the calibrations: one module per method that needs one, each with a function `calibrate`.

    calibrate(model, *, on_progress=None, seed=0, **options) -> (tensors, made)

`tensors` and `made` are what `calibration.save` writes: learnt tensors by name, and how they came about (data, steps, loss
before and after) as text by name. `on_progress(done, total)` counts work. A long training writes its state under
`WINNOW_HOME/calibration` and goes on from there when it is called again with the same options, seed and model. The state stays
until `forget`, for when the calibration is saved.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from winnow.errors import UnknownName, Unsupported
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.training.options import parse_options
from winnow.workers.prefill.training.state import TrainingState

if TYPE_CHECKING:
    from winnow.workers.model.loader import LoadedModel

OnProgress = Callable[[int, int], None]

_MODULES = {
    "dhsa-v1": "dhsa_v1",
    "duoattention": "duoattention",
    "sale": "sale",
    "sea": "sea",
    "seerattention": "seerattention",
}


class Trainer(Protocol):
    """The function `calibrate` of a training module."""

    def __call__(
        self, model: LoadedModel, *, on_progress: OnProgress | None = None, seed: int = 0, **options: object
    ) -> tuple[dict[str, Tensor], dict[str, str]]: ...


def forget(method: str, fingerprint: str, *, seed: int = 0, **options: object) -> None:
    """Remove the state of the training that was called so."""
    chosen = parse_options(method, _module(method).Options, options)
    TrainingState(method, fingerprint, chosen, seed).remove()


def trainer(method: str) -> Trainer:
    """What calibrates a method.

    Raises:
        UnknownName: no prefill method of this name. Unsupported: the method needs no calibration.
    """
    learners = ", ".join(_MODULES)
    if method not in prefill_methods.names():
        raise UnknownName(f"calibrate: no method {method!r:.40} (those that learn: {learners})")
    if method not in _MODULES:
        raise Unsupported(f"{method}: needs no calibration, use it as it is (calibrated methods: {learners})")
    return cast(Trainer, _module(method).calibrate)


def _module(method: str) -> Any:
    return importlib.import_module(f"{__name__}.{_MODULES[method]}")
