"""From finished cells to one row a method and length, always beside dense on the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from winnow.orchestration.evaluation.journal import Record

CONTROL = "dense"


@dataclass(frozen=True)
class Row:
    """One method at one length. None stands for what was not measured.

    Attributes:
        prompts: prompts it was run on; unsupported: why it could not run (then nothing else is set).
        score: mean over the tasks that are answered, each task's mean counting once; dense_score: of dense on the same prompts.
        by_task: mean score of each task; of likelihood tasks the geometric mean, 1 / perplexity.
        same_answer: share of prompts whose answer is dense's, word for word.
        kl: mean KL divergence of the next-token distribution from dense's, nats; kl_max the largest.
        density, recall_mean, recall_p5, recall_min, oracle_ratio, eps: means over measured prompts, recall_min the least.
        prefill_s: median seconds to the first token; time_ratio: median of its ratio to dense's on the same prompt.
        select_ratio, attend_ratio: seconds of selection and of attention over dense's attention, on measured prompts.
    """

    method: str
    length: int
    prompts: int
    unsupported: str = ""
    score: float | None = None
    dense_score: float | None = None
    by_task: dict[str, float] = field(default_factory=dict)
    same_answer: float | None = None
    kl: float | None = None
    kl_max: float | None = None
    density: float | None = None
    recall_mean: float | None = None
    recall_p5: float | None = None
    recall_min: float | None = None
    oracle_ratio: float | None = None
    eps: float | None = None
    prefill_s: float | None = None
    time_ratio: float | None = None
    select_ratio: float | None = None
    attend_ratio: float | None = None


Place = tuple[str, int, int, float | None]


def place(record: Record) -> Place:
    """Which prompt a record is about."""
    return (record["task"], record["length"], record["seed"], record["asked_depth"])


def methods_of(records: Iterable[Record]) -> list[str]:
    """Names in the order in which they first appear, dense first."""
    return list(dict.fromkeys((CONTROL, *(record["method"] for record in records))))


def summarise(records: Sequence[Record]) -> list[Row]:
    """Rows by length, then by method in the order of the records."""
    dense = {place(record): record for record in records if record["method"] == CONTROL}
    rows = []
    for length in sorted({record["length"] for record in records}):
        for method in methods_of(records):
            mine = [r for r in records if (r["method"], r["length"]) == (method, length) and place(r) in dense]
            if mine:
                rows.append(_row(method, length, mine, dense))
    return rows


def _row(method: str, length: int, all_records: Sequence[Record], dense: dict[Place, Record]) -> Row:
    records = [record for record in all_records if "unsupported" not in record]
    if not records:
        return Row(method, length, 0, unsupported=all_records[0]["unsupported"])
    controls = [dense[place(record)] for record in records]
    pairs = list(zip(records, controls, strict=True))
    measured = [(r["measured"], c["measured"]) for r, c in pairs if r["measured"] and c["measured"]]
    overall = [own["overall"] for own, _ in measured]
    dense_attend_s = sum(sum(control["attend_s"]) for _, control in measured)

    def mean(name: str, of: Callable[[list[float]], float] = statistics.fmean) -> float | None:
        return of([values[name] for values in overall]) if overall else None

    def share(name: str) -> float | None:
        return sum(sum(own[name]) for own, _ in measured) / dense_attend_s if measured else None

    same = [record["same_answer"] for record in records if record["same_answer"] is not None]
    return Row(
        method,
        length,
        len(records),
        score=_mean_score(records),
        dense_score=_mean_score(controls),
        by_task=_by_task(records),
        same_answer=statistics.fmean(same) if same else None,
        kl=statistics.fmean(record["kl"] for record in records),
        kl_max=max(record["kl"] for record in records),
        density=statistics.fmean(record["density"] for record in records),
        recall_mean=mean("recall_mean"),
        recall_p5=mean("recall_p5"),
        recall_min=mean("recall_min", min),
        oracle_ratio=mean("oracle_ratio"),
        eps=mean("eps"),
        prefill_s=statistics.median(record["prefill_s"] for record in records),
        time_ratio=statistics.median(record["prefill_s"] / control["prefill_s"] for record, control in pairs),
        select_ratio=share("select_s"),
        attend_ratio=share("attend_s"),
    )


def _mean_score(records: Sequence[Record]) -> float | None:
    answered = _by_task([record for record in records if record["generates"]])
    return statistics.fmean(answered.values()) if answered else None


def _by_task(records: Sequence[Record]) -> dict[str, float]:
    found: dict[str, float] = {}
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        scores = [record["score"] for record in mine]
        found[task] = statistics.fmean(scores) if mine[0]["generates"] else _geometric(scores)
    return found


def _geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(value, 1e-300)) for value in values))
