"""The grid of an evaluation: every method on every prompt, dense first, each finished cell kept.

For each prompt dense runs just before the others, so that the times compared lie close together. What is random comes from
seeds: an evaluation that was interrupted and resumed has the same scores as one that was not, times aside.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.errors import ContextTooLong, InvalidRequest, Overloaded, Unsupported
from winnow.orchestration.evaluation.cell import CellResult, measured_json, next_logits, run_cell
from winnow.orchestration.evaluation.journal import Journal, Record, cell_key, commit, environment
from winnow.orchestration.evaluation.prompt import Prompt
from winnow.orchestration.evaluation.summary import CONTROL
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.registry import parse_spec
from winnow.services.gateway.validation import Served, check_capabilities
from winnow.types import MethodChoice
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.base import PrefillMethod, prefill_methods


@dataclass(frozen=True)
class Grid:
    """What to evaluate.

    Attributes:
        methods, tasks: each `name` or `name:key=value,...`. Dense is added in front where it is not among the methods.
        lengths: prompt tokens.
        seeds: prompts of each task and length: seeds first_seed to first_seed + seeds - 1.
        depths: shares of the prompt at which evidence is put, each with every seed; empty = one depth a seed, drawn from it.
            Only for tasks whose evidence lies at one place.
        chunk_tokens: prefill in chunks of so many tokens, each planned by itself; 0 = in one pass.
        tail_tokens: the last tokens of a prompt, which stay dense.
        measured_seeds: attention is measured layer by layer, in a second prefill, for seeds below this.
        n_rows: query rows it is measured on.
        map_at: (layer, query head) whose attention map is kept of the first task's first prompt; None = the middle layer's
            first head.
    """

    methods: tuple[str, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    seeds: int = 2
    depths: tuple[float, ...] = ()
    chunk_tokens: int = 0
    tail_tokens: int = 0
    measured_seeds: int = 1
    n_rows: int = 64
    map_at: tuple[int, int] | None = None
    first_seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or not self.lengths:
            raise InvalidRequest("--tasks and --lengths: at least one of each is needed")
        if any(length < 1 for length in self.lengths):
            raise InvalidRequest(f"--lengths: each must be 1 or more, got {min(self.lengths)}")
        if any(not 0.0 <= depth <= 1.0 for depth in self.depths):
            raise InvalidRequest(f"--depths: each must be 0 to 1, got {', '.join(map(str, self.depths))}")
        for name, value, low in (("--seeds", self.seeds, 1), ("--chunk", self.chunk_tokens, 0), ("--tail", self.tail_tokens, 0),
                                 ("--measured-seeds", self.measured_seeds, 0), ("--rows", self.n_rows, 1)):  # fmt: skip
            if value < low:
                raise InvalidRequest(f"{name}: must be {low} or more, got {value}")


@dataclass(frozen=True)
class Entrant:
    """A method as it takes part.

    Attributes:
        method: bound to the model, unless it refuses.
        method_id: every parameter, the method's version and its calibration: what its results depend on.
        refusal: why it cannot run at all; "" = it can.
    """

    label: str
    method: PrefillMethod
    method_id: str
    refusal: str = ""


@dataclass(frozen=True)
class Cell:
    """One prompt of the grid."""

    label: str
    task: Task
    length: int
    seed: int
    asked_depth: float | None
    is_first: bool = False  # of its length: its attention map is kept, where it is measured

    @property
    def place(self) -> tuple[object, ...]:
        return (self.label, self.length, self.seed, self.asked_depth)


@dataclass
class Evaluation:
    """Runs a grid on a model.

    Args:
        on_progress: called with (cells done, cells, what comes now) before each cell, and at the end.
        on_cell: called with the record of each cell that this run finished.
        share: (i, n): of the grid's prompts, ordered by seed, the i-th and every n-th after it. Several processes evaluate a grid
            between them, each in a folder of its own; all seeds of a length and task are spread over them.
        is_timed: False = nobody will look at times (several processes use one device, say): nothing is run twice to warm up.
        command: what was typed, kept with each cell.

    Raises:
        UnknownName: no such method or task. InvalidRequest: a wrong parameter, or a length too short for a task.
        ContextTooLong: a length beyond the model.
    """

    model: LoadedModel
    grid: Grid
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None
    on_cell: Callable[[Record], None] = lambda record: None
    share: tuple[int, int] = (0, 1)
    is_timed: bool = True
    command: str = ""
    _warm: set[tuple[str, int]] = field(default_factory=set)
    _run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # times of one run are compared with each other only

    def __post_init__(self) -> None:
        self.entrants = list(self._entrants())
        self.cells = list(self._cells())
        if self.share != (0, 1):
            self.cells = sorted(self.cells, key=lambda cell: cell.seed)[self.share[0] :: self.share[1]]
        spec, grid = self.model.spec, self.grid
        self._map_at = grid.map_at or (spec.n_layers // 2, 0)
        if not (0 <= self._map_at[0] < spec.n_layers and 0 <= self._map_at[1] < spec.n_q_heads):
            raise InvalidRequest(
                f"--map: the model has layers 0 to {spec.n_layers - 1} and heads 0 to {spec.n_q_heads - 1}, "
                f"got {self._map_at[0]}:{self._map_at[1]}"
            )
        for length in (min(grid.lengths), max(grid.lengths)):  # said before anything is computed
            for cell in self.cells:
                if self.share[0] == 0 and cell.length == length and cell.seed == grid.first_seed:
                    self._prompt(cell)

    def run(self, out: Path, *, resume: bool = False) -> list[Record]:
        """Evaluate what is not finished in `out` yet.

        Returns:
            The records of the folder that count, those of earlier runs included.

        Raises:
            as `Journal`; Overloaded: the device has no memory left. Whatever ends it, finished cells are kept.
        """
        total, done = len(self.cells) * len(self.entrants), 0
        shared = environment(self.model, self.grid.chunk_tokens, self.grid.tail_tokens)
        with Journal(out, shared, resume=resume) as journal:
            for cell in self.cells:
                keys = [self._key(cell, entrant) for entrant in self.entrants]
                if all(key in journal.done for key in keys):
                    done += len(keys)
                    continue
                prompt = self._prompt(cell)
                dense: Tensor | None = None
                dense_s: float | None = None
                for entrant, key in zip(self.entrants, keys, strict=True):
                    depth = "" if cell.asked_depth is None else f" · depth {cell.asked_depth:.0%}"
                    what = f"{entrant.label} · {cell.label} · {cell.length} tokens{depth} · seed {cell.seed}"
                    self.on_progress(done, total, what)
                    done += 1
                    if key in journal.done:
                        continue
                    if entrant.label != CONTROL and not entrant.refusal and dense is None:  # dense was done by an earlier run
                        dense, dense_s = self._dense(cell, prompt)
                    record = self._record(cell, entrant, key, prompt)
                    try:
                        result = self._run(cell, entrant, prompt, dense)
                    except (Unsupported, ContextTooLong) as error:
                        if entrant.label == CONTROL:
                            raise
                        record["unsupported"] = str(error)
                    else:
                        if entrant.label == CONTROL:
                            dense, dense_s = result.logits, result.prefill_s
                        control = journal.done.get(keys[0], record)
                        record |= _figures(result, control if entrant.label != CONTROL else None, cell.task)
                        record["dense_s"] = dense_s
                    journal.add(record)
                    self.on_cell(record)
            self.on_progress(done, total, "done")
            return journal.latest()

    def _dense(self, cell: Cell, prompt: Prompt) -> tuple[Tensor, float]:
        """Dense scores of the next token, and the seconds they took now: an earlier run's say nothing of this one's machine."""
        if self.is_timed:
            self._warm_up(cell, self.entrants[0], prompt)
        began = time.perf_counter()
        logits = next_logits(self.model, prompt, self.grid.chunk_tokens, self.grid.tail_tokens)
        return logits, time.perf_counter() - began

    def _run(self, cell: Cell, entrant: Entrant, prompt: Prompt, dense: Tensor | None) -> CellResult:
        if entrant.refusal:
            raise Unsupported(entrant.refusal)
        chunk, tail = self.grid.chunk_tokens, self.grid.tail_tokens
        measured = cell.seed < self.grid.measured_seeds
        try:
            if self.is_timed:
                self._warm_up(cell, entrant, prompt)
            return run_cell(
                self.model, cell.task, prompt, entrant.method, dense_logits=dense, chunk_tokens=chunk, tail_tokens=tail,
                n_rows=self.grid.n_rows if measured else 0, map_at=self._map_at if cell.is_first else None,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise Overloaded(
                f"--lengths: the device has no memory left for {cell.length} tokens with {entrant.label}; leave that length out "
                "or give --chunk; finished cells are kept for --resume"
            ) from None

    def _warm_up(self, cell: Cell, entrant: Entrant, prompt: Prompt) -> None:
        """Whatever happens once (kernels compiled or tuned for a length, memory mapped) happens outside the clock."""
        on_cpu = self.model.decoder.device.type == "cpu"
        seen = ("", 0) if on_cpu else (entrant.label, cell.length)
        if seen not in self._warm:
            self._warm.add(seen)
            next_logits(self.model, prompt, self.grid.chunk_tokens, self.grid.tail_tokens, entrant.method)

    def _entrants(self) -> Iterator[Entrant]:
        labels = [MethodChoice(*parse_spec(text)).spec for text in self.grid.methods]
        served = Served(self.model.name, self.model.spec, self.model.dtype_name, self.model.fingerprint)
        for label in dict.fromkeys((CONTROL, *labels)):
            name, given = parse_spec(label)
            method = prefill_methods.create(name, dict(given))
            params = {f.name: str(getattr(method, f.name)) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]
            method_id = f"{MethodChoice(name, params).spec}@{method.caps.version}"
            try:
                check_capabilities("prefill", name, method.caps, served, prefill_methods)
                bound = method.bind(self.model)
                yield Entrant(label, bound, method_id + bound.calibration_id)
            except Unsupported as error:
                yield Entrant(label, method, method_id, str(error))

    def _cells(self) -> Iterator[Cell]:
        grid = self.grid
        chosen = {MethodChoice(*parse_spec(text)).spec: tasks.create(*parse_spec(text)) for text in grid.tasks}
        for length in sorted(set(grid.lengths)):
            for place, (label, task) in enumerate(chosen.items()):
                depths: Sequence[float | None] = grid.depths if grid.depths and task.has_depth else (None,)
                for seed in range(grid.first_seed, grid.first_seed + grid.seeds):
                    for depth in depths:
                        first = place == 0 and seed == grid.first_seed and depth == depths[0]
                        yield Cell(label, task, length, seed, depth, first)

    def _prompt(self, cell: Cell) -> Prompt:
        limit = self.model.spec.max_context
        if cell.length > limit:
            raise ContextTooLong(f"--lengths: the model takes {limit} tokens, got {cell.length}; ask for less")
        prompt = cell.task.make(self.model.tokenizer, cell.length, cell.seed, cell.asked_depth)
        if cell.length + prompt.max_new_tokens > limit:
            raise ContextTooLong(
                f"--lengths: {cell.label} at {cell.length} tokens and {prompt.max_new_tokens} for the answer exceed the model's "
                f"{limit}; ask for at most {limit - prompt.max_new_tokens}"
            )
        return prompt

    def _key(self, cell: Cell, entrant: Entrant) -> str:
        grid, task = self.grid, cell.task
        rows = grid.n_rows if cell.seed < grid.measured_seeds else 0
        made = (type(task).__name__, dataclasses.asdict(task), task.version)
        passes = (grid.chunk_tokens, grid.tail_tokens)
        return cell_key(entrant.method_id, made, *cell.place, *passes, rows, self._map_at if rows and cell.is_first else None)

    def _record(self, cell: Cell, entrant: Entrant, key: str, prompt: Prompt) -> Record:
        return {
            "key": key, "method": entrant.label, "method_id": entrant.method_id, "task": cell.label, "length": cell.length,
            "seed": cell.seed, "asked_depth": cell.asked_depth, "depth": prompt.depth,
            "commit": commit(), "command": self.command, "run": self._run_id,
        }  # fmt: skip


def _figures(result: CellResult, control: Record | None, task: Task) -> dict[str, Any]:
    """What a journal keeps of a result. `control`: the dense record of the same prompt, None for dense itself."""
    same = None if not task.generates else control is None or control["text"] == result.text
    return {
        "generates": task.generates,
        "score": result.score,
        "text": result.text,
        "same_answer": same,
        "prefill_s": result.prefill_s,
        "density": result.density,
        "kl": result.kl,
        "measured": None if result.measured is None else measured_json(result.measured),
    }
