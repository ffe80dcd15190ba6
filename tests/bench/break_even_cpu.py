"""What prefill methods cost on a CPU from 1K to 16K tokens, beside dense: the measurements that `fit_costs.py` fits.

    python tests/bench/break_even_cpu.py [--dtype bfloat16] [--write] [--seconds S] [--lengths 1024,2048,...]

One layer of SmolLM2's shape: 9 query and 3 KV heads of 64, synthetic (tests/unit/workloads.py) and as that model fills layers of
it from a real text (`text-<layer>`). Wall time on all cores, as served: what runs in one thread pays less
there. Dense attention, selection and the plan take turns, so that all see the same machine; run it on a quiet one.

Rows of a cell `prefill/<N>/<workload>/<method>/`, or `prefill/<N>of<M>/...` for the last chunk of N rows of M keys:
    selection_ms, attention_ms   of `plan`, and of running it, over dense attention of the same shape
    density                      kept pairs over causal pairs, over 1
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch, as in the workers

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]
from paths import ensure_importable

ensure_importable()
from results import Row, row, write
from workloads import Shape, Workload, model_like, s1_noise, s7_mixture

from winnow.orchestration.demo.longtext import long_text
from winnow.orchestration.evaluation.capture import capture, load_capture
from winnow.registry import parse_spec
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import load_model
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.prefill.costs import device_kind

LAYER = LayerSpec(0, 9, 3, 64, 64**-0.5)
CONTROL = "dense (torch's fused CPU attention)"
SPECS = (
    "flexprefill", "xattention", "prism", "flashprefill",
    "recall", "recall:recall=0.95", "recall:recall=0.9", "proxyattn", "dhsa", "hyperattention", "powerattention", "neighborhood",
    "minference:vertical_tokens=500,slash_tokens=500",
)  # fmt: skip
TEXT_LAYERS = (6, 20)
TEXT_TOKENS = 8192  # the model's context
MOST_NOISE = 4096  # longer prompts of workloads that most methods leave dense take long and tell little
CHUNKS = ((2048, 8192), (2048, 16384))
WORKLOADS: dict[str, Callable[[Shape, int], Workload]] = {"model-like": model_like, "S7": s7_mixture, "S1": s1_noise}


def read_text(n: int, dtype: str) -> dict[int, Workload]:
    """q, k and v of some layers of the default model on n tokens of real text."""
    model = load_model("default", dtype={"float32": "fp32", "bfloat16": "bf16"}[dtype], device="cpu")
    encode = model.tokenizer.encode
    ids = encode(long_text(n + 64, lambda text: len(encode(text))).text)[:n]
    with tempfile.TemporaryDirectory() as folder:
        path = capture(model, ids, TEXT_LAYERS, Path(folder) / "qkv.safetensors", text="longtext", with_raw=False)
        found = load_capture(path).layers
    return {idx: Workload(x.q[None], x.k[None], x.v[None]) for idx, x in found.items()}


def cases(lengths: list[int], dtype: str) -> Iterator[tuple[str, Workload]]:
    text = read_text(min(max(lengths), TEXT_TOKENS), dtype)
    for n in lengths:
        for idx, x in text.items():
            if n <= x.q.shape[2]:  # attention is causal: the first tokens of a longer text are a text
                yield f"{n}/text-{idx}", Workload(x.q[:, :, :n], x.k[:, :, :n], x.v[:, :, :n])
        for name, make in WORKLOADS.items():
            if n <= MOST_NOISE or name == "model-like":
                yield f"{n}/{name}", make(Shape(n, n, 1, 9, 3, 64).of_length(), 0)
        for rows, keys in CHUNKS:
            if keys == n:
                yield f"{rows}of{keys}/model-like", model_like(Shape(rows, keys, 1, 9, 3, 64).of_length(), 0)


def in_turn(*runs: Callable[[], object], repeat: int = 5, most_s: float = 2.0) -> list[list[float]]:
    """Milliseconds of each run, in turn, after one round that is not counted; two rounds at least, more until `most_s`."""
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(repeat + 1):
        for run, times in zip(runs, found, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                times.append((time.perf_counter() - start) * 1e3)
        if turn >= 2 and sum(map(sum, found)) > most_s * 1e3:
            break
    return found


def cell(at: str, spec: str, x: Workload) -> list[Row]:
    """The rows of one method on one case; none where the method leaves it dense by itself. Raises what the method raises."""
    name, params = parse_spec(spec)
    method = prefill_methods.create(name, dict(params))
    plan = method.plan(x.q, x.k, LAYER)
    if plan is None:
        return []
    dense, selection, attention = in_turn(
        lambda: attend_plan(None, x.q, x.k, x.v, scale=LAYER.scale),
        lambda: method.plan(x.q, x.k, LAYER),
        lambda: attend_plan(plan, x.q, x.k, x.v, scale=LAYER.scale),
    )
    name = f"prefill/{at}/{spec}"
    return [
        row(f"{name}/selection_ms", selection, "ms", CONTROL, dense),
        row(f"{name}/attention_ms", attention, "ms", CONTROL, dense),
        row(f"{name}/density", [plan.density()], "", "dense", [1.0]),
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--write", action="store_true", help="write results/break_even_<kind of device>.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no new cell is begun")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, options.dtype)
    end, rows = time.monotonic() + options.seconds, []
    for at, x in cases([int(n) for n in options.lengths.split(",")], options.dtype):
        x = replace(x, q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))
        for spec in SPECS:
            if time.monotonic() > end:
                break
            found = cell(at, spec, x)
            rows += found
            short = "  ".join(f"{r.name.rpartition('/')[2]} {r.value:.2f} ({r.ratio:.3f})" for r in found) or "left dense"
            print(f"{at:20} {spec:48} {short}", flush=True)
    if options.write:
        write(f"break_even_{device_kind(torch.device('cpu'), dtype)}.json", rows)


if __name__ == "__main__":
    main()
