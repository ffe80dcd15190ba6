"""Plans on the CPU beside dense attention, one layer of SmolLM2's shape: 8192 tokens, 9 query and 3 KV heads of 64, float32.

    OMP_NUM_THREADS=2 python tests/bench/executor_cpu.py [--write] [--repeat N] [--tokens N]

Every plan is checked against attention written out pair by pair before it is timed. Repetitions alternate between a plan and
dense attention, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: two spinning threads starve the other process

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from paths import ensure_importable

ensure_importable()
from results import Row, row, write

from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plain import plain
from winnow.workers.attention.plan import TileLists, TilePlan

Q_HEADS, KV_HEADS, HEAD_SIZE, TILE = 9, 3, 64, 128
SCALE = HEAD_SIZE**-0.5
DENSITIES = (0.05, 0.10, 0.25, 0.50)


def inputs(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """White noise, laid out as the model's: q a transposed view."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(1, n, Q_HEADS, HEAD_SIZE, generator=gen).transpose(1, 2)
    k, v = (torch.randn(1, KV_HEADS, n, HEAD_SIZE, generator=gen) for _ in range(2))
    return q, k, v


def random_mask(n: int, heads: int, density: float, seed: int = 0) -> Tensor:
    """[1, heads, nQ, nK]: random tiles that, with those on the diagonal, hold about this share of the causal pairs."""
    diagonal = (TILE + 1) / (n + 1)
    share = max(0.0, (density - diagonal) / (1 - diagonal))
    tiles = -(-n // TILE)
    return torch.rand(1, heads, tiles, tiles, generator=torch.Generator().manual_seed(seed)) < share


def plans(n: int) -> Iterator[tuple[str, TilePlan, str]]:
    """(name, plan, note)"""

    def tiles(density: float, heads: int, **more: object) -> TilePlan:
        mask = random_mask(n, heads, density)
        return TilePlan.from_mask(mask, n_rows=n, n_keys=n, block_q=TILE, block_k=TILE, **more)  # type: ignore[arg-type]

    for heads, lists in ((Q_HEADS, "query head"), (KV_HEADS, "KV head")):
        for density in DENSITIES:
            yield f"{n}/{density:.2f}/{TILE}x{TILE}/{lists.split()[0].lower()}", tiles(density, heads), f"a list per {lists}"
    columns = torch.rand(1, Q_HEADS, 1, n, generator=torch.Generator().manual_seed(1)) < 500 / n
    singles = TileLists.from_mask(columns.expand(-1, -1, -(-n // TILE), -1))
    yield f"{n}/columns", tiles(0.05, Q_HEADS, token_columns=singles), "random tiles of density 0.05 and about 500 columns a head"
    yield f"{n}/mean-correction", tiles(0.10, Q_HEADS, mean_correction=True), "random tiles of density 0.10, the rest as means"
    yield (
        f"{n}/streaming",
        TilePlan.streaming(batch=1, mask_heads=1, n_rows=n, n_keys=n, sink=128, recent=1024),
        "first 128 and last 1024 keys",
    )
    position = torch.arange(n)
    window = torch.stack((position // 256 * 256 - 768, position + 1), -1).expand(1, 1, n, 2)
    yield f"{n}/intervals", TilePlan.intervals(window, n_keys=n), "windows of 768 to 1024 keys that move by 256"


def check(plan: TilePlan, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compare the rows of three query tiles with attention over their mask, estimates aside.

    Raises:
        RuntimeError: they differ; nothing of this run is a result.
    """
    exact = dataclasses.replace(plan, mean_correction=False)
    out, lse = attend_plan(exact, q, k, v, scale=SCALE)
    for first in (0, plan.n_q_tiles // 2, plan.n_q_tiles - 1):
        rows = slice(first * plan.block_q, min(plan.n_rows, (first + 1) * plan.block_q))
        mask = exact.to_dense_mask(rows.start, rows.stop).repeat_interleave(Q_HEADS // plan.mask_heads, 1)
        expected, expected_lse = plain(q[:, :, rows], k, v, scale=SCALE, mask=mask)
        worst = max(float((out[:, :, rows] - expected).abs().max()), float((lse[:, :, rows] - expected_lse).abs().max()))
        if not worst < 1e-4:
            raise RuntimeError(f"query tile {first} is off by {worst:.2g}; not timing a wrong result")


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def measure(n: int, repeat: int) -> Iterator[Row]:
    q, k, v = inputs(n)
    for name, plan, note in plans(n):
        check(plan, q, k, v)
        sparse, dense = [], []
        for _ in range(repeat):
            dense.append(milliseconds(lambda: attend_plan(None, q, k, v, scale=SCALE)))
            sparse.append(milliseconds(lambda plan=plan: attend_plan(plan, q, k, v, scale=SCALE)))  # type: ignore[misc]
        note = f"density {plan.density():.3f}, {note}, {torch.get_num_threads()} threads"
        yield row(f"executor_cpu/{name}", sparse, "ms", "dense (torch's fused CPU attention)", dense, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="write results/executor_cpu.json")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each plan and of dense")
    parser.add_argument("--tokens", type=int, default=8192)
    chosen = parser.parse_args()
    rows = []
    for one in measure(chosen.tokens, chosen.repeat):
        rows.append(one)
        print(
            f"{one.name:40} {one.value:8.1f} ms  dense {one.control_value:8.1f} ms  ratio {one.ratio:.3f}  {one.note}", flush=True
        )
    if chosen.write:
        write("executor_cpu.json", rows)


if __name__ == "__main__":
    main()
