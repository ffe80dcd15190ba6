"""Where the kernel tests run: on the GPU where there is one, else in Triton's interpreter on the CPU.

The choice must be made before a kernel module is imported and holds for the process, so the other half is deselected.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).resolve().parent
_HAS_CUDA = torch.cuda.is_available()
if not _HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
_CASES = str(_HERE.parent / "unit" / "attention")  # plans and tensors that the executor's tests use too
if _CASES not in sys.path:
    sys.path.append(_CASES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop `gpu` tests without CUDA and interpreter tests with it."""
    keep, drop = [], []
    for item in items:
        mine = _HERE in item.path.parents
        on_gpu = item.get_closest_marker("gpu") is not None
        interpreted = "cpu" in getattr(getattr(item, "callspec", None), "id", "").split("-")
        (drop if mine and ((on_gpu and not _HAS_CUDA) or (interpreted and _HAS_CUDA)) else keep).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)
