"""Replayed decode steps on CUDA equal the same steps issued one operation at a time."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.model.build import build_decoder
from winnow.workers.model.decoder import Decoder
from winnow.workers.model.graphs import SIZES
from winnow.workers.model.names import weight_shapes
from winnow.workers.model.reference import DenseBackend
from winnow.workers.model.spec import ModelSpec, RopeSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class RandomWeights:
    norms_hold_one = False

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = weight_shapes(spec)

    def get(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return torch.randn(self._shapes[name], generator=generator) * self._shapes[name][-1] ** -0.5


def make(dtype: torch.dtype, *, gemma: bool = False) -> Decoder:
    window = 24 if gemma else 0
    layers = tuple(LayerSpec(i, 8, 2, 32, 32**-0.5, window=window if i % 2 else 0) for i in range(4))
    rope = RopeSpec(tuple((1e4 ** -(torch.arange(0, 32, 2) / 32)).tolist()))
    spec = ModelSpec(
        family="gemma3" if gemma else "llama",
        n_layers=4, hidden_size=256, mlp_size=512, n_q_heads=8, n_kv_heads=2, head_size=32, vocab_size=1000, max_context=4096,
        layers=layers, ropes=(rope,), layer_ropes=(0,) * 4,
        norm_plus_one=gemma, post_norms=gemma, qk_norm=gemma, embed_scale=16.0 if gemma else 1.0, tied=gemma,
    )  # fmt: skip
    return build_decoder(spec, RandomWeights(spec), dtype, torch.device("cuda"))


def steps(decoder: Decoder, sizes: list[int], *, graphed: bool) -> Tensor:
    n_tokens = sum(sizes)
    tokens = torch.randint(0, 1000, (n_tokens,), generator=torch.Generator().manual_seed(0)).cuda()
    backend = DenseBackend(decoder.spec, n_tokens, decoder.dtype, "cuda")
    out, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size, device="cuda")
        part = tokens[start : start + size]
        out.append(decoder.forward(part, positions, backend) if graphed else eagerly(decoder, part, positions, backend))
        start += size
    return torch.cat(out)


def eagerly(decoder: Decoder, tokens: Tensor, positions: Tensor, backend: DenseBackend) -> Tensor:
    generator = decoder.iter_forward(tokens, positions, backend)
    while True:
        try:
            next(generator)
        except StopIteration as end:
            hidden: Tensor = end.value
            return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gemma", [False, True])
def test_replayed_steps_equal_eager_ones(dtype: torch.dtype, gemma: bool) -> None:
    decoder = make(dtype, gemma=gemma)
    sizes = [1, 3, 16, 2, 5, 20, 1, 7, 9, 1, 1]
    replayed, eager = steps(decoder, sizes, graphed=True), steps(decoder, sizes, graphed=False)
    assert decoder._graphs is not None and sorted(decoder._graphs._recorded) == list(SIZES)
    if dtype == torch.float32:
        assert (replayed - eager).abs().max() <= 1e-4
    else:  # a padded product may round otherwise
        assert torch.nn.functional.cosine_similarity(replayed.float(), eager.float(), dim=-1).min() > 0.999


def test_threads_on_streams_of_their_own_do_not_disturb_each_other() -> None:
    decoder = make(torch.float32)
    expected = steps(decoder, [1] * 40, graphed=False)
    results: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(steps(decoder, [1] * 40, graphed=True))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 3
    assert all((result - expected).abs().max() <= 1e-4 for result in results)


def test_a_replaced_mixer_is_never_replayed_over() -> None:
    decoder = make(torch.float32)
    before = steps(decoder, [1] * 5, graphed=True)
    decoder.mixers[1] = lambda idx, x, step: torch.zeros_like(x)
    assert (steps(decoder, [1] * 5, graphed=True) - before).abs().max() > 1e-3
