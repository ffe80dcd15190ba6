"""The grid: what is kept, what a resumed run does again, what is refused before anything is computed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from winnow.errors import Conflict, ContextTooLong, CorruptBlock, InvalidRequest, UnknownName, Unsupported
from winnow.orchestration.evaluation.journal import CELLS, MANIFEST, Journal, Record, environment
from winnow.orchestration.evaluation.runner import Evaluation, Grid
from winnow.orchestration.evaluation.summary import summarise
from winnow.registry import Capabilities, Entry
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.base import PrefillMethod, prefill_methods

FLEX = "flexprefill:block=32,gamma=0.5,min_budget=64"
GRID = Grid(methods=(FLEX,), lengths=(500, 700), tasks=("needle", "perplexity"), seeds=2, n_rows=8)
PLACE = {"method": "dense", "task": "needle", "length": 500, "seed": 0, "asked_depth": None}
TIMES = {"prefill_s", "select_s", "attend_s", "dense_s", "run"}


@dataclass(frozen=True)
class Refusing(PrefillMethod):
    """Refuses a model, or every prompt from a length on."""

    caps = Capabilities()
    name = "refusing"
    from_tokens: int = 0
    is_length: bool = False

    def bind(self, model: LoadedModel) -> PrefillMethod:
        if not self.from_tokens:
            raise Unsupported("refusing: not calibrated for this model")
        return self

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        if q.shape[2] >= self.from_tokens:
            raise (ContextTooLong if self.is_length else Unsupported)(f"refusing: not for {q.shape[2]} tokens")
        return None


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill_methods.names()  # loaded, so that the entry stays
    monkeypatch.setitem(prefill_methods._entries, "refusing", Entry("refusing", Refusing))


def run(model: LoadedModel, out: Path, grid: Grid = GRID, **options: Any) -> list[Record]:
    return Evaluation(model, grid).run(out, **options)


def timeless(value: Any) -> Any:
    """The same without what a clock said."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def test_every_method_is_run_on_every_prompt_and_dense_first(tiny: LoadedModel, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    records = Evaluation(tiny, GRID, lambda *progress: seen.append(progress)).run(tmp_path / "out")
    assert [(r["length"], r["task"], r["seed"], r["method"]) for r in records] == [
        (length, task, seed, method)
        for length in GRID.lengths for task in GRID.tasks for seed in (0, 1) for method in ("dense", FLEX)
    ]  # fmt: skip
    assert [done for done, _, _ in seen] == list(range(17)) and {total for _, total, _ in seen} == {16}
    assert [r["measured"] is not None for r in records] == [r["seed"] == 0 for r in records]
    assert [r["measured"]["map"] is not None for r in records if r["measured"]] == [
        r["task"] == "needle" for r in records if r["measured"]
    ]
    dense, flex = records[0], records[1]
    assert (dense["kl"], dense["density"], dense["same_answer"]) == (0.0, 1.0, True)
    assert flex["kl"] > 0 and flex["density"] < 1 and flex["depth"] == dense["depth"]
    assert [r["same_answer"] for r in records if r["task"] == "perplexity"] == [None] * 8


@pytest.mark.parametrize("stop_after", [1, 2, 7])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tiny: LoadedModel, tmp_path: Path, stop_after: int) -> None:
    grid = replace(GRID, lengths=(500,))
    finished: list[Record] = []

    def interrupt(record: Record) -> None:
        finished.append(record)
        if len(finished) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluation(tiny, grid, on_cell=interrupt).run(tmp_path / "cut")
    with (tmp_path / "cut" / CELLS).open("ab") as file:
        file.write(b'{"key": "torn')  # and the next cell was being written
    again: list[Record] = []
    resumed = Evaluation(tiny, grid, on_cell=again.append).run(tmp_path / "cut", resume=True)
    assert len(again) == 8 - stop_after
    assert resumed[:stop_after] == finished  # times too: they were not done again
    assert timeless(resumed) == timeless(run(tiny, tmp_path / "whole", grid))


def test_a_finished_run_resumed_computes_nothing(tiny: LoadedModel, tmp_path: Path) -> None:
    grid = replace(GRID, lengths=(500,), tasks=("needle",))
    first = run(tiny, tmp_path / "out", grid)
    again: list[Record] = []
    assert Evaluation(tiny, grid, on_cell=again.append).run(tmp_path / "out", resume=True) == first
    assert again == []


def test_a_method_can_be_added_later(tiny: LoadedModel, tmp_path: Path) -> None:
    few = replace(GRID, methods=(), lengths=(500,), tasks=("needle",))
    dense = run(tiny, tmp_path / "out", few)
    assert {r["method"] for r in dense} == {"dense"}
    both = run(tiny, tmp_path / "out", replace(few, methods=(FLEX,)), resume=True)
    together = run(tiny, tmp_path / "new", replace(few, methods=(FLEX,)))
    assert both[:2] == dense
    by_place = {(r["method"], r["seed"]): timeless(r) for r in both}
    assert by_place == {(r["method"], r["seed"]): timeless(r) for r in together}


@pytest.mark.parametrize("is_length", ["false", "true"])
def test_a_method_that_cannot_run_is_recorded_and_the_rest_goes_on(
    tiny: LoadedModel, tmp_path: Path, refusing: None, is_length: str
) -> None:
    late = f"refusing:from_tokens=600,is_length={is_length}"
    grid = replace(GRID, methods=("refusing", late, FLEX), tasks=("needle",), seeds=1)
    records = run(tiny, tmp_path / "out", grid)
    assert [(r["method"], r["length"], r.get("unsupported")) for r in records] == [
        ("dense", 500, None),
        ("refusing", 500, "refusing: not calibrated for this model"),
        (late, 500, None),
        (FLEX, 500, None),
        ("dense", 700, None),
        ("refusing", 700, "refusing: not calibrated for this model"),
        (late, 700, "refusing: not for 700 tokens"),
        (FLEX, 700, None),
    ]
    assert records[2]["kl"] == 0.0


def test_seeds_begin_where_they_are_told(tiny: LoadedModel, tmp_path: Path) -> None:
    grid = replace(GRID, methods=(), lengths=(500,), tasks=("perplexity",), seeds=4, measured_seeds=2)
    whole = {r["seed"]: r for r in run(tiny, tmp_path / "whole", grid)}
    later = run(tiny, tmp_path / "later", replace(grid, seeds=2, first_seed=1))
    assert [(r["seed"], r["measured"] is not None) for r in later] == [(1, True), (2, False)]
    assert [r["measured"]["map"] is not None for r in later if r["measured"]] == [True]  # of the first prompt there is
    for r in later:
        r["key"], whole[r["seed"]]["key"] = "", ""  # the map is part of the name
        if r["measured"]:
            r["measured"]["map"] = None
    assert all(timeless(r) == timeless(whole[r["seed"]]) for r in later)


def test_a_prompt_that_is_not_measured_is_the_same_cell_wherever_a_grid_begins(tiny: LoadedModel) -> None:
    grid = replace(GRID, lengths=(500,), tasks=("needle",), measured_seeds=0)
    one, other = Evaluation(tiny, grid), Evaluation(tiny, replace(grid, first_seed=1))
    keys = [evaluation._key(evaluation.cells[n], evaluation.entrants[0]) for evaluation, n in ((one, 1), (other, 0))]
    assert keys[0] == keys[1]


def test_the_later_of_two_calibrations_counts(tiny: LoadedModel, tmp_path: Path, refusing: None) -> None:
    grid = replace(GRID, methods=("refusing",), lengths=(500,), tasks=("needle",), seeds=1)
    assert run(tiny, tmp_path / "out", grid)[1]["unsupported"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refusing, "bind", lambda self, model: replace(self, from_tokens=10_000))
        patch.setattr(Refusing, "calibration_id", "abc")
        records = run(tiny, tmp_path / "out", grid, resume=True)
    assert [(r["method"], r["method_id"], "unsupported" in r) for r in records] == [
        ("dense", "dense@1", False), ("refusing", "refusing:from_tokens=0,is_length=False@1abc", False),
    ]  # fmt: skip


def test_depths_asked_for_are_tried_with_every_seed_where_a_task_has_them(tiny: LoadedModel, tmp_path: Path) -> None:
    records = run(tiny, tmp_path / "out", replace(GRID, methods=(), lengths=(700,), depths=(0.0, 1.0), measured_seeds=0))
    needles = [("needle", seed, depth) for seed in (0, 1) for depth in (0.0, 1.0)]
    expected = [*needles, ("perplexity", 0, None), ("perplexity", 1, None)]
    assert [(r["task"], r["seed"], r["asked_depth"]) for r in records] == expected
    assert records[0]["depth"] < 0.4 < records[1]["depth"]


def test_a_folder_with_cells_is_not_overwritten(tiny: LoadedModel, tmp_path: Path) -> None:
    grid = replace(GRID, methods=(), lengths=(500,), tasks=("needle",), seeds=1)
    run(tiny, tmp_path, grid)
    before = (tmp_path / CELLS).read_bytes()
    with pytest.raises(Conflict, match=r"--out: .*--resume"):
        run(tiny, tmp_path, grid)
    assert (tmp_path / CELLS).read_bytes() == before


def test_a_folder_of_another_model_or_machine_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    shared = environment(tiny, 0, 0)
    with Journal(tmp_path, shared, resume=False):
        pass
    for name in ("fingerprint", "device", "threads", "torch"):
        with pytest.raises(Conflict, match=f"made with {name} "):
            Journal(tmp_path, {**shared, name: "another"}, resume=True)


@pytest.mark.parametrize(
    ("changes", "option"), [({"chunk_tokens": 128}, "--chunk"), ({"tail_tokens": 64}, "--tail")], ids=["chunk", "tail"]
)
def test_a_folder_with_another_chunk_or_tail_is_refused(
    tiny: LoadedModel, tmp_path: Path, changes: dict[str, int], option: str
) -> None:
    """Else a table has one method's cells of this chunk beside another's of that one."""
    grid = replace(GRID, lengths=(500,), tasks=("needle",), seeds=1)
    run(tiny, tmp_path, grid)
    before = (tmp_path / CELLS).read_bytes()
    (value,) = changes.values()
    words = rf"--out: .*made with {option} '0', this run has '{value}'; use another folder or the same {option}"
    with pytest.raises(Conflict, match=words):
        run(tiny, tmp_path, replace(grid, methods=(), **changes), resume=True)
    assert (tmp_path / CELLS).read_bytes() == before


def test_a_damaged_line_is_named(tiny: LoadedModel, tmp_path: Path) -> None:
    with Journal(tmp_path, environment(tiny, 0, 0), resume=False):
        pass
    whole = json.dumps(PLACE | {"key": "a"})
    for damaged in ("not json", "[]", '{"key": "b"}'):
        (tmp_path / CELLS).write_text(f"{whole}\n{damaged}\n{whole}\n")
        with pytest.raises(CorruptBlock, match=r"line 2 of cells\.jsonl"):
            Journal(tmp_path, environment(tiny, 0, 0), resume=True)


@pytest.mark.parametrize("damaged", [None, "[]", "not json"])
def test_cells_of_which_nobody_says_how_they_were_made_are_not_taken(
    tiny: LoadedModel, tmp_path: Path, damaged: str | None
) -> None:
    run(tiny, tmp_path, replace(GRID, lengths=(500,), tasks=("needle",), seeds=1))
    before = (tmp_path / CELLS).read_bytes()
    (tmp_path / MANIFEST).unlink()
    if damaged is not None:
        (tmp_path / MANIFEST).write_text(damaged)
    with pytest.raises(CorruptBlock, match=MANIFEST):
        Journal(tmp_path, environment(tiny, 256, 0), resume=True)
    assert (tmp_path / CELLS).read_bytes() == before


def test_times_are_compared_with_dense_times_of_the_same_run(tiny: LoadedModel, tmp_path: Path) -> None:
    few = replace(GRID, methods=(), lengths=(500,), tasks=("needle",), seeds=1)
    run(tiny, tmp_path, few)
    cells = tmp_path / CELLS
    dense = json.loads(cells.read_text())
    cells.write_text(json.dumps(dense | {"prefill_s": 1e6, "dense_s": 1e6}) + "\n")  # the machine was busy then
    records = run(tiny, tmp_path, replace(few, methods=(FLEX,)), resume=True)
    control, flex = summarise(records)
    assert records[0]["run"] != records[1]["run"] and 0 < records[1]["dense_s"] < 1e3
    assert flex.time_ratio == pytest.approx(records[1]["prefill_s"] / records[1]["dense_s"])
    assert flex.attend_ratio is None and control.attend_ratio == pytest.approx(1.0), "attention was timed in two runs"


def test_a_full_disk_is_named_and_loses_nothing_finished(tiny: LoadedModel, tmp_path: Path) -> None:
    with Journal(tmp_path, environment(tiny, 0, 0), resume=False) as journal:
        journal.add(PLACE | {"key": "kept"})
        journal._file.close()
        journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(InvalidRequest, match=r"--out: a finished cell cannot be written.*--resume"):
            journal.add(PLACE | {"key": "lost"})
        assert list(journal.done) == ["kept"]
    with Journal(tmp_path, environment(tiny, 0, 0), resume=True) as journal:
        assert list(journal.done) == ["kept"]


def test_a_folder_that_cannot_be_written_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="--out: cannot write there"):
        run(tiny, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": ("flexprefil",)}, UnknownName, "did you mean 'flexprefill'"),
        ({"methods": ("flexprefill:gamma=-1",)}, InvalidRequest, "gamma must be above 0"),
        ({"tasks": ("nedle",)}, UnknownName, "did you mean 'needle'"),
        ({"tasks": ()}, InvalidRequest, "--tasks"),
        ({"lengths": (4096,)}, ContextTooLong, "the model takes 2048 tokens, got 4096"),
        ({"lengths": (2048,)}, ContextTooLong, "ask for at most 2036"),
        ({"lengths": (20,)}, InvalidRequest, "needle needs at least"),
        ({"lengths": (0,)}, InvalidRequest, "--lengths: each must be 1 or more"),
        ({"seeds": 0}, InvalidRequest, "--seeds"),
        ({"depths": (0.5, 1.5)}, InvalidRequest, "--depths: each must be 0 to 1"),
        ({"n_rows": 0}, InvalidRequest, "--rows"),
        ({"chunk_tokens": -1}, InvalidRequest, "--chunk"),
        ({"map_at": (99, 0)}, InvalidRequest, "--map: the model has layers 0 to 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    tiny: LoadedModel, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(tiny, tmp_path / "out", replace(GRID, **changes))
    assert not (tmp_path / "out").exists()


def test_cells_are_lines_of_json(tiny: LoadedModel, tmp_path: Path) -> None:
    records = run(tiny, tmp_path, replace(GRID, lengths=(500,), tasks=("needle",)))
    assert [json.loads(line) for line in (tmp_path / CELLS).read_text().splitlines()] == records
