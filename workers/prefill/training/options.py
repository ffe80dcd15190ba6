"""Options of a training as they come from the command line, checked against the dataclass that holds their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from winnow.errors import InvalidRequest
from winnow.registry import kind_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

MOST_RATE = 1e30  # any training diverges far below it, and ten times a rate must be a float32
MOST_SEED = 2**31 - 1  # times a million and something it still is a generator's seed


def parse_options(method: str, kind: type[T], given: Mapping[str, object]) -> T:
    """An instance of `kind` with these values, each an int, a float or a text of one, as the field's default is.

    Raises:
        InvalidRequest: an option that there is not, or of another type, or one that the dataclass refuses.
    """
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise InvalidRequest(f"calibrate {method}: no option {name!r:.40} (it has: {', '.join(known)})")
        wanted: type = type(known[name])
        try:
            number = float(value)  # type: ignore[arg-type]
            if number - number != 0.0 or (wanted is int and number != int(number)):  # inf and nan are no numbers here
                raise ValueError
        except (TypeError, ValueError):
            raise InvalidRequest(f"calibrate {method}: {name} must be {kind_of(known[name])}, got {value!r:.40}") from None
        kept[name] = wanted(number)
    return kind(**kept)


def need_seed(method: str, seed: int) -> None:
    """Raise InvalidRequest unless a training can be seeded with `seed`."""
    if not 0 <= seed <= MOST_SEED:
        raise InvalidRequest(f"calibrate {method}: --seed must be 0 to {MOST_SEED}, got {seed}; 0 is the default")


def need_rate(method: str, rate: float, hint: str = "") -> None:
    """Raise InvalidRequest unless an optimiser can learn at `rate`; the hint is of a usual one."""
    need(method, 0.0 < rate <= MOST_RATE, f"rate must be above 0 and at most {MOST_RATE:g}{hint}", rate)


def need(method: str, holds: bool, what: str, got: object) -> None:
    """Raise InvalidRequest("calibrate {method}: {what}, got {got}") unless `holds`."""
    if not holds:
        raise InvalidRequest(f"calibrate {method}: {what}, got {got}")
