"""From finished cells to one row a method and length, always beside dense on the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from winnow.orchestration.evaluation.journal import Record

CONTROL = "dense"  # the method that every other one stands beside


@dataclass(frozen=True)
class Row:
    """One method at one length. None stands for what was not measured.

    Attributes:
        prompts: prompts it was run on, measured: those of them on which attention was measured; unsupported: why it could not
            run (then nothing else is set).
        score: mean over the tasks that are answered, each task's mean counting once; dense_score: of dense on the same prompts.
        perplexity_ratio: perplexity over dense's on the same prompts, all likelihood tasks together; 1 = dense's.
        by_task: mean score of each task; of likelihood tasks the geometric mean, 1 / perplexity.
        same_answer: share of prompts whose answer is dense's, word for word.
        kl: mean KL divergence of the next-token distribution from dense's, nats; kl_max the largest.
        density: mean over the prompts; measured_density: over those measured, which stands beside their recall.
        recall_mean, recall_p5, recall_min, oracle_ratio, eps: means over measured prompts, recall_min the least.
        prefill_s: median seconds to the first token, prefill_range the least and the greatest.
        time_ratio: median of its ratio to dense's on the same prompt, time_range the least and the greatest.
        select_ratio, attend_ratio: seconds of selection and of attention over dense's attention, on measured prompts.
    """

    method: str
    length: int
    prompts: int
    measured: int = 0
    unsupported: str = ""
    score: float | None = None
    dense_score: float | None = None
    perplexity_ratio: float | None = None
    by_task: dict[str, float] = field(default_factory=dict)
    same_answer: float | None = None
    kl: float | None = None
    kl_max: float | None = None
    density: float | None = None
    measured_density: float | None = None
    recall_mean: float | None = None
    recall_p5: float | None = None
    recall_min: float | None = None
    oracle_ratio: float | None = None
    eps: float | None = None
    prefill_s: float | None = None
    prefill_range: tuple[float, float] | None = None
    time_ratio: float | None = None
    time_range: tuple[float, float] | None = None
    select_ratio: float | None = None
    attend_ratio: float | None = None

    @property
    def shown_density(self) -> float | None:
        """What stands beside recall: of the prompts measured, of all where none was."""
        return self.density if self.measured_density is None else self.measured_density

    @property
    def quality(self) -> float | None:
        """Of dense's on the same prompts, which are not everybody's: its score, without answers its likelihood; of a score of 0
        no share can be kept, and the score itself stands for it."""
        if self.score is not None:
            return self.score / self.dense_score if self.dense_score else self.score
        return 1 / self.perplexity_ratio if self.perplexity_ratio else None


Place = tuple[str, int, int, float | None]

# What a method must keep of dense attention to be an answer: the figure it is judged by, and the least of it.
_NEEDS: tuple[tuple[str, Callable[[Row], float | None], float], ...] = (
    ("99% of dense's score", lambda row: ratio(row.score, row.dense_score), 0.99),
    *((f"{least:.0%} of the attention mass", lambda row: row.recall_mean, least) for least in (0.99, 0.95, 0.90)),
)


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


def ratio(value: float | None, control: float | None) -> float | None:
    """Of a figure to its control's, None where there is none."""
    return value / control if value is not None and control else None


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Dense first, then the best quality first, the faster of two that are equal; what could not run last."""

    def order(row: Row) -> tuple[bool, bool, float, float]:
        return row.method != CONTROL, bool(row.unsupported), -(row.quality or 0.0), row.time_ratio or 0.0

    return sorted(rows, key=order)


def fastest(rows: Sequence[Row], length: int) -> list[tuple[str, Row | None]]:
    """The answer of an evaluation: what a method must keep, and the fastest method that keeps it at this length.

    Only what was measured is asked; None = no method keeps that much. Dense keeps everything and is not among the methods, nor
    is one that read every key at this length: its time is dense's, and a difference is noise.
    """
    rivals = [row for row in rows if row.length == length and row.method != CONTROL and round(row.density or 0.0, 3) < 1]
    rivals = [row for row in rivals if not row.unsupported]
    found: list[tuple[str, Row | None]] = []
    for need, figure, least in _NEEDS:
        known = [(value, row) for row in rivals if (value := figure(row)) is not None]
        if known:
            kept = [row for value, row in known if value >= least]
            found.append((need, min(kept, key=lambda row: row.time_ratio or math.inf, default=None)))
    return found


def verdict(row: Row | None, dense: Row) -> tuple[str, str]:
    """What to use at an operating point, and why: the fastest method's prefill time over dense's, median and range.

    The two are not told apart where the range holds 1, or where dense's own times, of prompts of one length, lie further apart.
    """
    if row is None or row.time_ratio is None or row.time_range is None or dense.prefill_range is None:
        return "dense", "no method that skips keys keeps that much"
    low, high = (round(time, 2) for time in row.time_range)  # as they are shown
    why = f"{row.time_ratio:.2f} times dense ({low:.2f} to {high:.2f})"
    quickest, slowest = dense.prefill_range
    if low <= 1 <= high or max(row.time_ratio, 1 / row.time_ratio) <= slowest / quickest:
        return f"dense or {row.method}", why
    return (row.method, why) if high < 1 else ("dense", f"next {row.method}: {why}")


def kl_text(value: float) -> str:
    """A divergence with four decimals; one that these cannot show is not shown as 0."""
    return "<0.0001" if 0 < value < 1e-4 else f"{value:.4f}" if value else "0"


def _row(method: str, length: int, all_records: Sequence[Record], dense: dict[Place, Record]) -> Row:
    records = [record for record in all_records if "unsupported" not in record]
    if not records:
        return Row(method, length, 0, unsupported=all_records[0]["unsupported"])
    controls = [dense[place(record)] for record in records]
    pairs = list(zip(records, controls, strict=True))
    measured = [(r["measured"], c["measured"]) for r, c in pairs if r["measured"] and c["measured"]]
    overall = [own["overall"] for own, _ in measured]
    at_once = [(r["measured"], c["measured"]) for r, c in pairs if r["measured"] and c["measured"] and r["run"] == c["run"]]
    dense_attend_s = sum(sum(control["attend_s"]) for _, control in at_once)

    def mean(name: str, of: Callable[[list[float]], float] = statistics.fmean) -> float | None:
        return of([values[name] for values in overall]) if overall else None

    def share(name: str) -> float | None:
        return sum(sum(own[name]) for own, _ in at_once) / dense_attend_s if at_once else None

    likely = [(r["score"], c["score"]) for r, c in pairs if not r["generates"]]
    times = [record["prefill_s"] for record in records]
    ratios = [record["prefill_s"] / record["dense_s"] for record in records]
    same = [record["same_answer"] for record in records if record["same_answer"] is not None]
    return Row(
        method,
        length,
        len(records),
        measured=len(measured),
        score=_mean_score(records),
        dense_score=_mean_score(controls),
        perplexity_ratio=_geometric([c for _, c in likely]) / _geometric([own for own, _ in likely]) if likely else None,
        by_task=_by_task(records),
        same_answer=statistics.fmean(same) if same else None,
        kl=statistics.fmean(record["kl"] for record in records),
        kl_max=max(record["kl"] for record in records),
        density=statistics.fmean(record["density"] for record in records),
        measured_density=mean("density"),
        recall_mean=mean("recall_mean"),
        recall_p5=mean("recall_p5"),
        recall_min=mean("recall_min", min),
        oracle_ratio=mean("oracle_ratio"),
        eps=mean("eps"),
        prefill_s=statistics.median(times),
        prefill_range=(min(times), max(times)),
        time_ratio=statistics.median(ratios),
        time_range=(min(ratios), max(ratios)),
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
