"""The one schema of every result file of the project, and how a benchmark writes it.

`{commit, date, machine, versions, command, rows: [{name, value, unit, control, control_value, ratio, n, spread}]}`. A row's
control was measured in the same run; `ratio = value / control_value`. A row without its control is not a result.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "faiss-cpu", "grpcio", "protobuf", "ray", "redis", "numpy")


class Row(BaseModel):
    """One measured value beside its control.

    Attributes:
        value, control_value: medians of n repetitions, in `unit`.
        spread: (largest - smallest) / median of the value's repetitions.
        note: what a reader must know to read the number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: float
    unit: str
    control: str
    control_value: float
    ratio: float
    n: int
    spread: float
    note: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Row:
        if not math.isclose(self.ratio, self.value / self.control_value, rel_tol=1e-6):
            raise ValueError(f"{self.name}: ratio is not value / control_value")
        if self.n < 1 or not self.control:
            raise ValueError(f"{self.name}: a row needs its control and at least one repetition")
        return self


class ResultFile(BaseModel):
    """What a benchmark run produced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    commit: str
    date: str
    machine: str
    versions: dict[str, str]
    command: str
    rows: list[Row]


def row(name: str, values: Sequence[float], unit: str, control: str, controls: Sequence[float], note: str = "") -> Row:
    """A row from repetitions: medians, their ratio and the spread of the values."""
    value, base = statistics.median(values), statistics.median(controls)
    spread = (max(values) - min(values)) / value if value else 0.0
    return Row(name=name, value=value, unit=unit, control=control, control_value=base, ratio=value / base, n=len(values),
               spread=spread, note=note)  # fmt: skip


def command_line() -> str:
    """What runs this process again."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def write(file_name: str, rows: list[Row], machine: str | None = None, command: str = "") -> Path:
    """Write `results/<file_name>` and print it as a table. `command`: for a shell, where it took several processes."""
    FOLDER.mkdir(exist_ok=True)
    result = ResultFile(commit=commit(), date=datetime.date.today().isoformat(), machine=machine or describe_machine(),
                        versions=versions(), command=command or command_line(), rows=rows)  # fmt: skip
    path = Path(os.environ.get("WINNOW_BENCH_OUT") or FOLDER) / file_name
    path.write_text(json.dumps(result.model_dump(), indent=1) + "\n")
    for r in rows:
        print(f"{r.name:32} {r.value:12.4g} {r.unit:8} {r.control}: {r.control_value:.4g}  ratio {r.ratio:.3f}  "
              f"(n={r.n}, spread {r.spread:.0%})")  # fmt: skip
    return path


def commit() -> str:
    """Short commit of the code measured, with "+" when the tree has changes that are not committed."""
    if given := os.environ.get("WINNOW_BENCH_COMMIT"):
        return given
    from winnow.orchestration.evaluation.journal import commit as of_checkout  # reading results needs no winnow

    if not (found := of_checkout()):
        raise RuntimeError("no git checkout: say in WINNOW_BENCH_COMMIT what is measured")
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide speed, as installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> str:
    """Processor, the instructions that torch uses, usable cores and memory, or the GPU's name and memory."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "CPU"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
