"""What depends on sizes alone is made once and shared, unless it is large; plans of single keys never need a map of all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from winnow.workers.attention import tiles
from winnow.workers.attention.executor import attend_plan
from winnow.workers.attention.plan import HeadClass, TileLists, TilePlan
from winnow.workers.attention.tiles import by_geometry


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.nbytes:  # what only looks large is not
                self.elements = max(self.elements, x.numel())
        return out


def single_keys(n: int, m: int, per_row: int, heads: int) -> TilePlan:
    """Every row reads its own key and some before it, one by one."""
    gen = torch.Generator().manual_seed(0)
    position = torch.arange(m - n, m)
    keys = (torch.rand(1, heads, n, per_row, generator=gen) * position[:, None]).long().sort(-1).values
    first = torch.ones(1, heads, n, 1, dtype=torch.bool)
    valid = (keys < position[:, None]) & torch.cat((first, keys[..., 1:] != keys[..., :-1]), -1)
    own = TileLists.from_ids(position[:, None].expand(1, heads, n, 1))
    unused = torch.zeros(1, heads, dtype=torch.int32)
    return TilePlan(
        n, m, 1, 1, torch.full((1, heads), HeadClass.CSR, dtype=torch.int8), own, TileLists.empty(heads * n), unused, unused + 1,
        token_columns=TileLists.from_ids(keys, valid),
    )  # fmt: skip


def test_single_keys_are_run_and_counted_without_a_map_of_all_pairs() -> None:
    n, m, heads, d = 1024, 2048, 2, 16
    plan = single_keys(n, m, 8, heads)
    q, k, v = (torch.randn(1, heads, size, d, generator=torch.Generator().manual_seed(i)) for i, size in enumerate((n, m, m)))
    with Largest() as seen:
        attend_plan(plan, q, k, v, scale=0.25)
        kept = plan.kept_pairs
    assert seen.elements < n * m / 4
    assert torch.equal(kept, plan.to_dense_mask().sum((-1, -2)))


def test_a_result_is_shared_until_four_others_came() -> None:
    made: list[int] = []

    @by_geometry
    def ramp(n: int, device: str = "cpu") -> torch.Tensor:
        made.append(n)
        return torch.arange(n, device=device)

    first = ramp(3)
    assert ramp(3) is first and made == [3]
    assert ramp(3, device="meta").is_meta and made == [3, 3]
    for n in (4, 5, 6, 7):
        ramp(n)
    assert ramp(3) is not first


def test_large_results_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_MOST_KEPT_BYTES", 100)

    @by_geometry
    def pair(n: int) -> tuple[torch.Tensor, TileLists]:
        return torch.zeros(n, dtype=torch.int8), TileLists.empty(1)  # besides, two offsets of 8 bytes

    assert pair(84)[0] is pair(84)[0]
    assert pair(85)[0] is not pair(85)[0]


def test_what_was_made_in_inference_mode_can_be_trained_with() -> None:
    @by_geometry
    def ones(n: int) -> torch.Tensor:
        return torch.ones(n)

    with torch.inference_mode():
        ones(5)
    weight = torch.ones(5, requires_grad=True)
    (weight * ones(5)).sum().backward()
    assert weight.grad is not None
