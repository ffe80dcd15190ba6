"""What attention and selection cost on a kind of device: a few coefficients each, fitted to measurements and shipped as data.

    dense ms      = a pairs + b rows + c
    attention ms  = e pairs x density + f rows + g        a method's plans, run
    selection ms  = h pairs + i keys + j                  its `plan`

pairs: causal (query, key) pairs x query heads x head size, in 1e9; rows and keys: their number x query heads x head size, in
1e6. So heads of another number or size scale with the work. `tests/bench/fit_costs.py` makes costs.json; see there for how.

A method has its costs by name, and by name and the parameters that choose what is run: those that are words
("flashprefill:correction=true") and a few numbers. Other numbers say how much of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from winnow.registry import parse_spec
from winnow.types import MethodChoice
from winnow.workers.attention.backend import LayerSpec

_SWITCHES = frozenset({"chunk_tokens"})  # DHSA with chunks of one length does not run its border predictor
FILE = Path(__file__).with_name("costs.json")
Coefficients = tuple[float, float, float]


@dataclass(frozen=True)
class Size:
    """One call of attention: N rows of M >= N keys, right-aligned."""

    rows: int
    keys: int
    heads: int
    head_size: int

    @classmethod
    def of(cls, layer: LayerSpec, rows: int, keys: int) -> Size:
        return _size(rows, keys, layer.n_q_heads, layer.head_size)

    @functools.cached_property
    def causal(self) -> float:
        """Causal pairs over all heads."""
        return self.heads * (self.rows * (self.keys - self.rows) + self.rows * (self.rows + 1) / 2)

    def attended(self, density: float) -> Coefficients:
        """Features of dense attention (density 1) and of a plan."""
        return self.causal * self.head_size * density * 1e-9, self.rows * self.heads * self.head_size * 1e-6, 1.0

    def selected(self) -> Coefficients:
        """Features of a method's selection."""
        return self.causal * self.head_size * 1e-9, self.keys * self.heads * self.head_size * 1e-6, 1.0


_size = functools.lru_cache(maxsize=64)(Size)  # the layers of a chunk ask for the same one, and a short prompt waits for the host


@dataclass(frozen=True)
class MethodCosts:
    """One method on one kind of device.

    Attributes:
        margin: factor on what is predicted, so that none of the measured cells for which it chooses sparse loses by it.
        least_pairs: those of the smallest call measured, in 1e9; of smaller ones nothing is known.
        densities: (keys, density) as measured on the structured workload, keys ascending, by the parameters that were not at
            their defaults, as `registry.parse_spec` reads them; "" = none, or where that was not measured, the densest.
    """

    attention: Coefficients
    selection: Coefficients
    margin: float
    least_pairs: float = 0.0
    densities: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def covers(self, size: Size) -> bool:
        """Whether the call is as large as the smallest one measured. Smaller ones are mostly fixed costs, which fits miss."""
        return size.attended(1.0)[0] >= self.least_pairs * 0.999

    def attention_ms(self, size: Size, density: float) -> float:
        return self.margin * _dot(self.attention, size.attended(density))

    def selection_ms(self, size: Size) -> float:
        return self.margin * _dot(self.selection, size.selected())

    def usual_density(self, keys: int, params: str = "") -> float:
        """That of the longest prompt measured that is no longer; 1 below all of them: shorter prompts are denser."""
        measured = self.densities.get(params) or self.densities.get("", ())
        return next((density for length, density in reversed(measured) if length <= keys), 1.0)


@dataclass(frozen=True)
class DeviceCosts:
    """Costs on one kind of device, of the methods that were measured there, by `variant_of` their spec."""

    dense: Coefficients
    methods: Mapping[str, MethodCosts]

    def of(self, spec: str) -> MethodCosts | None:
        """Of a `PrefillMethod.spec`: of its variant, else of the method as it comes; None = not measured."""
        return self.methods.get(variant_of(spec)) or self.methods.get(spec.partition(":")[0])

    def dense_ms(self, size: Size) -> float:
        return _dot(self.dense, size.attended(1.0))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeviceCosts:
        methods = {
            name: MethodCosts(
                _three(m["attention"]), _three(m["selection"]), float(m["margin"]), float(m["least_pairs"]),
                {params: tuple((int(keys), float(share)) for keys, share in found) for params, found in m["densities"].items()},
            )
            for name, m in data["methods"].items()
        }  # fmt: skip
        return cls(_three(data["dense"]), methods)


def variant_of(spec: str) -> str:
    """A `PrefillMethod.spec` with the parameters that choose what is run only; "set" stands for numbers among them."""
    name, params = parse_spec(spec)
    chosen = {key: "set" if _is_number(value) else value for key, value in params.items()}
    return MethodChoice(name, {key: value for key, value in chosen.items() if value != "set" or key in _SWITCHES}).spec


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def costs_of(device: torch.device, dtype: torch.dtype, file: Path = FILE) -> DeviceCosts | None:
    """The costs of a device's kind with values of this dtype, None where nobody measured it."""
    return _read(file).get(device_kind(device, dtype))


def device_kind(device: torch.device, dtype: torch.dtype) -> str:
    """ "cpu_float32"; "cpu_bfloat16", and "cpu_bfloat16_amx" on a processor with matrix tiles, which dense attention gains more
    from than the small pieces of a plan; "sm_90_16" for 16-bit values on a CUDA device of compute capability 9.0 (H100, H200):
    both kinds of them take the same kernels there."""
    if device.type != "cuda":
        amx = device.type == "cpu" and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        return f"{device.type}_{str(dtype).removeprefix('torch.')}{'_amx' if amx else ''}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}_{dtype.itemsize * 8}"


@functools.cache
def _read(file: Path) -> Mapping[str, DeviceCosts]:
    if not file.is_file():
        return {}
    return {kind: DeviceCosts.from_json(found) for kind, found in json.loads(file.read_text())["devices"].items()}


def _three(values: Any) -> Coefficients:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _dot(a: Coefficients, b: Coefficients) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
