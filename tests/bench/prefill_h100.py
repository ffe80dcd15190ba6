"""One GPU: what every prefill method selects, what that holds, and what it costs, beside cuDNN's dense attention.

    python tests/bench/prefill_h100.py [--seconds S] [--methods "a;b"] [--lengths 32768,...] [--capture FILE --config DIR]
    python tests/bench/prefill_h100.py --lengths "" --capture FILE --name prefill_capture_cpu    # real layers, on any machine

q, k and v have the shape of one layer of an 8B Llama (32 query and 8 KV heads of 128, bf16, batch 1) and the structure of the
synthetic workloads of tests/unit/workloads.py, seeded, with matches as strong and topics as long whatever the length
(`Shape.of_length`). S5 and S6 hold noise that no sparse plan can keep: half of each row of S5, all rows of S6 but the last ones.
With --capture also layers of a real model, a file of `winnow capture`, named `prefill/captured-<N>/layer<i>/...`; --config is
the folder of that model's config.json, with which methods find what was calibrated for it.

Times are taken as the engine has them: each call is queued behind a layer's linear work (`Queue`), so that what the host takes
to launch it counts only as far as the device would have to wait for it.

Rows of a cell `prefill/<N>/<workload>/<method>/`:
    selection_ms   time of `plan`, lists included, over cuDNN dense attention of the same shape in the same run
    attention_ms   time of running the plan, over the same
    density        kept pairs over causal pairs, over 1
    error          of the output beside dense attention's, root mean square over sampled rows, over the norm of dense's
    recall         mean attention mass that sampled rows keep, over the most that as many key tiles of each row can hold
    ran            0 of 1 where the method failed: the note says why
`prefill/<N>/<workload>/ran`: how many of the methods asked for there was time for, where not for all; the note names the others.
Where there is no calibration, methods that need one have seeded random parameters, which says nothing about their recall:
`untrained` in the note. They cost what trained ones do at the same density.
A method whose plan is None leaves the layer dense: one row `density` of 1.
`prefill/sync/<method>`: calls of `plan` that made the host wait for the device, of one at 8K.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]
from paths import ensure_importable

ensure_importable()
from results import Row, row, write
from workloads import WORKLOADS, Shape, model_like

from winnow.orchestration.evaluation.metrics import RowMetrics, row_metrics, sampled_rows
from winnow.registry import parse_spec
from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.spec import ModelSpec, RopeSpec
from winnow.workers.prefill.base import PrefillMethod, prefill_methods

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLED_ROWS = 48
CONTROL = "cuDNN dense" if DEVICE == "cuda" else "dense"
SPECS = (
    "flexprefill", "flexprefill:gamma=0.95", "xattention", "xattention:stride=16", "prism", "flashprefill",
    "flashprefill:correction=true", "flashprefill:per_kv_head=true,correction=true", "recall", "recall:recall=0.98",
    "recall:recall=0.95", "recall:recall=0.95,correction=true", "minference",
    "minference:vertical_tokens=1000,slash_tokens=800", "proxyattn", "dhsa", "dhsa:mask=topk",
    "dhsa:mask=topk,pooling=bands", "dhsa:mask=a", "dhsa:mask=vsb", "dhsa-v1:chunk_tokens=128", "dhsa-v1:chunk_tokens=16",
    "hyperattention", "hyperattention:min_seq_len=1024,block=128,samples=128",
    "powerattention", "neighborhood", "duoattention", "seerattention:density=0.1", "sale:tau=0.004",
)  # fmt: skip
CALIBRATED = ("sale", "dhsa-v1", "seerattention", "sea")  # with what was learnt for the model, on captured layers only


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One layer's q, k and v, what they are called, and the model they come from, for methods to be bound to."""

    name: str
    layer: LayerSpec
    q: Tensor
    k: Tensor
    v: Tensor
    model: Any = None


def in_memory_order(x: Tensor) -> Tensor:
    """[B, H, T, D] laid out as the decoder's projections are, tokens outermost."""
    return x.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)


def synthetic(n: int, workload: str, seed: int = 0) -> Case:
    shape = Shape(n, n, 1, 32, 8, 128, device=DEVICE).of_length()
    made = (model_like if workload == "model-like" else WORKLOADS[workload])(shape, seed)
    layer = LayerSpec(0, 32, 8, 128, 128**-0.5)
    return Case(f"{n}/{workload}", layer, in_memory_order(made.q), made.k.to(torch.bfloat16), made.v.to(torch.bfloat16))


def captured(path: Path, config: Path | None) -> Iterator[Case]:
    """Layers of a real model on a real text."""
    from transformers import AutoConfig

    from winnow.orchestration.evaluation.capture import load_capture

    capture, model = load_capture(path, device=DEVICE), None
    if config is not None:
        spec = ModelSpec.from_config(AutoConfig.from_pretrained(str(config)))
        decoder = SimpleNamespace(device=torch.device(DEVICE), dtype=torch.bfloat16)
        model = SimpleNamespace(spec=spec, decoder=decoder, fingerprint=capture.made["fingerprint"])
    for idx, found in capture.layers.items():
        q, k, v = (x[None].to(torch.bfloat16) for x in (found.q, found.k, found.v))
        yield Case(f"captured-{q.shape[2]}/layer{idx}", found.spec, q, k, v, model)


def prepared(spec: str, layer: LayerSpec, model: Any = None) -> tuple[PrefillMethod, str]:
    """The method, and what a reader must know: without a model seeded parameters stand in for those that training would make."""
    name, params = parse_spec(spec)
    method = prefill_methods.create(name, dict(params))
    if model is not None:
        return method.bind(model), ""
    n_layers, device = layer.idx + 1, torch.device(DEVICE)
    if name == "duoattention":
        from winnow.workers.prefill.methods.duoattention import DuoAttention, HeadClasses

        assert isinstance(method, DuoAttention)
        every_other = (torch.arange(layer.n_kv_heads) % 2 == 0).expand(n_layers, -1)
        return method.with_classes(HeadClasses.of(every_other, device=device)), "untrained: every other KV head streams"
    if name == "seerattention":
        from winnow.workers.prefill.methods.seerattention import Gates, SeerAttention

        assert isinstance(method, SeerAttention)
        d, gen = layer.head_size, torch.Generator().manual_seed(0)
        rope = RopeSpec(tuple((5e5 ** -(torch.arange(d // 2) / (d // 2))).tolist()))
        model = ModelSpec("llama", 1, d, d, layer.n_q_heads, layer.n_kv_heads, d, 8, 1 << 18, (), (rope,), (0,) * n_layers)
        q = torch.randn(1, layer.n_q_heads, d, 64, generator=gen).expand(n_layers, -1, -1, -1)
        k = torch.randn(1, layer.n_kv_heads, 3 * d, 64, generator=gen).expand(n_layers, -1, -1, -1)
        gates = Gates.of({"q": q, "k": k}, dataclasses.replace(model, n_layers=n_layers), torch.bfloat16, device)
        return method.with_gates(gates), "untrained"
    return method, ""


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Queue:
    """Milliseconds of calls that are queued behind the linear layers of an 8B Llama, over as many rows as the calls are made for.

    As in the engine, the host is ahead by the time these take, up to those of 16,384 rows, a chunk. On a CPU, wall time.
    """

    WEIGHTS = 218_103_808  # of one layer: 4096 x (4096 + 2 x 1024 + 4096 + 3 x 14336)

    def __init__(self) -> None:
        if DEVICE == "cuda":
            self._x = torch.randn(16_384, 4096, dtype=torch.bfloat16, device=DEVICE)
            self._w = torch.randn(4096, self.WEIGHTS // 4096, dtype=torch.bfloat16, device=DEVICE)
            self._out = torch.empty(16_384, self.WEIGHTS // 4096, dtype=torch.bfloat16, device=DEVICE)

    def ms(self, run: Callable[[], Any], rows: int, n: int, most_s: float = 0.3, warm: bool = False) -> list[float]:
        """Of up to n calls after one that is not counted (unless warm); fewer where they are long, two at least."""
        if not warm:
            run()
        if DEVICE != "cuda":
            return timed_ms(run, n, most_s, warm=True)
        rows, found = min(rows, 16_384), list[float]()
        while len(found) < n and (len(found) < 2 or sum(found) < most_s * 1e3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.matmul(self._x[:rows], self._w, out=self._out[:rows])
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return found


def timed_ms(run: Callable[[], Any], n: int, most_s: float = 0.3, warm: bool = False) -> list[float]:
    """Wall milliseconds of up to n calls after one that is not counted (unless warm); fewer where they are long, two at least."""
    if not warm:
        run()
    found: list[float] = []
    while len(found) < n and (len(found) < 2 or sum(found) < most_s * 1e3):
        start = now()
        run()
        found.append((now() - start) * 1e3)
    return found


def dense_ms(case: Case, queue: Queue) -> list[float]:
    def run() -> Tensor:
        if DEVICE == "cpu":
            return attend_plan(None, case.q, case.k, case.v, scale=case.layer.scale)[0]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True, enable_gqa=True, scale=case.layer.scale)

    return queue.ms(run, case.q.shape[2], 5)


def run_plan(plan: TilePlan | None, case: Case) -> Tensor:
    return attend_plan(plan, case.q, case.k, case.v, scale=case.layer.scale, softcap=case.layer.softcap)[0]


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """RuntimeError where the host waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def compared(case: Case, plan: TilePlan, out: Tensor) -> RowMetrics:
    rows = sampled_rows(case.q.shape[2], SAMPLED_ROWS)
    return row_metrics(case.layer, plan, case.q[0], case.k[0], case.v[0], out[0], rows)


def cell(case: Case, spec: str, dense: list[float], queue: Queue) -> list[Row]:
    """The rows of one method on one case. Raises what the method raises."""
    method, note = prepared(spec, case.layer, case.model)
    name = f"prefill/{case.name}/{spec}"
    plan = method.plan(case.q, case.k, case.layer)
    if plan is None:
        why = "left dense by the method: the prompt is too short for it, or no head of this layer is sparse"
        return [row(f"{name}/density", [1.0], "", "dense", [1.0], why)]
    n = case.q.shape[2]
    selection = queue.ms(lambda: method.plan(case.q, case.k, case.layer), n, 5)
    out = run_plan(plan, case)
    attention = queue.ms(lambda: run_plan(plan, case), n, 5, warm=True)
    found = compared(case, plan, out)
    error = float((found.error.sum() / found.norm.sum()).sqrt())
    detail = f"weakest head's recall {float(found.recall.mean(-1).min()):.3f}"
    note = f"{note}; {detail}" if note else detail
    return [
        row(f"{name}/selection_ms", selection, "ms", CONTROL, dense, note),
        row(f"{name}/attention_ms", attention, "ms", CONTROL, dense),
        row(f"{name}/density", [plan.density()], "", "dense", [1.0]),
        row(f"{name}/error", [error], "", "dense's norm", [1.0]),
        row(f"{name}/recall", [float(found.recall.mean())], "", "best tiles, as many", [float(found.oracle.mean())]),
    ]


def failed(name: str, why: str) -> Row:
    return row(f"{name}/ran", [0.0], "runs", "asked for", [1.0], why.replace("\n", " ")[:160])


def without_time(name: str, asked: Sequence[str], skipped: Sequence[str]) -> Row:
    """How many of the methods asked for ran; the note names those there was no time for."""
    ran = float(len(asked) - len(skipped))
    return row(f"{name}/ran", [ran], "methods", "asked for", [float(len(asked))], f"no time left for {', '.join(skipped)}")


def sync_rows(specs: list[str]) -> list[Row]:
    """Whether `plan` waits for the device."""
    case, rows = synthetic(8192 if DEVICE == "cuda" else 512, "S7"), []
    for spec in specs:
        name = f"prefill/sync/{spec}"
        try:
            method, _ = prepared(spec, case.layer)
            method.plan(case.q, case.k, case.layer)  # kernels are compiled and loaded at their first call
            now()
        except Exception as error:
            rows.append(failed(name, f"{type(error).__name__}: {error}"))
            continue
        try:
            with no_synchronisation():
                method.plan(case.q, case.k, case.layer)
            rows.append(row(name, [0.0], "waits", "calls of plan", [1.0]))
        except RuntimeError as error:
            rows.append(row(name, [1.0], "waits", "calls of plan", [1.0], str(error).replace("\n", " ")[:160]))
    return rows


def cases(lengths: list[int], capture: Path | None, config: Path | None) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name and maker of every case, the most wanted first: where time runs out, the last are left out."""
    wanted = [(n, "model-like") for n in (131_072, 32_768, 8_192)] + [(32_768, f"S{i}") for i in (2, 3, 4, 7)]
    wanted += [(n, "model-like") for n in (65_536, 16_384)] + [(131_072, "S7"), (8_192, "S7"), (32_768, "S5"), (32_768, "S6")]
    wanted += [(n, f"S{i}") for n in (131_072, 8_192) for i in (2, 3, 4, 5, 6)]
    wanted += [(n, "model-like") for n in lengths if n not in {size for size, _ in wanted}]
    for i, (n, workload) in enumerate(wanted):
        if i == 3 and capture is not None:
            for case in captured(capture, config):
                yield case.name, lambda case=case: case  # type: ignore[misc]
        if n in lengths:
            yield f"{n}/{workload}", lambda n=n, workload=workload: synthetic(n, workload)  # type: ignore[misc]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=180.0, help="wall clock after which what is left is skipped")
    parser.add_argument("--methods", default="", help="semicolon-separated specs; default: all")
    parser.add_argument("--lengths", default="131072,65536,32768,16384,8192,4096,2048,1024")
    parser.add_argument("--capture", type=Path)
    parser.add_argument("--name", default="prefill_h100", help="of the result file")
    parser.add_argument("--config", type=Path)
    options = parser.parse_args()
    specs = options.methods.split(";") if options.methods else list(SPECS)
    end = time.monotonic() + options.seconds
    rows, queue = sync_rows(specs) if DEVICE == "cuda" else [], Queue()
    waits = {r.name.rpartition("/")[2]: r.note for r in rows if r.value}
    print(f"plan waits for the device: {waits or 'never'}", flush=True)
    for name, make in cases([int(x) for x in options.lengths.split(",") if x], options.capture, options.config):
        if time.monotonic() > end:
            rows.append(without_time(f"prefill/{name}", specs, specs))
            continue
        case = make()
        dense = dense_ms(case, queue)
        print(f"{name}: {CONTROL} {statistics.median(dense):.2f} ms", flush=True)
        asked, skipped = [*specs, *(CALIBRATED if case.model is not None and not options.methods else ())], []
        for spec in asked:
            at = f"prefill/{name}/{spec}"
            if time.monotonic() > end:
                skipped.append(spec)
                continue
            begun = time.monotonic()
            try:
                found = cell(case, spec, dense, queue)
            except Exception as error:  # one method that fails ends itself only
                found = [failed(at, f"{type(error).__name__}: {error}")]
            now()
            took = time.monotonic() - begun
            rows += found
            short = "  ".join(f"{r.name.rpartition('/')[2]} {r.value:.3f} ({r.ratio:.3f})" for r in found)
            print(f"  {spec:44} {short}  {found[0].note}  [{took:.1f} s]", flush=True)
        del case
        if skipped:
            rows.append(without_time(f"prefill/{name}", asked, skipped))
        quietly_write(rows, f"{options.name}.json")
    print(f"{len(rows)} rows, {end - time.monotonic():.0f} s of {options.seconds:.0f} left")


def quietly_write(rows: list[Row], name: str) -> None:
    """The file as it is so far, without its table."""
    with contextlib.redirect_stdout(io.StringIO()):
        write(name, rows)


if __name__ == "__main__":
    main()
