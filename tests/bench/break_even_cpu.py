"""What prefill methods cost on a CPU from 1K to 16K tokens, beside dense: the measurements that `fit_costs.py` fits.

    OMP_NUM_THREADS=1 python tests/bench/break_even_cpu.py [--write] [--seconds S] [--lengths 1024,2048,...]

One layer of SmolLM2's shape: 9 query and 3 KV heads of 64, float32, one thread. Times are processor time of that thread, so
that other processes on the machine disturb them little; a run's dense control is repeated between the methods.

Rows of a cell `prefill/<N>/<workload>/<method>/`, or `prefill/<N>of<M>/...` for the last chunk of N rows of M keys:
    selection_ms, attention_ms   of `plan`, and of running it, over dense attention of the same shape
    density                      kept pairs over causal pairs, over 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: processor time of one thread is then the work

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]
from paths import ensure_importable

ensure_importable()
from results import Row, row, write
from workloads import Shape, Workload, model_like, s1_noise, s7_mixture

from winnow.registry import parse_spec
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.prefill.base import prefill_methods

LAYER = LayerSpec(0, 9, 3, 64, 64**-0.5)
CONTROL = "dense (torch's fused CPU attention)"
SPECS = (
    "flexprefill", "xattention", "xattention:stride=16", "prism", "flashprefill", "flashprefill:dense_tail=0",
    "recall:recall=0.98", "recall:recall=0.9", "proxyattn", "dhsa", "hyperattention", "powerattention", "neighborhood",
    "minference:vertical_tokens=500,slash_tokens=500",
)  # fmt: skip
CHUNKS = ((2048, 8192), (2048, 16384))
WORKLOADS: dict[str, Callable[[Shape, int], Workload]] = {"model-like": model_like, "S7": s7_mixture, "S1": s1_noise}


def cases(lengths: list[int]) -> Iterator[tuple[str, Workload]]:
    for n in lengths:
        for name, make in WORKLOADS.items():
            yield f"{n}/{name}", make(Shape(n, n, 1, 9, 3, 64).of_length(), 0)
    for n, m in CHUNKS:
        if m <= max(lengths):
            yield f"{n}of{m}/model-like", model_like(Shape(n, m, 1, 9, 3, 64).of_length(), 0)


def timed_ms(run: Callable[[], object], repeat: int = 3) -> list[float]:
    """Milliseconds of this thread; two calls where one takes more than a second."""
    found: list[float] = []
    while len(found) < repeat and (len(found) < 2 or sum(found) < 2000):
        start = time.thread_time()
        run()
        found.append((time.thread_time() - start) * 1e3)
    return found


def cell(at: str, spec: str, x: Workload, dense: list[float]) -> list[Row]:
    """The rows of one method on one case; none where the method leaves it dense by itself. Raises what the method raises."""
    name, params = parse_spec(spec)
    method = prefill_methods.create(name, dict(params))
    plan = method.plan(x.q, x.k, LAYER)
    if plan is None:
        return []
    selection = timed_ms(lambda: method.plan(x.q, x.k, LAYER))
    attention = timed_ms(lambda: attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale))
    name = f"prefill/{at}/{spec}"
    return [
        row(f"{name}/selection_ms", selection, "ms", CONTROL, dense),
        row(f"{name}/attention_ms", attention, "ms", CONTROL, dense),
        row(f"{name}/density", [plan.density()], "", "dense", [1.0]),
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="write results/break_even_cpu.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no new cell is begun")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    options = parser.parse_args()
    torch.set_num_threads(1)
    end, rows = time.monotonic() + options.seconds, []
    for at, x in cases([int(n) for n in options.lengths.split(",")]):
        dense = timed_ms(lambda x=x: attend_plan(None, x.q, x.k, x.v, scale=LAYER.scale), 5)  # type: ignore[misc]
        for spec in SPECS:
            if time.monotonic() > end:
                break
            found = cell(at, spec, x, dense)
            rows += found
            short = "  ".join(f"{r.name.rpartition('/')[2]} {r.value:.2f} ({r.ratio:.3f})" for r in found) or "left dense"
            print(f"{at:20} dense {statistics.median(dense):8.1f} ms  {spec:48} {short}", flush=True)
    if options.write:
        write("break_even_cpu.json", rows)


if __name__ == "__main__":
    main()
