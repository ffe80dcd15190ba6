"""Kernels in Triton. This package itself imports no triton: most machines without a GPU have none."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def kernel_module(name: str) -> ModuleType | None:
    """The module of this package called `name`, or None where triton is missing."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None
