"""Which fused kernel CUDA attention takes, without a GPU: kernels are stood in for, since only what they refuse matters here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.workers.attention import cuda

TRIED: list[tuple[str, int]] = []


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def standing_in(name: str, refuses: tuple[int, ...]) -> object:
        def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
            TRIED.append((name, q.shape[2]))
            if q.shape[2] in refuses:
                raise RuntimeError("no valid execution plans built")
            return q, q[..., 0].float()

        kernel.__name__ = name
        return kernel

    TRIED.clear()
    monkeypatch.setattr(cuda, "_refused", {})
    monkeypatch.setattr(cuda, "_pieces", lambda q, k: 1)
    monkeypatch.setattr(cuda, "_cudnn", standing_in("_cudnn", (100, 300)))
    monkeypatch.setattr(cuda, "_flash", standing_in("_flash", ()))


def attend(n: int) -> list[str]:
    TRIED.clear()
    x = torch.zeros(1, 4, n, 16, dtype=torch.bfloat16)
    cuda.fused(x, x, x, scale=1.0, causal=True)
    return [name for name, _ in TRIED]


def test_one_shape_that_a_kernel_refuses_does_not_cost_the_others_their_kernel() -> None:
    assert attend(100) == ["_cudnn", "_flash"]
    assert attend(100) == ["_flash"], "it is not asked again"
    assert attend(200) == ["_cudnn"]


def test_after_two_shapes_a_kernel_is_not_asked_for_their_kind() -> None:
    attend(100), attend(300)
    assert attend(200) == ["_flash"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_no_kernel_can_make_good_is_raised(error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> tuple[Tensor, Tensor]:
        raise error("device lost")

    broken.__name__ = "_cudnn"
    monkeypatch.setattr(cuda, "_cudnn", broken)
    with pytest.raises(error):
        attend(100)
    assert not TRIED
