"""Paged, float8 and packed keys and values on one Hopper GPU beside contiguous bfloat16: 32 query and 8 KV heads of 128.

    python tests/bench/stored_h100.py [--tokens N ...] [--dry-run]

`stored/<N>/<density>/<how>`: TFLOP/s over the kept (query, key) pairs, control `attend_plan` over contiguous bfloat16 with the
same plan, of the same run.

    general       contiguous bfloat16 in the kernel that the other rows run in (the control runs in Hopper's own)
    paged16/64    `attend_stored`, K and V in pages of 16 or 64 keys in random order
    paged64-copied  out of their pages into contiguous tensors, then `attend_plan`: what a caller with memory to spare can do
    fp8, paged64-fp8, fp8-copied  the same in float8 with a scale per head
    pack          `attend_pack` of sequences of N/2, N/4, N/8 ... tokens; control: `attend_plan` for each, one after another

Every output is compared with the control's before it is timed, those of float8 with `attend_plan` over the values that it
stands for; how far they are from bfloat16's is in their note. --dry-run does all that on a CPU at small sizes, where every row
takes the executor's path for CPUs; it writes nothing and its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from paths import ensure_importable

ensure_importable()
import torch
from executor_h100 import milliseconds
from results import Row, row, write
from torch import Tensor

from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.kv import KVStorage, quantize_kv
from winnow.workers.attention.plan import TilePlan
from winnow.workers.attention.stored import attend_pack, attend_stored

HQ, HKV, D = 32, 8, 128
SCALE = D**-0.5
TOKENS = (131072, 32768, 8192)
DENSITIES = (0.05, 0.25)
TOLERANCE = 1e-2  # relative, of the output's norm

Run = Callable[[], Tensor]


def random_plan(n: int, density: float, device: str) -> TilePlan:
    """128x128 tiles, a list per query head: the diagonal and so many of the others that the share of pairs is near `density`."""
    tiles = -(-n // 128)
    mask = torch.rand(1, HQ, tiles, tiles, device=device, generator=torch.Generator(device).manual_seed(n))
    share = max(0.0, (density * tiles - 1) / max(1, tiles - 1))
    return TilePlan.from_mask(mask < share, n_rows=n, n_keys=n, block_q=128, block_k=128)


def paged(kv: KVStorage, page: int) -> KVStorage:
    """The same keys in pages in random order."""
    n = int(kv.k.shape[2])
    order = torch.randperm(n // page, device=kv.k.device)
    k, v = (x.view(torch.uint8)[0].unflatten(1, (-1, page)).transpose(0, 1)[order.argsort()].view(x.dtype) for x in (kv.k, kv.v))
    return KVStorage(k, v, order[None].to(torch.int32), n, kv.k_scale, kv.v_scale)


def lengths(n: int) -> list[int]:
    """n / 2, n / 4, ... and twice the last, all whole numbers of tiles."""
    found = [n // 2]
    while found[-1] >= 512 and len(found) < 7:
        found.append(found[-1] // 2)
    return [*found, found[-1]]


def runs_of(plan: TilePlan, q: Tensor, kv: KVStorage, general: Callable[..., tuple[Tensor, Tensor]] | None) -> dict[str, Run]:
    """What is measured beside `attend_plan` over kv's own k and v."""
    small, pages16, pages64 = quantize_kv(kv.k, kv.v), paged(kv, 16), paged(kv, 64)
    small64 = paged(small, 64)
    stored = {"paged16": pages16, "paged64": pages64, "fp8": small, "paged64-fp8": small64}
    runs: dict[str, Run] = {}
    if general is not None:
        runs["general"] = lambda: general(plan, q, kv, scale=SCALE)[0]
    for name, x in stored.items():
        runs[name] = lambda x=x: attend_stored(plan, q, x, scale=SCALE)[0]  # type: ignore[misc]
    for name, x in (("paged64-copied", pages64), ("fp8-copied", small)):
        runs[name] = lambda x=x: attend_plan(plan, q, *x.to_contiguous(q.dtype), scale=SCALE)[0]  # type: ignore[misc]
    return runs


def difference(out: Tensor, other: Tensor) -> float:
    """Relative, of the norm."""
    return float((out.float() - other.float()).norm() / other.float().norm())


def is_right(name: str, out: Tensor, control: Tensor) -> bool:
    error = difference(out, control)
    print(f"  {name}: differs by {error:.1e}", flush=True)
    return error < TOLERANCE


def measure(n: int, density: float, device: str, timed: Callable[[Run, int], list[float]]) -> list[Row]:
    """All rows of one length and density; SystemExit where an output is wrong."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gen = torch.Generator(device).manual_seed(n)
    q, k, v = (torch.randn(1, heads, n, D, device=device, generator=gen).to(dtype) for heads in (HQ, HKV, HKV))
    general = None
    if device == "cuda":
        from winnow.workers.attention.kernels.tile_attention.stored import tile_attention_stored as general

    plan, repeats = random_plan(n, density, device), 20 if n <= 32768 else 7
    runs = runs_of(plan, q, KVStorage(k, v), general)

    def control() -> Tensor:
        return attend_plan(plan, q, k, v, scale=SCALE)[0]

    sizes = lengths(n)
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    plans = [random_plan(size, density, device) for size in sizes]
    rows, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    parts = [[x[:, :, start:end].contiguous() for x in (q, k, v)] for start, end in itertools.pairwise(ends)]

    def together() -> Tensor:
        return attend_pack(plans, rows, KVStorage(keys, values), ends, ends, scale=SCALE)[0]

    def each() -> list[Tensor]:
        return [attend_plan(own, *part, scale=SCALE)[0] for own, part in zip(plans, parts, strict=True)]

    def one_by_one() -> Tensor:
        return each()[-1]

    expected, rounded = control(), attend_plan(plan, q, *quantize_kv(k, v).to_contiguous(dtype), scale=SCALE)[0]
    right = [is_right(f"{n}/{density:.2f}/{name}", run(), rounded if "fp8" in name else expected) for name, run in runs.items()]
    right.append(is_right(f"{n}/{density:.2f}/pack", together(), torch.cat([x[0].transpose(0, 1) for x in each()])))
    if not all(right):
        raise SystemExit("an output is wrong: nothing is timed")
    pairs = 4 * HQ * D / 1e9  # of one kept pair of every head; over milliseconds: TFLOP/s
    work, packed_work = (pairs * float(sum(x.kept_pairs.double().mean() for x in own)) for own in ([plan], plans))
    controls = timed(control, repeats)
    found = {name: timed(run, repeats) for name, run in runs.items()}
    controls += timed(control, repeats)
    note = f"kept {plan.density():.4f} of the causal pairs"
    far = f"{note}; output {difference(rounded, expected):.3f} off bfloat16's"
    cell = f"stored/{n}/{density:.2f}"
    result = [
        row(
            f"{cell}/{name}", [work / ms for ms in times], "TFLOP/s", "contiguous", [work / ms for ms in controls],
            far if "fp8" in name else note,
        )
        for name, times in found.items()
    ]  # fmt: skip
    separate, packed = timed(one_by_one, repeats), timed(together, repeats)
    rates = [[packed_work / ms for ms in times] for times in (packed, separate)]
    result.append(row(f"{cell}/pack", rates[0], "TFLOP/s", "one by one", rates[1], f"sequences of {sizes} tokens"))
    return result


def wall_milliseconds(run: Run, n: int) -> list[float]:
    """Wall times of n calls, for the dry run."""
    found = []
    for _ in range(min(n, 2)):
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="lengths")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, 1024 tokens, nothing written")
    arguments = parser.parse_args()
    if arguments.dry_run:
        for r in measure(1024, 0.25, "cpu", wall_milliseconds):
            print(f"{r.name}: {r.value:.3g} {r.unit}, {r.control} {r.control_value:.3g}")
        return
    rows: list[Row] = []
    for n in arguments.tokens:
        for density in DENSITIES:
            rows += measure(n, density, "cuda", milliseconds)
        rows.sort(key=lambda row: (int(row.name.split("/")[1]), row.name))
        write("stored_h100.json", rows)  # after every length: a run cut short leaves what it has


if __name__ == "__main__":
    main()
