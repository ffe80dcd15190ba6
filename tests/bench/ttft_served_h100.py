"""One GPU: time to first token as a user gets it, at every length: never slower than dense, and by how much faster.

    python tests/bench/ttft_served_h100.py [--methods a;b] [--lengths 1024,2048,...] [--seconds S]

Model, prompts and structured attention are those of `ttft_h100.py`. The engine is configured as it comes: the predictor may
leave layers dense, the end of a prompt is dense, chunks are as served and the recall is measured. Row
`ttft_served/<N>/<method>`: seconds from submission to result; control: dense attention over the prompt in one piece, in the
same run and the same engine, in turn with the method, in one order and then in the other: prompts of a thousand tokens wait for
the host, which is not equally fast in every minute nor in every thread. The note holds what the engine reports: density, recall,
and why passes through a layer ran sparse or dense.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()
from prefill_h100 import quietly_write, without_time
from results import Row, row
from spine_h100 import build
from ttft_h100 import ONE_PIECE, draws, seconds_of, structured

from winnow.config import KVConfig, PrefillConfig
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore
from winnow.registry import parse_spec
from winnow.types import MethodChoice
from winnow.workers.prefill.job import PrefillResult
from winnow.workers.prefill.worker import PrefillEngine


def turns_of(n: int) -> int:
    """How often each runs after a first time that is not counted: short prompts wait for the host and vary by half."""
    return 120 if n <= 1_024 else 60 if n <= 2_048 else 20 if n <= 8_192 else 4 if n <= 32_768 else 2


def measure(engine: PrefillEngine, store: SegmentStore, ids: list[int], specs: list[str]) -> list[Row]:
    """All methods at one length. Between two prompts the engine gets the configuration of the next one."""
    n = len(ids) - 1
    found: dict[str, list[float]] = {spec: [] for spec in ("dense", *specs)}
    results: dict[str, PrefillResult] = {}
    for turn in range(turns_of(n) + 1):
        for spec in found if turn % 2 else reversed(found):
            engine.config = PrefillConfig(chunk_tokens=ONE_PIECE) if spec == "dense" else PrefillConfig()
            seconds, results[spec] = seconds_of(engine, store, ids, MethodChoice(*parse_spec(spec)), 1, warm=0)
            found[spec] += seconds if turn else []
    control = found.pop("dense")
    rows = []
    for spec, seconds in found.items():
        result = results[spec]
        recall = "" if result.recall is None else f", recall {result.recall:.3f}"
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.passes.items()))
        note = f"density {result.density:.3f}{recall}; passes: {reasons}"
        rows.append(row(f"ttft_served/{n}/{spec}", seconds, "s", "dense, cuDNN, one piece", control, note))
        print(f"{rows[-1].name} {rows[-1].value:.4f} s, {rows[-1].ratio:.3f} of dense; {note}", flush=True)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default="recall:recall=0.95;recall;xattention", help="specs, separated by semicolons")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768,65536,131072")
    parser.add_argument("--seconds", type=float, default=300.0, help="wall clock after which no further length is begun")
    options = parser.parse_args()
    end, rows, specs = time.monotonic() + options.seconds, list[Row](), options.methods.split(";")
    model = build()
    spec = model.spec
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, "bf16")
    store = SegmentStore(layout, model.fingerprint, KVConfig(budget_bytes=40 << 30), "bench", 1, "here", device="cuda")
    generator = torch.Generator().manual_seed(1)
    with PrefillEngine(model, store, PrefillConfig()) as engine:
        for n in (int(x) for x in options.lengths.split(",")):
            if time.monotonic() > end:
                rows.append(without_time(f"ttft_served/{n}", specs, specs))
                continue
            ids = torch.randint(0, spec.vocab_size, (n + 1,), generator=generator).tolist()
            with structured(model.decoder, draws(n)):
                rows += measure(engine, store, ids, specs)
            quietly_write(rows, "ttft_served_h100.json")
    store.check()
    store.close()


if __name__ == "__main__":
    main()
