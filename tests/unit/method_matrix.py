"""Every prefill method as one row: with it, a method enters all property tests of `prefill/test_method_matrix.py`.

A test there checks that no registered method is missing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One method as it is tested.

    Attributes:
        method: registered name.
        params: parameters small enough that the method selects something on a few hundred tokens.
        dense_limits: parameter sets under which the method must equal dense attention.
    """

    method: str
    params: dict[str, Any] = field(default_factory=dict)
    dense_limits: tuple[dict[str, Any], ...] = ({},)


METHODS = (
    Row("dense"),
    Row(
        "flexprefill",
        params={"block": 32, "min_budget": 64},
        dense_limits=(
            {"min_budget": 1 << 20},
            {"block": 32, "min_budget": 64, "gamma": 1.0, "tau": 0.0},
            {"block": 32, "min_budget": 64, "gamma": 1.0, "tau": 1.0},
        ),
    ),
)
