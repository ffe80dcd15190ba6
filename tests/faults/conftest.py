"""One deployment for all fault tests that leave it healthy; a test that ends one starts its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from winnow.workers.model.tiny import make_tiny_model

from .deployment import Deployment, deployment_config


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough that a chunk of 64 tokens takes milliseconds: faults have something to hit."""
    return make_tiny_model(
        tmp_path_factory.mktemp("model") / "small", num_hidden_layers=8, hidden_size=256, intermediate_size=512
    )


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """WINNOW_HOME of this module's deployment."""
    before = os.environ.get("WINNOW_HOME")
    home = tmp_path_factory.mktemp("home")
    os.environ["WINNOW_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["WINNOW_HOME"]
    else:
        os.environ["WINNOW_HOME"] = before


@pytest.fixture(scope="module")
def deployment(own_home: Path, small_model: Path) -> Iterator[Deployment]:
    """Two prefill workers and a decode worker, each in its own process, placed by Ray."""
    running = Deployment.start(deployment_config(small_model))
    yield running
    running.stop()
