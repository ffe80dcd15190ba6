"""The quality benchmark: what its rows say of finished cells, and that shards together are the whole grid."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from winnow.orchestration.evaluation.journal import Record
from winnow.orchestration.evaluation.runner import Evaluation, Grid
from winnow.registry import Capabilities, Entry
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.base import PrefillMethod, prefill_methods

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("winnow_bench_quality", BENCH / "quality.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


@dataclass(frozen=True)
class Broken(PrefillMethod):
    """A method with a bug."""

    caps = Capabilities()
    name = "broken"

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        raise RuntimeError("broken by design")


def record(method: str, task: str, seed: int, score: float, length: int = 100, **more: Any) -> Record:
    generates = task != "perplexity"
    return {
        "method": method, "task": task, "length": length, "seed": seed, "asked_depth": None, "generates": generates,
        "score": score, "density": 0.5, "kl": 0.2, "measured": None, **more,
    }  # fmt: skip


def cells(method: str, scores: dict[str, list[float]], **more: Any) -> list[Record]:
    return [record(method, task, seed, score, **more) for task, line in scores.items() for seed, score in enumerate(line)]


def by_name(rows: list[Any]) -> dict[str, Any]:
    return {row.name: row for row in rows}


def test_rows_are_means_by_task_beside_dense_on_the_same_prompts(quality: ModuleType) -> None:
    dense = cells("dense", {"needle": [1.0, 1.0], "questions": [0.5, 0.7], "perplexity": [0.25, 0.25]}, kl=0.0, density=1.0)
    measured = {"overall": {"recall_mean": 0.9, "recall_p5": 0.6}}
    sparse = cells("sparse", {"needle": [1.0, 0.0], "questions": [0.5, 0.5], "perplexity": [0.25, 0.125]}, measured=measured)
    floor = cells(quality.EVERY_TILE, {"needle": [1.0, 1.0], "questions": [0.5, 0.7], "perplexity": [0.25, 0.25]}, kl=0.001)
    rows = by_name(quality.rows_of([*dense, *sparse, *floor], ["dense", "sparse"]))
    score = rows["quality/100/sparse/score"]
    assert (score.value, score.control_value, score.n) == (pytest.approx(0.5), pytest.approx(0.8), 4)
    assert score.spread == pytest.approx((0.75 - 0.25) / 0.5)
    # gaps: needle 0, -1 and questions 0, -0.2; standard errors 0.5 and 0.1 of two tasks
    assert score.note.startswith(f"-0.300 ± {math.hypot(0.5, 0.1) / 2:.3f} beside dense; needle 0.500, questions 0.500")
    perplexity = rows["quality/100/sparse/perplexity"]
    assert (perplexity.value, perplexity.control_value) == (pytest.approx(math.sqrt(4 * 8)), pytest.approx(4.0))
    recall = rows["quality/100/sparse/recall"]
    assert (recall.value, recall.control_value, recall.n) == (pytest.approx(0.9), 1.0, 6) and "0.600" in recall.note
    assert rows["quality/100/sparse/density"].value == pytest.approx(0.5)
    kl = rows["quality/100/sparse/kl"]
    assert (kl.value, kl.control_value, kl.ratio) == (pytest.approx(0.2), pytest.approx(0.001), pytest.approx(200))
    assert rows["quality/100/dense/score"].ratio == 1.0 and "quality/100/dense/kl" not in rows
    assert not any(name.startswith("quality/all") for name in rows)


def test_over_all_lengths_each_length_counts_once(quality: ModuleType) -> None:
    found = [
        *cells("dense", {"needle": [1.0]}), *cells("sparse", {"needle": [1.0]}),
        *cells("dense", {"needle": [1.0, 1.0, 1.0]}, length=200), *cells("sparse", {"needle": [0.0, 0.0, 0.0]}, length=200),
    ]  # fmt: skip
    rows = by_name(quality.rows_of(found, ["sparse"]))
    assert [rows[f"quality/{name}/sparse/score"].value for name in ("100", "200", "all")] == [1.0, 0.0, 0.5]


def test_a_method_stands_beside_dense_on_its_own_prompts(quality: ModuleType) -> None:
    found = [*cells("dense", {"needle": [1.0, 0.0, 0.0]}), *cells("sparse", {"needle": [0.5]})]
    row = by_name(quality.rows_of(found, ["sparse"]))["quality/100/sparse/score"]
    assert (row.value, row.control_value, row.n) == (0.5, 1.0, 1)


def test_shards_together_are_the_grid(quality: ModuleType, tiny: LoadedModel, tmp_path: Path) -> None:
    grid = Grid(methods=("powerattention:block=32,local_blocks=2",), lengths=(400, 500), tasks=("needle", "perplexity"), seeds=2,
                n_rows=8)  # fmt: skip
    whole = Evaluation(tiny, grid).run(tmp_path / "whole")
    for shard in range(3):
        Evaluation(tiny, grid, share=(shard, 3), is_timed=False).run(tmp_path / f"shard-{shard}")
    _, records = quality.collect(tmp_path)

    def known(found: list[Record]) -> dict[str, tuple[float, float]]:
        return {r["key"]: (r["score"], r["kl"]) for r in found}

    assert known(records) == known(whole)
    assert len(records) == 16


def test_a_run_from_the_command_line_writes_rows_and_goes_on_without_a_broken_method(
    quality: ModuleType, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prefill_methods.names()  # loaded, so that the entry stays
    monkeypatch.setitem(prefill_methods._entries, "broken", Entry("broken", Broken))
    monkeypatch.setenv("WINNOW_BENCH_OUT", str(tmp_path))
    monkeypatch.setenv("WINNOW_BENCH_COMMIT", "test")
    method = "powerattention:block=32,local_blocks=2"
    options = [
        "--model", str(tiny_folder), "--device", "cpu", "--lengths", "400", "--tasks", "needle", "perplexity", "--shards", "2",
        "--seeds", "1", "--final-seeds", "1", "--methods", method, "broken", quality.EVERY_TILE, "--slow", "--finalists", method,
        "--out", str(tmp_path / "cells"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["quality.py", *options])
    quality.main()
    assert "broken by design" in capfd.readouterr().err  # and reported; the others go on
    rows = {row["name"]: row for row in json.loads((tmp_path / "quality.json").read_text())["rows"]}
    density = rows[f"quality/400/{method}/density"]
    assert 0.0 < density["value"] < 1.0 and density["n"] == 6  # two tasks in three rounds
    assert rows[f"quality/400/{quality.EVERY_TILE}/density"]["n"] == 4
    assert rows[f"quality/400/{method}/recall"]["n"] == 2
    assert rows[f"quality/400/{quality.EVERY_TILE}/density"]["value"] == pytest.approx(1.0)
    late = quality.parse([*options, "--seconds", "-1", "--out", str(tmp_path / "late")])
    quality.evaluate(late, 0)
    assert quality.collect(late.out)[1] == []


def test_a_mean_comes_with_its_standard_error(quality: ModuleType) -> None:
    values = [1.0, 2.0, 4.0]
    mean, error = quality._mean_and_error(values)
    assert (mean, error) == (pytest.approx(7 / 3), pytest.approx(statistics.stdev(values) / math.sqrt(3)))
    assert math.isnan(quality._mean_and_error([1.0])[1])
