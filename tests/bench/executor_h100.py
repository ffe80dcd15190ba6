"""Plans on one Hopper GPU beside cuDNN's dense attention: 32 query and 8 KV heads of 128, bfloat16, one layer.

    python tests/bench/executor_h100.py [--flexprefill FILE] [--tokens N ...]

`executor/<N>/<density>/<tile>`: TFLOP/s over the kept (query, key) pairs of `attend_plan` (lists and all that a call does on the
device), control cuDNN dense causal over all causal pairs, of the same run. `executor_flex/...`: FlexAttention with the same
tiles. `executor_flexprefill/...`: FlexPrefill's Triton kernel with the same tiles, where --flexprefill names its
flex_prefill_attention.py. `executor_flash/<N>`: torch's flash attention, dense. Every plan's output is checked, in several of
its query tiles, against attention written out pair by pair, for every executor, before anything is timed.

Random plans keep the diagonal and the given share of the causal pairs; -vertical plans keep key tiles that all rows of a head
share, and a band. Query heads have a list each; -kv plans have one for each KV head. Times are of the device alone: all calls of
a measurement are queued behind one pause and then run back to back, so that what the host does for a launch is hidden for all
of them alike, and the GPU is as hot as in use. (A pause before each call would let it clock higher, short calls most of all.)
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from paths import ensure_importable

ensure_importable()
import torch
from results import Row, row, write
from torch import Tensor

from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import TilePlan

HQ, HKV, D = 32, 8, 128
SCALE = D**-0.5
TOKENS = (131072, 32768, 8192, 65536, 16384)
DENSITIES = (0.05, 0.10, 0.25)
OTHER_TILES = ("64x64", "64x64-kv", "128x64", "128x32", "128x128-vertical", "streaming")  # at 32K and 128K
SINK, RECENT = 128, 4096
TOLERANCE = 1e-2  # relative, of the output's norm
PAUSE_CYCLES = 16_000_000  # of the GPU; about eight milliseconds, in which the host queues twenty calls

Run = Callable[[], Tensor]


def build(n: int, density: float, tile: str) -> TilePlan:
    """The plan of one cell; the same for every executor."""
    sizes, _, kind = tile.partition("-")
    if tile == "streaming":
        return TilePlan.streaming(batch=1, mask_heads=1, n_rows=n, n_keys=n, sink=SINK, recent=RECENT, device="cuda")
    bq, bk = (int(x) for x in sizes.split("x"))
    heads = HKV if kind == "kv" else HQ
    gen = torch.Generator("cuda").manual_seed(n)
    n_q, n_k = n // bq, n // bk
    row, column = torch.arange(n_q, device="cuda")[:, None], torch.arange(n_k, device="cuda")
    before = (column + 1) * bk <= row * bq
    band = 8 if kind == "vertical" else 0
    near = before & ((column + 1 + band) * bk > row * bq)
    wanted = density * n * n / 2 - n * bq / 2 - float(near.sum()) * bq * bk
    share = wanted / (float((before & ~near).sum()) * bq * bk)
    shape = (1, heads, 1, n_k) if kind == "vertical" else (1, heads, n_q, n_k)
    mask = (torch.rand(shape, device="cuda", generator=gen) < share) | near
    return TilePlan.from_mask(mask, n_rows=n, n_keys=n, block_q=bq, block_k=bk)


def expected(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int) -> Tensor:
    """[1, Hq, stop - start, D] float32: attention of these rows over the pairs the plan keeps."""
    mask = plan.to_dense_mask(start, stop)
    mask = mask.repeat_interleave(HQ // mask.shape[1], 1)
    out = torch.empty(1, HQ, stop - start, D, device="cuda")
    for head in range(HQ):
        keys, values = k[0, head // (HQ // HKV)].float(), v[0, head // (HQ // HKV)].float()
        logits = (q[0, head, start:stop].float() @ keys.T * SCALE).masked_fill(~mask[0, head], -torch.inf)
        out[0, head] = logits.softmax(-1) @ values
    return out


def check(name: str, run: Run, plan: TilePlan, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether it computes what the plan says; ours must."""
    out, n = run(), q.shape[2]
    for start in (0, n // 2, n - plan.block_q):
        want = expected(plan, q, k, v, start, start + plan.block_q)
        error = float((out[:, :, start : start + plan.block_q].float() - want).norm() / want.norm())
        if not error < TOLERANCE:
            print(f"{name}: rows {start}.. are off by {error:.1e}, it is not timed", flush=True)
            if name.startswith("executor/"):
                raise SystemExit(1)
            return False
    return True


def milliseconds(run: Run, n: int) -> list[float]:
    """Device times of n calls, after two that are not counted."""
    run()
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    torch.cuda._sleep(PAUSE_CYCLES)
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def flex(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, compiled: Any) -> Run:
    """FlexAttention over the plan's tiles, full and partial kept apart as it wants them."""
    from torch.nn.attention.flex_attention import BlockMask

    def blocks(lists: Any) -> tuple[Tensor, Tensor]:
        mask = lists.to_mask(plan.n_k_tiles).view(1, HQ, plan.n_q_tiles, plan.n_k_tiles)
        return mask.sum(-1, dtype=torch.int32), torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True).int()

    def causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row >= key

    tiles = BlockMask.from_kv_blocks(
        *blocks(plan.partial), *blocks(plan.full), BLOCK_SIZE=(plan.block_q, plan.block_k), mask_mod=causal,
        seq_lengths=(plan.n_rows, plan.n_keys),
    )  # fmt: skip
    return lambda: compiled(q, k, v, block_mask=tiles, scale=SCALE, enable_gqa=True)


def flexprefill(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor, module: Any) -> Run:
    """FlexPrefill's kernel over the plan's tiles: [B, N, H, D] and flat tile numbers, which it sorts in every call."""
    mask = plan.tile_mask()[0].flatten(1)
    tiles = [[head.nonzero() for head in mask]]
    longest, beyond = max(len(x) for x in tiles[0]), plan.n_k_tiles * (plan.n_k_tiles + 1)
    ids = torch.stack([torch.nn.functional.pad(x[:, 0], (0, longest - len(x)), value=beyond) for x in tiles[0]])[None]
    rows = tuple(x.transpose(1, 2) for x in (q, k, v))
    return lambda: module.triton_block_wise_prefill_attention(*rows, ids, plan.block_q, softmax_scale=SCALE).transpose(1, 2)


def load_flexprefill(path: Path | None) -> Any:
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("flex_prefill_attention", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GPU_NAME = "nvidia h100"  # it knows no H200 by name; an H100's settings are right for it
    return module


def measure(n: int, compiled: Any, module: Any) -> list[Row]:
    """All rows of one length."""
    gen = torch.Generator("cuda").manual_seed(n)
    q = torch.randn(1, HQ, n, D, device="cuda", generator=gen).to(torch.bfloat16)
    k, v = (torch.randn(1, HKV, n, D, device="cuda", generator=gen).to(torch.bfloat16) for _ in range(2))
    work = 4 * HQ * D * n * (n + 1) / 2 / 1e9  # over milliseconds: TFLOP/s
    repeats = 20 if n <= 32768 else 7

    def cudnn() -> Tensor:
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=SCALE)[0]  # type: ignore[no-any-return]

    long_k, long_v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))

    def flash() -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, long_k, long_v, 0.0, True, False, scale=SCALE)[0]  # type: ignore[no-any-return]

    dense = TilePlan.dense(batch=1, mask_heads=1, n_rows=n, n_keys=n, device="cuda")
    check(f"cudnn/{n}", cudnn, dense, q, k, v)
    check(f"flash/{n}", flash, dense, q, k, v)
    controls = milliseconds(cudnn, 3 if n > 65536 else 10)
    found: list[tuple[str, list[float], float, str]] = [(f"executor_flash/{n}", milliseconds(flash, 3), 1.0, "dense")]
    cells = [(density, "128x128") for density in DENSITIES]
    if n in (32768, 131072):
        cells += [(0.10, tile) for tile in OTHER_TILES]
    for density, tile in cells:
        plan = build(n, density, tile)
        kept = plan.density()
        cell = f"{n}/streaming/128x128" if tile == "streaming" else f"{n}/{density:.2f}/{tile}"
        runs: dict[str, Run] = {"executor": lambda plan=plan: attend_plan(plan, q, k, v, scale=SCALE)[0]}  # type: ignore[misc]
        if tile == "128x128":
            runs["executor_flex"] = flex(plan, q, k, v, compiled)
            if module is not None:
                runs["executor_flexprefill"] = flexprefill(plan, q, k, v, module)
        right = [name for name, run in runs.items() if check(f"{name}/{cell}", run, plan, q, k, v)]
        for name, run in ((name, runs[name]) for name in right):
            found.append((f"{name}/{cell}", milliseconds(run, repeats), kept, f"kept {kept:.4f} of the causal pairs"))
            print(f"  {found[-1][0]}: {sorted(found[-1][1])[repeats // 2]:.3f} ms", flush=True)
    controls += milliseconds(cudnn, 3 if n > 65536 else 10)
    rates = [work / ms for ms in controls]
    return [row(name, [work * kept / ms for ms in times], "TFLOP/s", "cudnn", rates, note) for name, times, kept, note in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flexprefill", type=Path, help="flex_prefill_attention.py of the FlexPrefill repository")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="lengths")
    arguments = parser.parse_args()
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    module = load_flexprefill(arguments.flexprefill)
    rows: list[Row] = []
    for n in arguments.tokens:
        rows += measure(n, compiled, module)
        rows.sort(key=lambda row: (int(row.name.split("/")[1]), row.name))
        write("executor_h100.json", rows)  # after every length: a run cut short leaves what it has


if __name__ == "__main__":
    main()
