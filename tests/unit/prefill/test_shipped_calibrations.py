"""The calibrations that come with winnow: each is small, found by its model's fingerprint, fits the method and is used by it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.prefill import calibration
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.training import _MODULES

pytestmark = pytest.mark.slow

FOLDER = Path(calibration.__file__).parent / "calibrations"
FILES = sorted(FOLDER.glob("*.safetensors"))
LIMIT_BYTES = 2_000_000
LAYERS, HQ, HKV, D, CONTEXT = 30, 9, 3, 64, 8192  # SmolLM2-135M-Instruct
SETTINGS = {"seerattention": {"density": 0.25}}  # noise is spread evenly: no tile of it misses the default threshold
N = 2304  # more than any of the methods leaves dense


@dataclass
class _Decoder:
    dtype: torch.dtype
    device: torch.device


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    rope = RopeSpec(tuple(100_000.0 ** (-i / (D // 2)) for i in range(D // 2)))
    return ModelSpec("llama", LAYERS, 576, 1536, HQ, HKV, D, 49_152, CONTEXT, _layers(), (rope,), (0,) * LAYERS)


def _layers() -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(i, HQ, HKV, D, D**-0.5) for i in range(LAYERS))


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def _made(method: str) -> dict[str, str]:
    """How the shipped file of a method was made, and how well it did on texts held out."""
    return next(made for made in map(_header, FILES) if made["method"] == method)


def _figures(text: str) -> dict[str, float]:
    """Of "name=number name=number"."""
    return {name: float(value) for name, value in (pair.split("=") for pair in text.split())}


def _model(path: Path, spec: ModelSpec) -> LoadedModel:
    """The model that a file was made with, as far as `bind` looks at it: no weights."""
    decoder: Any = _Decoder(torch.float32, torch.device("cpu"))
    return LoadedModel("smollm2-135m-instruct", spec, decoder, None, _header(path)["model"], "fp32")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path))  # so that what the user calibrated is not what is tested


def test_every_method_that_needs_one_has_one_for_the_default_model() -> None:
    assert sorted(_header(path)["method"] for path in FILES) == sorted(_MODULES)
    assert len({_header(path)["model"] for path in FILES}) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_small_named_after_its_model_and_says_how_it_was_made(path: Path) -> None:
    made = _header(path)
    assert path.stat().st_size < LIMIT_BYTES
    assert path.name == calibration.file_name(made["method"], made["model"])
    assert made["data"] and "seed=" in made["options"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_finds_its_file_and_plans_with_it(path: Path, spec: ModelSpec) -> None:
    """Every row gives key 0 much, as in real models, so that thresholds and budgets leave something out."""
    name = _header(path)["method"]
    method = prefill_methods.create(name, dict(SETTINGS.get(name, {}))).bind(_model(path, spec))
    assert method.calibration_id == calibration.load(method.name, _header(path)["model"]).digest
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, N, D, generator=generator) for heads in (HQ, HKV, HKV))
    q[..., 0] += 8.0
    k[:, :, 0, 0] += 12.0
    plans = [method.plan(q, k, layer) for layer in spec.layers[:: LAYERS - 1]]
    made = [plan for plan in plans if isinstance(plan, TilePlan)]
    assert made, "the method left every layer dense"
    for plan in made:
        plan.check()
        out, _ = attend_plan(plan, q, k, v, scale=D**-0.5)
        assert bool(out.isfinite().all())
    assert min(plan.density() for plan in made) < 1.0


def test_shipped_gates_learnt_what_their_card_demands() -> None:
    made = _made("seerattention")
    assert float(made["loss_before"]) / float(made["loss_after"]) >= 5.0
    recall = _figures(made["recall_at_density_0.2"])
    assert recall["gate"] >= 0.9 * recall["oracle"]
    assert recall["untrained"] < recall["mean_pooling"] < recall["gate"] <= recall["oracle"] <= 1.0


@pytest.mark.parametrize("share", ["0.25", "0.5"])
def test_shipped_retrieval_heads_answer_nearly_as_well_as_all_and_better_than_heads_picked_otherwise(share: str) -> None:
    made = _made("duoattention")
    dense, found, random, entropy = (
        float(made[f"answer_tokens_right_{name}"]) for name in ("dense", f"found@{share}", f"random@{share}", f"entropy@{share}")
    )
    assert found >= 0.95 * dense
    assert found > max(random, entropy)


def test_no_head_of_the_shipped_thresholds_errs_by_more_than_theta() -> None:
    above, heads = _made("sale")["heads_above_theta"].split(" of ")
    assert (int(above), int(heads)) == (0, LAYERS * HQ)


def test_the_shipped_distillation_halved_the_divergence() -> None:
    made = _made("sea")
    assert float(made["divergence_after"]) <= 0.5 * float(made["divergence_before"])


def test_the_shipped_border_predictor_ranks_borders_first() -> None:
    area = _figures(_made("dhsa-v1")["roc_area"])
    assert area["before"] < 0.7 < area["after"] <= 1.0
