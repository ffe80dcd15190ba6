"""What every training refuses: seeds that no generator takes, and results that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.errors import InvalidRequest
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.training import _MODULES, trainer
from winnow.workers.prefill.training.options import MOST_SEED, need_seed
from winnow.workers.prefill.training.state import TrainingState

pytestmark = pytest.mark.slow

QUICK: dict[str, dict[str, Any]] = {
    "dhsa-v1": {"tokens": 96, "passages": 2, "held_out": 1, "epochs": 1, "batch": 64},
    "duoattention": {"tokens": 512, "keys": 2, "words": 2, "prompts": 2, "held_out": 1, "sink": 4, "recent": 32, "steps": 3},
    "sale": {"tokens": 1536, "prompts": 1},
    "sea": {"tokens": 64, "steps": 4, "rows": 16, "held_out": 1, "k": 8, "columns": 16},
    "seerattention": {"tokens": 256, "passages": 2, "held_out": 1, "batch": 1, "width": 8, "steps": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")), dtype="fp32", device="cpu")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))
    return tmp_path


def test_every_training_is_looked_at() -> None:
    assert set(QUICK) == set(_MODULES)


@pytest.mark.parametrize("seed", [-1, MOST_SEED + 1, 10**14, 1 << 70])
@pytest.mark.parametrize("method", QUICK)
def test_seeds_that_no_generator_takes_are_refused_before_anything_is_read(model: LoadedModel, method: str, seed: int) -> None:
    done: list[int] = []
    with pytest.raises(InvalidRequest, match=f"calibrate {method}: --seed must be 0 to {MOST_SEED}, got {seed}"):
        trainer(method)(model, seed=seed, on_progress=lambda now, total: done.append(now), **QUICK[method])
    assert not done


@pytest.mark.parametrize("method", QUICK)
def test_the_largest_seed_is_taken(model: LoadedModel, method: str) -> None:
    need_seed(method, MOST_SEED)
    tensors, _ = trainer(method)(model, seed=MOST_SEED, **QUICK[method])
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("method", ["dhsa-v1", "sea", "seerattention"])
def test_a_training_that_diverged_is_refused_and_forgotten(model: LoadedModel, own_home: Path, method: str) -> None:
    with pytest.raises(
        InvalidRequest, match=rf"calibrate {method}: rate=1e\+30 is too high: .* is not finite; try a tenth of it"
    ):
        trainer(method)(model, rate=1e30, **QUICK[method])
    assert not list((own_home / "calibration").iterdir())


@pytest.mark.parametrize("rate", [1e38, 1e300])
@pytest.mark.parametrize("method", ["dhsa-v1", "duoattention", "sea", "seerattention"])
def test_a_rate_that_no_optimiser_takes_is_refused(model: LoadedModel, method: str, rate: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"calibrate {method}: rate must be above 0 and at most 1e\+30"):
        trainer(method)(model, rate=rate, **QUICK[method])


def test_what_overflows_in_the_dtype_it_is_saved_in_is_refused(model: LoadedModel) -> None:
    state = TrainingState("sea", model.fingerprint, "", 0)
    big = {"weights": torch.full((2, 3, 4), 1e8)}
    state.write("piece", big)
    state.need_finite(big, 0.1)
    assert state.read("piece") is not None
    for stored in (calibration.rounded(big), {"weights": big["weights"].half()}):
        with pytest.raises(InvalidRequest, match=r"calibrate sea: rate=0\.1 is too high"):
            state.need_finite(stored, 0.1)
    assert state.read("piece") is None
