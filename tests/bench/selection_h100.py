"""One GPU: the kernels of the slower selections one by one, beside what their bytes and products should cost.

    python tests/bench/selection_h100.py [--lengths 131072,32768,8192] [--seconds S]

q, k and v have the shape of one layer of an 8B Llama (32 query and 8 KV heads of 128, bf16, batch 1), seeded noise: what these
kernels cost does not depend on the values. Prints, for each length and kernel, milliseconds beside those expected, which come
from what must move and be multiplied on an H200 (`EXPECTED`): one far above is a kernel to look at. Whole plans of the methods
beside dense attention are in `prefill_h100.py`. A tool to look with: expectations are no control, so nothing is kept. Results are
checked by tests/kernels before; here nothing is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]
from paths import ensure_importable

ensure_importable()
from prefill_h100 import prepared, synthetic, timed_ms

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.estimates import log_weights
from winnow.workers.attention.kernels import bucket_attention, code_scores, codes, gates, row_attention
from winnow.workers.attention.plan import TileLists, TilePlan
from winnow.workers.prefill.methods.hyperattention import HyperAttention
from winnow.workers.prefill.methods.sale import SALE

# ms at 131,072 tokens that grow with the square of the length, ms that grow with the length, and ms that do not (launches)
EXPECTED = {
    "sale/key_codes": (0.0, 0.15, 0.01),
    "sale/row_codes": (0.0, 3.0, 0.02),
    "sale/scores": (72.0, 3.2, 0.3),
    "sale/plan": (75.0, 3.3, 0.8),
    "seerattention/pool_q": (0.0, 0.6, 0.02),
    "seerattention/pool_k": (0.0, 0.2, 0.02),
    "seerattention/choose": (0.9, 0.0, 0.02),
    "seerattention/plan": (3.2, 0.9, 0.7),
    "correction/log_weights": (0.12, 0.0, 0.02),
    "hyperattention/ranks": (0.0, 0.6, 0.05),
    "hyperattention/residual": (0.0, 28.0, 1.5),
    "sea/rows": (0.0, 40.0, 0.05),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """Inputs of one layer and the methods that look at them."""

    spec: LayerSpec
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, n: int) -> Layer:
        case = synthetic(n, "S1")
        return cls(case.layer, case.q, case.k, case.v)

    def parts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name and call of everything that is timed."""
        q, k, v, spec, n = self.q, self.k, self.v, self.spec, self.q.shape[2]
        sale = SALE(tau=0.004)
        shift, known = sale._shift(k), code_scores.Known(sale.sink, sale.local, sale.segment, sale.dense_below)
        mask = sale.forced_tiles(n, n, q.device).repeat(1, q.shape[1], 1, 1)
        limits = torch.full((q.shape[1],), -5.0, device=q.device)
        options = {"bits": 4, "token_scales": False}
        yield "sale/key_codes", lambda: codes.code_keys(k, shift, n // 128 * 128, **options)
        yield "sale/row_codes", lambda: codes.code_rows(q, k, shift, known, scale=spec.scale, **options)
        yield "sale/scores", lambda: code_scores.tile_maxima(
            q, k, shift, known, mask, limits, scale=spec.scale, slab_bytes=1 << 30, **options
        )  # fmt: skip
        yield "sale/plan", lambda: sale.plan(q, k, spec)

        seer, _ = prepared("seerattention:density=0.1", spec)
        cos, sin = seer.gates.pre_rope.rows(0, 0, n)  # type: ignore[attr-defined]
        scores = torch.randn(1, q.shape[1], -(-n // 64), -(-n // 64), device=q.device)
        counts = torch.full(scores.shape[2:3], max(1, n // 1280), device=q.device)
        yield "seerattention/pool_q", lambda: gates.pool(q, cos, sin, 64, extremes=False)
        yield "seerattention/pool_k", lambda: gates.pool(k, cos, sin, 64, extremes=True)
        yield "seerattention/choose", lambda: gates.choose_tiles(scores, n=n, m=n, block=64, counts=counts)
        yield "seerattention/plan", lambda: seer.plan(q, k, spec)

        tiles = torch.rand(1, q.shape[1], -(-n // 128), -(-n // 128), device=q.device) < 0.05
        plan = TilePlan.from_mask(tiles, n_rows=n, n_keys=n, block_q=128, block_k=128, mean_correction=True)
        yield "correction/log_weights", lambda: log_weights(plan)

        hyper = HyperAttention().plan(q, k, spec)
        if hyper is not None and callable(hyper.residual):
            squares, directions = hyper.residual, torch.randn(5, 1, q.shape[3], 7, device=q.device)
            yield "hyperattention/ranks", lambda: bucket_attention.gray_ranks(q, directions)
            yield "hyperattention/residual", lambda: squares(q, k, v, scale=spec.scale, softcap=0.0)

        if n <= 32_768:  # lists of 64 keys a row and head
            rows = single_keys(n, q.shape[1], q.device)
            yield "sea/rows", lambda: row_attention.row_attention(rows, q, k, v, scale=spec.scale)


def single_keys(n: int, heads: int, device: torch.device) -> TilePlan:
    """Rows that read 64 keys before their own, spread evenly, and their own."""
    position = torch.arange(n, device=device)
    keys = (torch.arange(64, device=device) * position[:, None] // 64).expand(heads, n, 64)
    valid = torch.nn.functional.pad(keys[..., 1:] != keys[..., :-1], (0, 1), value=True) & (keys < position[:, None])
    own = TileLists.from_ids(position[:, None].expand(heads, n, 1))
    some = torch.zeros(1, heads, dtype=torch.int32, device=device)
    kind = torch.full((1, heads), 2, dtype=torch.int8, device=device)
    empty = TileLists.empty(heads * n, device)
    return TilePlan(n, n, 1, 1, kind, own, empty, some, some + 1, token_columns=TileLists.from_ids(keys, valid))


def expected_ms(name: str, n: int) -> float:
    square, line, fixed = EXPECTED[name]
    return square * (n / 131_072) ** 2 + line * n / 131_072 + fixed


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="131072,32768,8192")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall clock after which what is left is skipped")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    for n in (int(x) for x in options.lengths.split(",")):
        layer = Layer.of(n)
        for name, call in layer.parts():
            if time.monotonic() > end:
                print(f"no time left for {n}/{name}", flush=True)
                continue
            took = statistics.median(timed_ms(call, 5))
            print(f"{n:7} {name:26} {took:9.3f} ms, expected {expected_ms(name, n):.3f}", flush=True)


if __name__ == "__main__":
    main()
