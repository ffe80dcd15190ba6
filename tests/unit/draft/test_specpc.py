"""SpecPC: which tokens are kept, and that scores are the attention that the formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from winnow.errors import Cancelled, InvalidRequest
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.draft.base import DraftContext
from winnow.workers.draft.scorers.specpc import SpecPC, choose
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("tiny"))), dtype="fp32", device="cpu")


@given(
    n=st.integers(1, 400),
    capacity=st.integers(24, 300),
    pool=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_kept_indices_are_ascending_and_fill_the_capacity(n: int, capacity: int, pool: int, seed: int) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    kept = choose(scores, capacity, window=16, pool=pool, sink=4)
    assert kept.numel() == min(n, capacity)
    assert bool((kept.diff() > 0).all())
    assert set(range(max(0, n - 16), n)) <= set(kept.tolist())
    assert set(range(min(4, n))) <= set(kept.tolist())


def test_a_planted_spike_keeps_its_neighbours() -> None:
    scores = torch.zeros(1000)
    scores[500] = 1.0
    kept = set(choose(scores, capacity=100, window=16, pool=32, sink=4).tolist())
    assert set(range(500 - 15, 500 + 16)) <= kept


def test_larger_capacity_keeps_a_superset() -> None:
    scores = torch.rand(900, generator=torch.Generator().manual_seed(1))
    small = set(choose(scores, 120, 16, 32, 4).tolist())
    large = set(choose(scores, 400, 16, 32, 4).tolist())
    assert small <= large


def test_a_prompt_within_capacity_is_unchanged(draft: LoadedModel) -> None:
    ids = torch.arange(50) % draft.spec.vocab_size
    assert SpecPC(capacity=128).keep(ids, DraftContext(draft)).tolist() == list(range(50))


class _Recorder:
    """Whole-prompt dense attention that keeps every layer's full softmax map, the plain way."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        group = layer.n_q_heads // layer.n_kv_heads
        keys, values = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        logits = q @ keys.transpose(-1, -2) * layer.scale
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        probs = logits.masked_fill(mask, float("-inf")).softmax(-1)
        self.maps.append(probs)
        return probs @ values


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_scores_equal_the_formula_on_full_attention_maps(draft: LoadedModel, reduction: str) -> None:
    ids = torch.randint(0, draft.spec.vocab_size, (1300,), generator=torch.Generator().manual_seed(3))
    n, window = ids.numel(), 16
    method = SpecPC(capacity=200, window=window, first_layer=1, lookahead=1, reduction=reduction)  # type: ignore[arg-type]
    scores = method._scores(ids, DraftContext(draft))

    recorder = _Recorder()
    hidden = draft.decoder.forward(ids, torch.arange(n), recorder)
    token = draft.decoder.logits(hidden[-1:]).argmax(-1)
    recorder = _Recorder()
    draft.decoder.forward(torch.cat([ids, token]), torch.arange(n + 1), recorder)
    weight = torch.cat([torch.linspace(0, 1, window), torch.ones(1)])
    rows = torch.stack([m[:, n - window :, :n] for m in recorder.maps[1:]]) * weight[:, None]  # [L, H, W + 1, n]
    expected = rows.amax((0, 1, 2)) if reduction == "max" else rows.sum((0, 1, 2))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_cancellation_is_seen_between_chunks(draft: LoadedModel) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Cancelled("given up")

    with pytest.raises(Cancelled):
        SpecPC(capacity=128).keep(torch.zeros(1900, dtype=torch.int64), DraftContext(draft, check_cancelled=check))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "params", [{"capacity": 10}, {"window": 0}, {"pool": 0}, {"sink": -1}, {"reduction": "median"}, {"lookahead": 0}]
)
def test_bad_parameters_are_named(params: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(params))):
        SpecPC(**params)  # type: ignore[arg-type]
