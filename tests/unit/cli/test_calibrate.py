"""`winnow calibrate` on tiny real models: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from winnow.cli.calibrate import parse_pairs
from winnow.errors import InvalidRequest
from winnow.workers.model.loader import load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration, training
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.training import trainer

pytestmark = pytest.mark.slow

Winnow = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = {
    "seerattention": ("tokens=256", "passages=3", "held_out=1", "steps=5", "width=4"),
    "duoattention": ("tokens=512", "keys=1", "words=2", "prompts=2", "held_out=1", "steps=3", "sink=4", "recent=32"),
}


def arguments(method: str, model: Path, *more: str) -> list[str]:
    pairs = [part for option in OPTIONS[method] for part in ("--option", option)]
    return ["calibrate", method, "--model", str(model), "--device", "cpu", "--dtype", "fp32", *pairs, *more]


def test_help_names_every_method_that_learns(winnow: Winnow) -> None:
    said = winnow("calibrate", "--help").stdout
    assert [method for method in training._MODULES if method not in said] == []


@pytest.mark.parametrize("method", OPTIONS)
def test_a_calibrated_method_can_be_bound_to_its_model(winnow: Winnow, tmp_path: Path, own_home: Path, method: str) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    done = winnow(*arguments(method, folder))
    assert done.returncode == 0, done.stderr
    model = load_model(str(folder), device="cpu", dtype="fp32")
    file = own_home / "calibration" / calibration.file_name(method, model.fingerprint)
    assert [file] == list((own_home / "calibration").iterdir())
    assert f"{method} is calibrated for tiny" in " ".join(done.stdout.split()) and str(file) in done.stdout
    assert "loss before" in done.stdout and "seed=0" in done.stdout
    assert prefill_methods.create(method).bind(model).calibration_id == calibration.load(method, model.fingerprint).digest


def test_json_has_the_figures_and_the_seed_matters(winnow: Winnow, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    model = load_model(str(folder), device="cpu", dtype="fp32")
    found = []
    for seed in ("0", "1", "0"):
        done = winnow(*arguments("seerattention", folder, "--json", "--seed", seed))
        told = json.loads(done.stdout)
        assert (told["method"], told["model"], told["fingerprint"]) == ("seerattention", "tiny", model.fingerprint)
        assert Path(told["path"]).stat().st_size == told["size_bytes"]
        assert float(told["made"]["loss_after"]) < float(told["made"]["loss_before"])
        found.append(dict(calibration.load("seerattention", model.fingerprint).tensors))
    assert torch.equal(found[0]["q"], found[2]["q"]) and not torch.equal(found[0]["q"], found[1]["q"])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("flexprefill", "flexprefill: needs no calibration, use it as it is (calibrated methods: dhsa-v1, duoattention"),
        ("duoatention", "those that learn: dhsa-v1, duoattention,"),
        ("foo", "no method 'foo' (those that learn: dhsa-v1, duoattention, sale, sea, seerattention)"),
    ],
)
def test_methods_that_cannot_be_calibrated_are_refused_before_a_model_is_loaded(winnow: Winnow, method: str, words: str) -> None:
    done = winnow("calibrate", method, "--model", "/nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--option", "steps"], "--option: expected key=value"),
        (["--option", "steps=1", "--option", "steps=2"], "steps is given twice"),
        (["--option", "stepz=1"], "no option 'stepz' (it has: tokens, passages"),
        (["--option", "steps=few"], "steps must be a whole number, got 'few'"),
        (["--option", "tokens=4096"], "context of 2048 tokens"),
        (["--seed", str(1 << 31)], "calibrate seerattention: --seed must be 0 to 2147483647, got 2147483648; 0 is the default"),
        (["--option", "rate=1e30", "--option", "tokens=256", "--option", "passages=2", "--option", "steps=3"], "rate=1e+30 is"),
        (["--dtype", "fp8"], "--dtype (model.dtype): must be auto, fp32, fp16 or bf16, got 'fp8'"),
        (["--device", "tpu"], "--device (model.device): must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--model", "/nowhere"], "no folder or file 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    winnow: Winnow, tmp_path: Path, own_home: Path, extra: list[str], words: str
) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    done = winnow("calibrate", "seerattention", "--model", str(folder), "--device", "cpu", *extra)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and words in done.stderr
    assert not list((own_home / "calibration").glob("*.safetensors"))


def test_a_seed_out_of_range_is_refused_before_a_model_is_loaded(winnow: Winnow) -> None:
    done = winnow("calibrate", "dhsa-v1", "--model", "/nowhere", "--seed", str(10**14))
    assert done.returncode == 2 and "--seed must be 0 to 2147483647" in done.stderr


def test_a_calibration_that_cannot_be_saved_is_kept_for_the_next_try(winnow: Winnow, tmp_path: Path, own_home: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    model = load_model(str(folder), device="cpu", dtype="fp32")
    file = own_home / "calibration" / calibration.file_name("seerattention", model.fingerprint)
    file.mkdir(parents=True)  # in its way
    done = winnow(*arguments("seerattention", folder))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "WINNOW_HOME" in done.stderr and "the same command goes on" in done.stderr
    (state,) = (own_home / "calibration").glob("*.training")
    assert any(state.iterdir())
    file.rmdir()
    assert winnow(*arguments("seerattention", folder)).returncode == 0
    assert [file] == list((own_home / "calibration").iterdir())


def test_values_are_read_as_what_they_look_like() -> None:
    pairs = parse_pairs(["steps=12", "rate = 1e-3", "fast=True", "text=a=b"])
    assert pairs == {"steps": 12, "rate": 0.001, "fast": True, "text": "a=b"}
    with pytest.raises(InvalidRequest, match="--option"):
        parse_pairs(["=1"])


def test_every_calibrated_method_has_its_training() -> None:
    from winnow.workers.prefill import training

    for method in training._MODULES:
        assert callable(trainer(method)) and prefill_methods.get(method).name == method


def test_it_explains_itself(winnow: Winnow) -> None:
    done = winnow("calibrate", "--help", columns=80)
    assert done.returncode == 0 and "--option" in done.stdout and "goes on where it was" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
