"""winnow: long-context LLM inference that reads only what matters."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.client import Client as Client
    from winnow.client_async import AsyncClient as AsyncClient

try:
    __version__ = version("winnow-llm")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["AsyncClient", "Client", "__version__"]

_LAZY = {"Client": "winnow.client", "AsyncClient": "winnow.client_async"}


def __getattr__(name: str) -> Any:
    """The clients are imported on first use: they bring gRPC, which methods and indexes do not need."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'winnow' has no attribute {name!r}")
