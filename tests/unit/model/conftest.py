"""Tiny models, made once per test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from winnow.workers.model.tiny import make_tiny_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny model of a family, with the given config fields; made on first use."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **overrides: object) -> Path:
        key = f"{family}-{sorted(overrides.items())!r}"
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp("tiny") / family, family, seed=3, **overrides)
        return made[key]

    return get
