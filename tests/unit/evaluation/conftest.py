"""A tiny model, once for all tests of the evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.model.tokenizer import Tokenizer

_UNIT = str(Path(__file__).resolve().parents[1])
if _UNIT not in sys.path:
    sys.path.append(_UNIT)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("evaluated") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def tokenizer(tiny: LoadedModel) -> Tokenizer:
    return tiny.tokenizer
