"""Settings every test shares. They come before torch is imported anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two spinning threads starve the process under test
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in a test may reach a model hub

import pytest
import structlog
from hypothesis import settings

# On a shared machine a slow example is no failure, and CI must not find a new counterexample on an unchanged commit: it runs
# the same examples every time, developers run fresh ones.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _logging_as_found() -> Iterator[None]:
    """A test that sets logging up must not leave its stream or level to those after it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()
