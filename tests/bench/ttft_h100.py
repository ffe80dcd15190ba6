"""One GPU: how long a prompt takes from its submission until its KV is there, dense and with each candidate default method.

    python tests/bench/ttft_h100.py [--seconds S] [--methods a,b] [--lengths 131072,32768,65536] [--chunk C]

The model is 8B-shaped (32 layers, hidden 4096, MLP 14336, 32 query and 8 KV heads of 128, bf16) and runs whole, through the
prefill engine: embeddings, norms, all linear layers, RoPE, KV written to a segment, selection, attention. Its weights are random,
so its own queries and keys would match nothing: attention over them is flat, and no method could leave anything out. **In each
layer q and k are therefore replaced, after they were computed, by those of the seeded workload `model_like`** (sink, near keys,
and columns, a slash or topics by head; tests/unit/workloads.py), of the same shapes and strides; layers take turns with four
draws. v is the model's own. Dense attention gets the same q and k. What is measured is so the real amount of work of every part,
at the sparsity this workload allows; a real text allows more or less.

A method runs in chunks as served (`prefill.sparse_chunk_tokens`, or --chunk), at the cheapest setting of its ladder (`LADDERS`)
whose mean recall, over sampled rows of all query heads of the four draws at that length, reaches 0.95; where none does, at the
last, and the note says so. Row `ttft/<N>/<method>`: seconds from submission to result, control: the same without a method, cuDNN
attention, in the same run. The note holds setting, recall, density, and what selection and attention take in one layer.
`ttft/<N>/<method>/chunk-<C>` and `.../one-piece`: the first method in other chunks (`--chunks`), longest prompt. Larger ones
are chosen for fewer times and with more rows to choose among; the KV of smaller ones serves more prompts.
`ttft/<N>/ran`: how many methods there was time for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()
from prefill_h100 import Case, Queue, compared, failed, in_memory_order, quietly_write, run_plan, without_time
from results import Row, row
from spine_h100 import build, wait
from workloads import Shape, model_like

from winnow.config import KVConfig, PrefillConfig
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore
from winnow.registry import parse_spec
from winnow.workers.attention.backend import RawQK
from winnow.workers.model.decoder import Decoder, Step
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.backend import PrefillBackend
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.job import PrefillJob, PrefillResult
from winnow.workers.prefill.prompt import sparse_chunk_tokens
from winnow.workers.prefill.worker import PrefillEngine

ONE_PIECE = 1 << 20  # tokens of a pass: how dense attention is fastest
DRAWS = 4
RECALL = 0.95
LADDERS: dict[str, tuple[str, ...]] = {  # the most promising first: where time runs out, the last are left out
    "recall": ("recall:recall=0.95", "recall:recall=0.96", "recall:recall=0.97"),
    "xattention": tuple(f"xattention:threshold={x}" for x in (0.9, 0.91, 0.93, 0.95)),
    "flashprefill": tuple(f"flashprefill:alpha={x}" for x in (0.01, 0.007, 0.003, 0.0018, 0.001)),
    "minference": tuple(f"minference:vertical_tokens=1000,slash_tokens={x}" for x in (800, 6096, 16000)),
    "flexprefill": tuple(f"flexprefill:gamma={x}" for x in (0.9, 0.95, 0.98)),
    "prism": tuple(f"prism:threshold={x}" for x in (0.9, 0.95, 0.98)),
}


@dataclass(frozen=True, eq=False)
class Draw:
    """q [Hq, N, D] and k [Hkv, N, D] that some layers are given, laid out as the model's own."""

    q: Tensor
    k: Tensor


def draws(n: int) -> list[Draw]:
    made = []
    for seed in range(DRAWS):
        x = model_like(Shape(n, n, 1, 32, 8, 128, device="cuda").of_length(), seed)
        made.append(Draw(in_memory_order(x.q)[0], in_memory_order(x.k)[0]))
    return made


@contextmanager
def structured(decoder: Decoder, bank: list[Draw]) -> Iterator[None]:
    """All layers' token mixers project as ever, and attend with a draw's q and k of the chunk in place of what they got."""

    def mix(own: Draw, idx: int, x: Tensor, step: Step) -> Tensor:
        heads, backend = decoder.project(idx, x, step.ropes), step.backend
        assert isinstance(backend, PrefillBackend)
        q, k = (t[:, backend.start : backend.start + x.shape[0]] for t in (own.q, own.k))
        assert heads.q.shape == q.shape, f"made for {list(own.q.shape)}, got {list(heads.q.shape)} at {backend.start}"
        mixed = backend.attend(decoder.spec.layers[idx], q, k, heads.v, RawQK(heads.raw_q, heads.raw_k))
        return decoder.project_out(idx, mixed.transpose(0, 1).reshape(x.shape[0], -1))

    before = decoder.mixers
    decoder.mixers = [partial(mix, bank[idx % len(bank)]) for idx in range(decoder.spec.n_layers)]
    try:
        yield
    finally:
        decoder.mixers = before


def operating_point(
    ladder: tuple[str, ...], model: LoadedModel, bank: list[Draw], chunk: int, queue: Queue
) -> tuple[PrefillMethod, str]:
    """The first setting that reaches RECALL when each chunk is planned by itself, and the note of its row."""
    layer, note = model.spec.layers[0], ""
    for spec in ladder:
        name, params = parse_spec(spec)
        method = prefill_methods.create(name, dict(params)).bind(model)
        recalled = kept = causal = selection = attention = 0.0
        for own in bank:
            n = own.q.shape[1]
            for start in range(0, n, chunk):
                end = min(start + chunk, n)
                case = Case("", layer, own.q[None, :, start:end], own.k[None, :, :end], own.k[None, :, :end])
                plan = method.plan(case.q, case.k, layer)
                pairs = (end - start) * (start + end + 1) / 2
                share = 1.0
                if plan is not None:
                    share = float(compared(case, plan, run_plan(plan, case)).recall.mean())
                recalled += share * (end - start) / n / len(bank)
                kept += pairs * (plan.density() if plan is not None else 1.0)
                causal += pairs
                if own is bank[-1]:
                    for_rows = partial(queue.ms, rows=end - start, n=3)
                    selection += statistics.median(for_rows(partial(method.plan, case.q, case.k, layer)))
                    attention += statistics.median(for_rows(partial(run_plan, plan, case)))
        if kept == causal:
            return method, f"{spec}: left dense"
        note = (
            f"{spec} in chunks of {min(chunk, n)}: recall {recalled:.3f}, density {kept / causal:.3f}, a layer's selection "
            f"{selection:.1f} ms and attention {attention:.1f} ms"
        )
        print(f"    {note}", flush=True)
        if recalled >= RECALL:
            return method, note
    return method, f"{note}; no setting tried reaches a recall of {RECALL}"


def seconds_of(
    engine: PrefillEngine, store: SegmentStore, ids: list[int], method: Any, n: int, warm: int = 1
) -> tuple[list[float], PrefillResult]:
    """Wall seconds of n prompts after `warm` that are not counted, and the last result."""
    found = []
    for _ in range(n + warm):
        start = time.perf_counter()
        result = wait(engine.submit, PrefillJob("bench", ids, method=method, no_cache=True))[-1]
        found.append(time.perf_counter() - start)
        assert isinstance(result, PrefillResult)
        store.release(result.segment)
    return found[warm:], result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=200.0, help="wall clock after which what is left is skipped")
    parser.add_argument("--methods", default=",".join(LADDERS))
    parser.add_argument("--lengths", default="32768,131072,65536")
    parser.add_argument("--chunks", default="", help="others for the first method at the longest prompt; 0 = in one piece")
    parser.add_argument("--chunk", type=int, default=0, help="tokens that a method plans at a time (0 = as served)")
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    model = build()
    spec = model.spec
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, "bf16")
    store = SegmentStore(layout, model.fingerprint, KVConfig(budget_bytes=40 << 30), "bench", 1, "here", device="cuda")
    rows, queue = list[Row](), Queue()
    dense = prefill_methods.create("dense", {})
    generator = torch.Generator().manual_seed(1)
    # each method runs in every layer, also where dense is faster
    config = PrefillConfig(chunk_tokens=ONE_PIECE, sparse_chunk_tokens=options.chunk, break_even=False)
    with PrefillEngine(model, store, config) as engine:
        for n in (4_096, 8_192):  # kernels are compiled for one length, then for any
            seconds_of(engine, store, torch.randint(0, spec.vocab_size, (n + 1,), generator=generator).tolist(), dense, 0)
        names = options.methods.split(",")
        lengths = [int(x) for x in options.lengths.split(",")]
        for i, n in enumerate(lengths):
            left = end - time.monotonic()
            if left < 0:
                rows.append(without_time(f"ttft/{n}", names, names))
                continue
            own_end = time.monotonic() + left * n / sum(lengths[i:])  # each length gets time by its size
            ids = torch.randint(0, spec.vocab_size, (n + 1,), generator=generator).tolist()
            bank = draws(n)
            repeats = 2 if i else 3
            chunks = [int(x) for x in options.chunks.split(",") if x] if n == max(lengths) else []
            wanted = [(f"ttft/{n}/{names[0]}", names[0], config)]
            for chunk in chunks:
                what = f"chunk-{chunk}" if chunk else "one-piece"
                other = config.model_copy(update={"sparse_chunk_tokens": chunk or ONE_PIECE})
                wanted.append((f"ttft/{n}/{names[0]}/{what}", names[0], other))
            wanted += [(f"ttft/{n}/{name}", name, config) for name in names[1:]]
            with structured(model.decoder, bank):
                control, _ = seconds_of(engine, store, ids, dense, repeats)
                print(f"{n}: dense {[round(x, 3) for x in control]} s", flush=True)
                skipped = []
                for at, name, own in wanted:
                    if time.monotonic() > own_end:
                        skipped.append(at.removeprefix(f"ttft/{n}/"))
                        continue
                    try:
                        chunk = sparse_chunk_tokens(own, model.decoder.device)
                        method, note = operating_point(LADDERS[name], model, bank, chunk, queue)
                        with PrefillEngine(model, store, own) as sparse:
                            seconds, result = seconds_of(sparse, store, ids, method, repeats)
                    except Exception as error:  # one method that fails ends itself only
                        rows.append(failed(at, f"{type(error).__name__}: {error}"))
                        print(f"  {at} failed: {error}", flush=True)
                        continue
                    if result.recall is not None:
                        note += f"; the engine's own measure of recall {result.recall:.3f}, density {result.density:.3f}"
                    found = row(at, seconds, "s", "dense, cuDNN", control, note)
                    print(f"  {at} {found.value:.3f} s, {1 / found.ratio:.2f} times as fast; {note}", flush=True)
                    rows.append(found)
            if skipped:
                rows.append(without_time(f"ttft/{n}", [at for at, _, _ in wanted], skipped))
            del bank
            if not options.no_write:
                quietly_write(rows, "ttft_h100.json")
    store.check()
    store.close()


if __name__ == "__main__":
    main()
