"""Every prefill method beside dense attention on the same prompts of a real model: task scores, perplexity, recall, density, KL.

    python tests/bench/quality.py --shards 14 --seconds 150 --out quality      # on a GPU machine
    python tests/bench/quality.py --only-collect --out quality                 # the rows of what is finished, again

Four rounds, in this order: one prompt a length of a few tasks on which attention is measured; the slow methods on these; some
seeds of all tasks with all others; then more seeds with the finalists, those that may become the default. Each method stands
beside dense on the very prompts it was run on, so rows differ in n.

Prompts are read as served on a CPU: in chunks, the end of each prompt dense.

Prompts are shared out to processes of their own (`Evaluation.share`), because one prompt keeps a GPU busy for a small part of
its time; so times mean nothing here, and no report is written. Processes stop before the first cell that they would begin
after `--seconds`. A method that breaks is reported and left out of the rest. With `--out` a later call goes on with what is
there.

Rows, one set a length and one over all lengths, means and not medians:

    quality/<N>/<method>/score       mean over tasks of the mean score, 0 to 1            control: dense
    quality/<N>/<method>/perplexity  of the last tokens of real texts                     control: dense
    quality/<N>/<method>/recall      attention mass kept, sampled rows, all heads         control: dense, 1
    quality/<N>/<method>/density     (query, key) pairs read over causal pairs            control: dense, 1
    quality/<N>/<method>/kl          KL(dense || method) of the next token, nats          control: every tile read

The control of a KL divergence is what rounding alone makes of it: dense attention through the sparse kernel, all tiles read.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not keep forks from using it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()
import torch
from results import Row, command_line, write

from winnow.config import PrefillConfig
from winnow.orchestration.evaluation.journal import Record, read_folder
from winnow.orchestration.evaluation.runner import CONTROL, Evaluation, Grid
from winnow.orchestration.evaluation.summary import place
from winnow.orchestration.evaluation.task import tasks
from winnow.registry import parse_spec
from winnow.workers.model.loader import load_model
from winnow.workers.prefill.prompt import sparse_chunk_tokens

EVERY_TILE = "flashprefill:alpha=0"
HYPER = "hyperattention:min_seq_len=1024,block=128,samples=128"  # its defaults estimate nothing of 8,192 tokens
METHODS = (
    "dhsa", "dhsa-v1", "duoattention", HYPER, f"{HYPER},dense_layers=22",
    "minference", "neighborhood", "powerattention", "proxyattn", "sale",
    "seerattention", "flexprefill", "flexprefill:gamma=0.98", "xattention", "xattention:threshold=0.98", "flashprefill",
    "flashprefill:alpha=0.02", EVERY_TILE, "prism", "prism:threshold=0.98",
    "recall:recall=0.9", "recall:recall=0.95", "recall:recall=0.98", "recall",
)  # fmt: skip
SLOW = ("sea",)  # reads keys one by one, which no fast path does: seconds a prompt
SLOW_TOKENS = 4096  # the longest prompts they get
FINALISTS = (
    "recall:recall=0.95", "recall:recall=0.98", "recall", "sale", "seerattention", "dhsa", "flexprefill:gamma=0.98",
    "xattention:threshold=0.98", "flashprefill:alpha=0.02", "prism:threshold=0.98",
)  # fmt: skip
# Tasks that the default model can do (counting words it cannot, and of three numbers under one name it says one) and whose
# answers are short: a long one spends its time on decoding, which no prefill method touches.
TASKS = ("needle", "multi-key", "key-value", "questions", "questions:kind=default", "perplexity")
MEASURED_TASKS = ("needle", "questions", "perplexity")
LENGTHS = (2048, 4096, 8064)  # the model reads 8192, answers included


class _Late(Exception):
    """No time is left to begin another cell."""


def rounds(args: argparse.Namespace) -> Iterator[Grid]:
    """What is evaluated, in order."""
    lengths, tasks = tuple(args.lengths), tuple(args.tasks)
    measured = tuple(task for task in tasks if task in MEASURED_TASKS) or tasks[:1]
    if args.methods:
        yield Grid(
            tuple(args.methods), lengths, measured, seeds=1, measured_seeds=1, chunk_tokens=args.chunk, tail_tokens=args.tail
        )
    short = tuple(length for length in lengths if length <= SLOW_TOKENS)
    if args.slow and short:
        yield Grid(tuple(args.slow), short, measured, seeds=1, measured_seeds=1, chunk_tokens=args.chunk, tail_tokens=args.tail)
    if args.methods and args.seeds:
        yield Grid(
            tuple(args.methods),
            lengths,
            tasks,
            seeds=args.seeds,
            first_seed=1,
            measured_seeds=0,
            chunk_tokens=args.chunk,
            tail_tokens=args.tail,
        )
    if args.finalists and args.final_seeds:
        yield Grid(
            tuple(args.finalists), lengths, tasks, seeds=args.final_seeds, first_seed=1 + args.seeds, measured_seeds=0,
            chunk_tokens=args.chunk, tail_tokens=args.tail,
        )  # fmt: skip


def evaluate(args: argparse.Namespace, shard: int) -> None:
    """One process's share of all rounds, into a folder of its own."""
    torch.set_num_threads(1)
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    now = ""

    def on_progress(done: int, total: int, what: str) -> None:
        nonlocal now
        now = what
        if time.time() > args.deadline:
            raise _Late

    broken: set[str] = set()
    for grid in rounds(args):
        while True:
            methods = [method for method in grid.methods if method not in broken]
            turn = shard % max(1, len(methods))  # so that processes compile different kernels first, not all the same
            mine = replace(grid, methods=(*methods[turn:], *methods[:turn]))
            try:
                Evaluation(model, mine, on_progress, share=(shard, args.shards), is_timed=False).run(
                    args.out / f"shard-{shard}", resume=True
                )
                break
            except _Late:
                return
            except Exception:
                print(f"shard {shard}, {now}:", flush=True)
                traceback.print_exc()
                found = next((method for method in methods if now.startswith(f"{method} ")), None)
                if found is None:
                    raise
                broken.add(found)


def run_shards(args: argparse.Namespace) -> None:
    """All processes, at once. They are forks of this one, which has everything imported and has not touched the GPU."""
    model = load_model(args.model, dtype="bf16", device="cpu")
    for name in args.tasks:  # texts are read once
        tasks.create(*parse_spec(name)).make(model.tokenizer, min(args.lengths), 0)
    del model
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=evaluate, args=(args, shard)) for shard in range(args.shards)]
    for process in running:
        process.start()
    left = args.deadline + args.grace
    for process in running:
        process.join(None if math.isinf(left) else max(0.0, left - time.time()))
        process.terminate()  # in the middle of a cell that takes too long; a finished process is not touched
        process.join()
    failed = [shard for shard, process in enumerate(running) if process.exitcode]
    if failed:
        print(f"shards that failed: {failed}; what they finished counts", flush=True)


def collect(out: Path) -> tuple[dict[str, str], list[Record]]:
    """Environment and records of all shards."""
    folders = sorted(out.glob("shard-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    found = [read_folder(folder) for folder in folders]
    return found[0][0], [record for _, records in found for record in records]


def rows_of(records: Sequence[Record], methods: Iterable[str]) -> list[Row]:
    """The rows of each length, and over all lengths, each length counting once."""
    lengths = sorted({record["length"] for record in records})
    rows: list[Row] = []
    for method in methods:
        by_length = {length: [r for r in records if r["length"] == length] for length in lengths}
        for length, mine in by_length.items():
            rows += _rows(f"quality/{length}/{method}", mine, method)
        if len(lengths) > 1:
            rows += _rows(f"quality/all/{method}", records, method)
    return rows


def _rows(name: str, records: Sequence[Record], method: str) -> list[Row]:
    mine = {place(r): r for r in records if r["method"] == method and "unsupported" not in r}
    controls = {place(r): r for r in records if r["method"] == CONTROL and place(r) in mine}
    mine = {at: record for at, record in mine.items() if at in controls}
    every_tile = {place(r): r for r in records if r["method"] == EVERY_TILE and place(r) in mine}
    if not mine:
        return []
    rows = []
    answered = [at for at, record in mine.items() if record["generates"]]
    if answered:
        rows.append(_score_row(f"{name}/score", [mine[at] for at in answered], [controls[at] for at in answered]))
    texts = [at for at, record in mine.items() if not record["generates"]]
    if texts:
        own, dense = ([-math.log(side[at]["score"]) for at in texts] for side in (mine, controls))
        value, control = (math.exp(statistics.fmean(losses)) for losses in (own, dense))
        drift, error = _mean_and_error([a - b for a, b in zip(own, dense, strict=True)])
        rows.append(_row(f"{name}/perplexity", value, "", CONTROL, control, [math.exp(x) for x in own],
                         f"loss {drift:+.4f}{_plus_minus(error, 4)} nats beside dense"))  # fmt: skip
    measured = [record["measured"]["overall"] for record in mine.values() if record["measured"]]
    if measured:
        recalls = [overall["recall_mean"] for overall in measured]
        lowest = f"5th percentile of rows {statistics.fmean(overall['recall_p5'] for overall in measured):.3f}"
        rows.append(_row(f"{name}/recall", statistics.fmean(recalls), "", CONTROL, 1.0, recalls, lowest))
    densities = [record["density"] for record in mine.values()]
    rows.append(_row(f"{name}/density", statistics.fmean(densities), "", CONTROL, 1.0, densities, ""))
    floor = statistics.fmean(record["kl"] for record in every_tile.values()) if every_tile else 0.0
    if method != CONTROL and floor > 0:
        divergences = [mine[at]["kl"] for at in every_tile]
        rows.append(_row(f"{name}/kl", statistics.fmean(divergences), "nats", "every tile read", floor, divergences,
                         f"median {statistics.median(divergences):.2g}"))  # fmt: skip
    return [row for row in rows if row is not None]


def _score_row(name: str, mine: Sequence[Record], controls: Sequence[Record]) -> Row | None:
    """Lengths and tasks count once each; the spread is that of the seeds' own means."""
    kinds = sorted({(record["length"], record["task"]) for record in mine})
    value, control = (_by_kind(records) for records in (mine, controls))
    gaps = {kind: [a["score"] - b["score"] for a, b in zip(mine, controls, strict=True) if (a["length"], a["task"]) == kind]
            for kind in kinds}  # fmt: skip
    errors = [_mean_and_error(gap)[1] for gap in gaps.values()]
    error = math.sqrt(sum(e * e for e in errors)) / len(kinds)
    seeds = [_by_kind([r for r in mine if r["seed"] == seed]) for seed in sorted({r["seed"] for r in mine})]
    tasks = ", ".join(
        f"{task} {statistics.fmean(r['score'] for r in mine if r['task'] == task):.3f}" for task in sorted({t for _, t in kinds})
    )
    note = f"{value - control:+.3f}{_plus_minus(error, 3)} beside dense; {tasks}"
    return _row(name, value, "", CONTROL, control, seeds, note, n=len(mine))


def _by_kind(records: Sequence[Record]) -> float:
    kinds: dict[tuple[int, str], list[float]] = {}
    for record in records:
        kinds.setdefault((record["length"], record["task"]), []).append(record["score"])
    return statistics.fmean(statistics.fmean(scores) for scores in kinds.values())


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; nan where there is one value only."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _plus_minus(error: float, digits: int) -> str:
    """Nothing where one value says nothing about the error."""
    return "" if math.isnan(error) else f" ± {error:.{digits}f}"


def _row(
    name: str, value: float, unit: str, control: str, control_value: float, repeated: Sequence[float], note: str, n: int = 0
) -> Row | None:
    """None where the control is 0 and says nothing."""
    if not control_value:
        return None
    spread = (max(repeated) - min(repeated)) / value if value else 0.0
    return Row(name=name, value=value, unit=unit, control=control, control_value=control_value, ratio=value / control_value,
               n=n or len(repeated), spread=spread, note=note)  # fmt: skip


def commands(args: argparse.Namespace) -> list[str]:
    """All calls that filled the folder, this one last; they are kept in it."""
    kept = args.out / "commands"
    known = kept.read_text().splitlines() if kept.is_file() else []
    if not args.only_collect:
        known.append(command_line())
        kept.write_text("\n".join(known) + "\n")
    return known


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the finished prompts (default: a temporary one)")
    parser.add_argument("--shards", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds for the cells under way then")
    parser.add_argument("--seeds", type=int, default=2, help="prompts of a task and length for every method")
    parser.add_argument("--final-seeds", type=int, default=20, help="most of them for the finalists besides")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--slow", nargs="*", default=SLOW)
    parser.add_argument("--finalists", nargs="*", default=FINALISTS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument(
        "--chunk",
        type=int,
        default=sparse_chunk_tokens(PrefillConfig(), torch.device("cpu")),
        help="of prefill; 0 = a prompt in one piece",
    )
    parser.add_argument("--tail", type=int, default=PrefillConfig().dense_tail_tokens, help="last tokens, which stay dense")
    parser.add_argument("--model", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only-collect", action="store_true", help="compute nothing, write the rows of what is finished")
    parser.add_argument("--name", default="quality", help="of the result file")
    args = parser.parse_args(arguments)
    args.out = args.out or Path(tempfile.mkdtemp(prefix="winnow-quality-"))
    args.deadline = time.time() + args.seconds
    return args


def main() -> None:
    args = parse()
    if not args.only_collect:
        run_shards(args)
    shared, records = collect(args.out)
    methods = list(dict.fromkeys((CONTROL, *args.methods, *args.slow, *(record["method"] for record in records))))
    machine = f"{shared['device']}, {shared['dtype']}, {shared['model']}"
    write(f"{args.name}.json", rows_of(records, methods), machine, " && ".join(commands(args)))
    refused = sorted({(r["method"], r["unsupported"]) for r in records if "unsupported" in r})
    print(f"{len(records)} cells; refused: {refused or 'none'}")


if __name__ == "__main__":
    main()
