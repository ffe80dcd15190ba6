"""The methods of requests that name none: whether they can be made is known before anything is started for them."""

from __future__ import annotations

from typing import Any

from winnow.config import WinnowConfig
from winnow.errors import ConfigError, WinnowError
from winnow.registry import parse_spec

PARTS = ("prefill", "decode", "rank")


def wrong_defaults(config: WinnowConfig) -> dict[str, str]:
    """Setting -> why its method cannot be made: not registered, or a parameter that it does not have or refuses.

    Whether a method fits the model is left to the request: the model is not there yet.
    """
    parts = {name: getattr(config, name) for name in PARTS}
    if all(part.method == type(part).model_fields["method"].default for part in parts.values()):
        return {}  # as shipped, known to be right: the registries import torch, which takes seconds
    from winnow.workers.decode.base import decode_methods
    from winnow.workers.prefill.base import prefill_methods
    from winnow.workers.ranking.base import rankers

    registries: dict[str, Any] = {"prefill": prefill_methods, "decode": decode_methods, "rank": rankers}
    found = {}
    for name, part in parts.items():
        try:
            registries[name].create(*parse_spec(part.method))
        except WinnowError as error:
            found[f"{name}.method"] = str(error)
    return found


def check_defaults(config: WinnowConfig) -> None:
    """Raises ConfigError that names every setting in `wrong_defaults`."""
    if found := wrong_defaults(config):
        raise ConfigError("; ".join(f"{setting}: {why}" for setting, why in found.items()))
