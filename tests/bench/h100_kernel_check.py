"""Correctness of the attention core on a CUDA machine, then a first timing of what is correct.

    python tests/bench/h100_kernel_check.py [--quick] [--out FILE]

Needs torch with CUDA and triton; winnow need not be installed. Configurations run in processes of a few each; those that a
crashed process (an illegal access takes its whole process along) left without an answer run again, each in its own. Prints a
line per configuration and a JSON summary as the last line; the exit status is 0 only if every check passed. Nothing is timed
when a check of its kind is red.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from paths import ensure_importable

ensure_importable()

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}  # relative Frobenius error of the output
TIMEOUT_S = 240
TOGETHER = 5  # configurations of one process


def kernel_cases(quick: bool) -> list[dict[str, Any]]:
    """Tile attention against its reference."""
    cases: list[dict[str, Any]] = []
    base = {"kind": "kernel", "b": 1, "hq": 4, "hkv": 2, "n": 1000, "m": 1000, "d": 128, "bq": 128, "bk": 128, "density": 0.3}
    changes: list[dict[str, Any]] = [
        {},
        *({"n": n, "m": n} for n in (1, 63, 64, 65)),
        {"n": 500, "m": 1777},
        {"n": 1, "m": 999},
        {"d": 64},
        {"d": 96},
        {"d": 256, "bk": 64},
        {"bq": 64, "bk": 64},
        {"bq": 64, "bk": 64, "mask_heads": 2},
        {"bq": 64, "bk": 128, "mask_heads": 1, "n": 500, "m": 1777},
        {"bk": 16, "n": 500, "m": 1777},
        {"bk": 64},
        {"bk": 32},
        {"bq": 16, "bk": 16, "n": 200, "m": 300},
        {"density": 0.0},
        {"density": 1.0},
        {"mask_heads": 2},
        {"mask_heads": 1, "b": 2},
        {"classes": True},
        {"classes": True, "columns": 0.05, "mean": True, "n": 500, "m": 1777},
        {"classes": True, "d": 64, "bq": 64, "bk": 64},
        {"intervals": True},
        {"intervals": True, "n": 500, "m": 1777, "bk": 64},
        {"columns": 0.05},
        {"columns": 0.05, "n": 500, "m": 1777, "bq": 64, "bk": 64},
        {"columns": 0.02, "mask_heads": 2, "d": 256, "bk": 64},
        {"mean": True},
        {"mean": True, "columns": 0.05, "n": 500, "m": 1777, "bk": 32},
        {"mean": True, "columns": 0.05, "mask_heads": 1, "b": 2, "d": 64},
        {"mean": True, "columns": 0.01, "n": 4096, "m": 4096, "density": 0.1},
        {"strided": True},
        {"streaming": [128, 300]},
        {"n": 4096, "m": 4096, "density": 0.1},
    ]
    for dtype in ("bf16", "fp16", "fp32"):
        for change in changes[:5] if quick else changes:
            cases.append({**base, "dtype": dtype, **change})
    if not quick:
        cases.append({**base, "dtype": "fp16", "d": 16, "bq": 16, "bk": 16, "n": 40, "m": 40, "far": True})
    return cases


def path_cases(quick: bool) -> list[dict[str, Any]]:
    """The executor's dense, windowed, soft-capped, planned and decode paths against float64 math."""
    cases: list[dict[str, Any]] = []
    base = {"kind": "dense", "b": 1, "hq": 8, "hkv": 2, "n": 1000, "m": 1000, "d": 128, "bq": 128, "bk": 128, "density": 0.3}
    changes: list[dict[str, Any]] = [
        {},
        {"n": 512, "m": 2049},
        {"n": 1, "m": 777},
        {"n": 65, "m": 65, "d": 64},
        {"b": 2, "hq": 4, "hkv": 4},
        {"window": 200},
        {"softcap": 20.0},
        {"softcap": 20.0, "window": 200},
        {"d": 256},
        {"kind": "keys", "n": 1, "m": 1},
        {"kind": "keys", "n": 1, "m": 8191},
        {"kind": "keys", "n": 1, "m": 500, "softcap": 20.0},
        {"kind": "plan", "residual": True},
        {"kind": "plan", "residual": True, "classes": True, "columns": 0.05, "mean": True, "n": 500, "m": 1777},
        {"kind": "plan", "mean": True, "softcap": 20.0},
        {"kind": "plan", "classes": True, "mean": True, "window": 200},
        {"kind": "flexprefill", "n": 4096, "m": 4096},
        {"kind": "flexprefill", "n": 3000, "m": 4001},
    ]
    for dtype in ("bf16", "fp16", "fp32"):
        cases.extend({**base, "dtype": dtype, **change} for change in (changes[:3] if quick else changes))
    return cases


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One configuration, in this process: errors and the tolerance they are held to."""
    import torch

    from winnow.workers.attention.executor import attend_keys, attend_plan
    from winnow.workers.attention.kernels.tile_attention.kernel import tile_attention
    from winnow.workers.attention.kernels.tile_attention.reference import tile_attention_reference
    from winnow.workers.attention.plan import TilePlan
    from winnow.workers.attention.reference import attend_reference

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case["dtype"]]
    b, hq, hkv, n, m, d = (case[x] for x in ("b", "hq", "hkv", "n", "m", "d"))
    torch.manual_seed(0)
    scale = d**-0.5
    q = torch.randn(b, n, hq, d, device="cuda").to(dtype).transpose(1, 2)
    cache = torch.full((2, b, hkv, m + 50, d), torch.nan, device="cuda", dtype=dtype)
    cache[:, :, :, :m] = torch.randn(2, b, hkv, m, d, device="cuda").to(dtype)
    k, v = cache[0][:, :, :m], cache[1][:, :, :m]
    if case.get("strided"):
        wide = (torch.randn(x.shape[2], b, x.shape[1], 2 * d, device="cuda").to(dtype) for x in (q, k, v))
        q, k, v = (x[..., ::2].permute(1, 2, 0, 3) for x in wide)
    plan = TilePlan.dense(batch=1, mask_heads=1, n_rows=n, n_keys=m, block_q=16, block_k=16, device="cuda")
    softcap, window = case.get("softcap", 0.0), case.get("window", 0)
    if case["kind"] in ("kernel", "plan"):
        bq, bk, heads = case["bq"], case["bk"], case.get("mask_heads", hq)
        plan = _plan(case, heads)
        if "streaming" in case:
            sink, recent = case["streaming"]
            plan = TilePlan.streaming(
                batch=b, mask_heads=1, n_rows=n, n_keys=m, sink=sink, recent=recent, block_q=bq, block_k=bk, device="cuda"
            )
        if case.get("far"):
            far = 2**31 + 64
            store = torch.empty(far + m * d, dtype=dtype, device="cuda")
            k = store.as_strided((1, 2, m, d), (0, far, d, 1)).copy_(k)
        plan.check()
    if case["kind"] == "kernel":
        out = torch.full((b, hq, n, d), torch.nan, device="cuda", dtype=dtype)
        lse = torch.full((b, hq, n), torch.nan, device="cuda")
        tile_attention(plan, q, k, v, scale=scale, out=out, lse=lse)
    elif case["kind"] == "plan":
        if case.get("residual"):
            plan = dataclasses.replace(
                plan, residual=(torch.randn(b, hq, n, d, device="cuda"), torch.randn(b, hq, n, device="cuda"))
            )
        out, lse = attend_plan(plan, q, k, v, scale=scale, softcap=softcap, window=window)
    elif case["kind"] == "keys":
        q = q[:, :, :1]
        plan = TilePlan.dense(batch=1, mask_heads=1, n_rows=1, n_keys=m, device="cuda")
        out, lse = (x[None, :, None] for x in attend_keys(q[0, :, 0], k[0], v[0], scale=scale, softcap=softcap))
    elif case["kind"] == "flexprefill":
        from winnow.workers.attention.backend import LayerSpec
        from winnow.workers.prefill.methods.flexprefill import FlexPrefill

        q[..., 0] += 6
        k[:, :, ::256, 0] += 6
        chosen = FlexPrefill().plan(q, k, LayerSpec(0, hq, hkv, d, scale))
        assert chosen is not None, "flexprefill chose nothing"
        chosen.check()
        plan = chosen
        out, lse = attend_plan(plan, q, k, v, scale=scale)
    else:
        out, lse = attend_plan(None, q, k, v, scale=scale, softcap=softcap, window=window)
    torch.cuda.synchronize()
    if case["kind"] == "plan":
        expected, expected_lse = (
            x.float()
            for x in attend_reference(plan, q.double(), k.double(), v.double(), scale=scale, softcap=softcap, window=window)
        )
    elif softcap or window:
        expected, expected_lse = _by_definition(q, k, v, scale, softcap, window)
    else:
        expected, expected_lse = tile_attention_reference(plan, q, k, v, scale=scale)
    error = float((out.float() - expected).norm() / expected.norm())
    lse_error = float((lse - expected_lse).abs().max())
    finite = bool(out.isfinite().all()) and bool(lse.isfinite().all())
    limit = TOLERANCE[case["dtype"]]
    ok = finite and error < limit and lse_error < max(1e-3, limit)
    return {"ok": ok, "error": error, "lse_error": lse_error, "finite": finite}


def _plan(case: dict[str, Any], heads: int) -> Any:
    """A random plan with what the case asks for: head classes, row intervals, token columns, mean correction."""
    import torch

    from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan

    b, n, m, bq, bk = (case[x] for x in ("b", "n", "m", "bq", "bk"))
    mask = torch.rand(b, heads, -(-n // bq), -(-m // bk), device="cuda") < case["density"]
    classes = torch.arange(b * heads).view(b, heads) % len(HeadClass) if case.get("classes") else None
    if case.get("intervals"):
        classes = torch.full((b, heads), HeadClass.INTERVAL)
    position = torch.arange(m - n, m, device="cuda").expand(b, heads, n)
    lo = position - torch.randint(0, m, (b, heads, 1), device="cuda") - torch.randint(0, 9, position.shape, device="cuda")
    hi = position + 1 - torch.randint(-1, 5, position.shape, device="cuda")
    columns = None
    if share := case.get("columns"):
        columns = TileLists.from_mask(torch.rand(*mask.shape[:3], m, device="cuda") < share)
    return TilePlan.from_mask(
        mask, n_rows=n, n_keys=m, block_q=bq, block_k=bk, head_class=classes,
        sink=torch.full((b, heads), 100), recent=torch.full((b, heads), 300),
        row_intervals=torch.stack((lo, hi), -1) if classes is not None else None,
        token_columns=columns, mean_correction=bool(case.get("mean")),
    )  # fmt: skip


def _by_definition(q: Any, k: Any, v: Any, scale: float, softcap: float, window: int) -> tuple[Any, Any]:
    import torch

    group, n, m = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    position, key = torch.arange(n, device="cuda")[:, None] + m - n, torch.arange(m, device="cuda")
    allowed = (key <= position) & ((key > position - window) if window else (key >= 0))
    logits = logits.masked_fill(~allowed, -torch.inf)
    return (logits.softmax(-1) @ v.double().repeat_interleave(group, 1)).float(), logits.logsumexp(-1).float()


def time_all(quick: bool) -> list[dict[str, Any]]:
    """Medians in milliseconds: dense cuDNN path, tile kernel by density, one decode step. 32/8 heads of 128, bf16."""
    import torch
    import torch.nn.functional as F
    import triton.testing

    from winnow.workers.attention import cuda
    from winnow.workers.attention.executor import attend_keys, attend_plan
    from winnow.workers.attention.plan import TilePlan

    rows: list[dict[str, Any]] = []

    def bench(name: str, call: Any, flops: float = 0.0) -> float:
        ms = float(triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median"))
        rows.append({"name": name, "ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1) if flops else None})
        return ms

    for n in (8192,) if quick else (8192, 32768):
        q = torch.randn(1, 32, n, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, 8, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        flops = 4 * 32 * 128 * n * (n + 1) / 2
        bench(f"dense/{n}", lambda q=q, k=k, v=v: attend_plan(None, q, k, v, scale=0.09), flops)
        bench(
            f"sdpa/{n}",
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            flops,
        )
        bench(f"dense_chunk512/{n}", lambda q=q, k=k, v=v: attend_plan(None, q[:, :, -512:], k, v, scale=0.09))
        for density in (0.25, 0.10, 0.05):
            mask = torch.rand(1, 32, n // 128, n // 128, device="cuda") < density
            plan = TilePlan.from_mask(mask, n_rows=n, n_keys=n, block_q=128, block_k=128)
            kept = plan.density()
            bench(f"tiles/{n}/{kept:.3f}", lambda p=plan, q=q, k=k, v=v: attend_plan(p, q, k, v, scale=0.09), flops * kept)
    q1 = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
    for m in (8192, 32768):
        k1, v1 = (torch.randn(8, m, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        bench(f"decode/{m}", lambda k=k1, v=v1: attend_keys(q1, k, v, scale=0.09))
    rows.append({"name": "kernels that refused a case", "cases": [str(x) for x in sorted(cuda._refused, key=str)]})
    return rows


def in_subprocess(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`run_case` for each in one new process; a crash becomes the result of the case it came from."""
    command = [sys.executable, __file__, "--cases", json.dumps(cases)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        answers, failure = done.stdout.strip().splitlines(), done.stderr.strip()[-600:] or f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        answers, failure = (error.stdout or b"").decode().strip().splitlines(), f"no answer in {TIMEOUT_S} s"
    results = [{"case": case, **json.loads(answer)} for case, answer in zip(cases, answers, strict=False)]
    if len(results) == len(cases):
        return results
    if len(cases) == 1:
        return [{"case": cases[0], "ok": False, "failure": failure}]
    return results + [result for case in cases[len(results) :] for result in in_subprocess([case])]


def main() -> int:
    """Run everything; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few configurations of each kind")
    parser.add_argument("--jobs", type=int, default=6, help="configurations at once")
    parser.add_argument("--out", type=Path, help="also write the summary to this file")
    parser.add_argument("--dtypes", nargs="*", default=list(TOLERANCE), choices=list(TOLERANCE), help="only these")
    parser.add_argument("--no-timing", action="store_true", help="check only")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cases:
        for case in json.loads(arguments.cases):
            started = time.monotonic()
            result = run_case(case)
            print(json.dumps({**result, "seconds": round(time.monotonic() - started, 1)}), flush=True)
        return 0
    if arguments.time:
        print(json.dumps(time_all(arguments.quick)))
        return 0

    import torch
    import triton

    if not torch.cuda.is_available():
        print("no CUDA device: this script checks kernels on one; the interpreter tests are in tests/kernels", file=sys.stderr)
        return 2
    cases = kernel_cases(arguments.quick) + path_cases(arguments.quick)
    cases = [case for case in cases if case["dtype"] in arguments.dtypes]
    results = []
    batches = [cases[i : i + TOGETHER] for i in range(0, len(cases), TOGETHER)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in itertools.chain.from_iterable(pool.map(in_subprocess, batches)):
            results.append(result)
            state = "ok  " if result["ok"] else "FAIL"
            detail = f"{result['error']:.1e} {result['lse_error']:.1e}" if "error" in result else result["failure"][-200:]
            print(state, json.dumps(result["case"]), detail, flush=True)
    failed = [result for result in results if not result["ok"]]
    timing: Any = "not timed: a check failed" if failed else "not asked for"
    if not failed and not arguments.no_timing:
        command = [sys.executable, __file__, "--time", *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_S)
        timing = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else done.stderr[-600:]
    summary = {
        "checked": len(results),
        "failed": failed,
        "timing": timing,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
    }
    text = json.dumps(summary)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
