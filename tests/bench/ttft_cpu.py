"""How long a real text takes on a CPU until its KV is there: every candidate default method beside dense attention.

    python tests/bench/ttft_cpu.py [--lengths 1024,...] [--methods "a;b"] [--seconds S] [--write]

The default model runs whole, through the prefill engine, with the machine's threads and dtype. Nothing is replaced: queries and
keys are those of the text. Repetitions alternate between dense and the methods, so that all see the same machine.

    ttft/<N>/<method>              as served: in chunks, the end of the prompt dense, layers left dense that would not pay
    ttft/<N>/<method>/one-piece    the same with all of the prompt in one chunk
    ttft/<N>/<method>/always       as served, but the method runs in every layer
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: two spinning threads starve the other process

import torch

sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()
from results import describe_machine, row, write

from winnow.config import PrefillConfig, WinnowConfig
from winnow.orchestration.demo.longtext import long_text
from winnow.registry import parse_spec
from winnow.types import MethodChoice, Sampling
from winnow.workers.engine import LocalEngine
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.prefill.break_even import dense_share
from winnow.workers.prefill.costs import device_kind
from winnow.workers.prefill.job import PrefillResult

LENGTHS = "1024,2048,4096,8064"
METHODS = "recall:recall=0.95;xattention"
DENSE = ("dense", "")
HOW = {
    "": PrefillConfig(),
    "one-piece": PrefillConfig(chunk_tokens=0, sparse_chunk_tokens=1 << 20),
    "always": PrefillConfig(break_even=False),
}


def text_ids(model: LoadedModel, n: int) -> list[int]:
    """The first n tokens of a real text, and one more, which an engine leaves to decoding."""
    encode = model.tokenizer.encode
    return encode(long_text(n + 64, lambda text: len(encode(text))).text)[: n + 1]


def prefilled(engine: LocalEngine, ids: list[int], method: str) -> tuple[float, PrefillResult]:
    """Wall seconds from submission to result, and the result; its KV is let go."""
    start = time.perf_counter()
    events = engine.generate(ids, Sampling(max_tokens=1), MethodChoice(*parse_spec(method)), no_cache=True)
    result = next(events)
    seconds = time.perf_counter() - start
    events.close()
    assert isinstance(result, PrefillResult)
    return seconds, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--methods", default=METHODS, help="semicolon-separated specs")
    parser.add_argument("--seconds", type=float, default=100.0, help="for a length, in which each runs twice at least")
    parser.add_argument("--write", action="store_true", help="write results/ttft_cpu.json, or ttft_cpu_amx.json")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_model("default")
    engines = {how: LocalEngine(model, WinnowConfig(prefill=config)) for how, config in HOW.items()}
    for engine in engines.values():
        engine.prefill.start()
    rows = []
    for n in map(int, options.lengths.split(",")):
        ids = text_ids(model, n)
        runs = [DENSE, *((method, how) for method in options.methods.split(";") for how in HOW)]
        seconds: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
        last: dict[tuple[str, str], PrefillResult] = {}
        prefilled(engines[""], ids, DENSE[0])
        began = time.monotonic()
        while len(seconds[DENSE]) < 2 or time.monotonic() < began + options.seconds:
            turn = len(seconds[DENSE]) % len(runs)
            for method, how in (*runs[turn:], *runs[:turn]):  # each comes after each: the one before leaves caches as it does
                took, last[method, how] = prefilled(engines[how], ids, method)
                seconds[method, how].append(took)
        for method, how in runs[1:]:
            result, name = last[method, how], "/".join(part for part in (f"ttft/{n}/{method}", how) if part)
            note = f"density {result.density:.3f}, layers left dense {dense_share(result.passes):.2f}"
            if result.recall is not None:
                note += f", recall {result.recall:.3f}"
            rows.append(row(name, seconds[method, how], "s", "dense", seconds[DENSE], note))
            print(f"{name}: {rows[-1].value:.3f} s, {rows[-1].ratio:.3f} of dense; {note}", flush=True)
    for engine in engines.values():
        engine.prefill.stop()
        engine.store.close()
    if options.write:
        amx = device_kind(model.decoder.device, model.decoder.dtype).endswith("_amx")
        write(f"ttft_cpu{'_amx' if amx else ''}.json", rows, machine=f"{describe_machine()}, {model.dtype_name}")


if __name__ == "__main__":
    main()
