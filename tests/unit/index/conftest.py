"""Folders and clocks of the index tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from winnow.config import KVConfig
from winnow.index.folder import candidate_folders, make_private


@pytest.fixture
def kv_config(tmp_path: Path) -> KVConfig:
    """A small budget and small blocks, in a folder of this test alone."""
    return KVConfig(dir=str(tmp_path), budget_bytes=1 << 20, block_tokens=4, lease_s=10.0)


@pytest.fixture
def folder(kv_config: KVConfig) -> Path:
    """The private folder that configuration leads to."""
    return make_private(candidate_folders(kv_config)[0])
