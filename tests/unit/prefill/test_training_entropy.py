"""Entropy of attention: against rows written out one by one, and on heads whose attention is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from planted_models import induction_model
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.loader import load_model
from winnow.workers.model.spec import FAMILIES
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill.training.attention_entropy import attention_entropies


class OneByOne:
    """Dense attention; entropies from each query's own list of logits."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self.entropies: list[list[float]] = []

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        sums = [0.0] * layer.n_kv_heads
        group = layer.n_q_heads // layer.n_kv_heads
        rows = range(*self.rows.indices(q.shape[1]))
        for head in range(layer.n_q_heads):
            for row in rows:
                first = max(0, row + 1 - layer.window) if layer.window else 0
                logits = [float(q[head, row] @ k[head // group, at]) * layer.scale for at in range(first, row + 1)]
                if layer.softcap:
                    logits = [math.tanh(x / layer.softcap) * layer.softcap for x in logits]
                weights = [math.exp(x - max(logits)) for x in logits]
                shares = [w / sum(weights) for w in weights]
                sums[head // group] -= sum(p * math.log(p) for p in shares if p > 0) / (group * len(rows))
        self.entropies.append(sums)
        return attend_plan(None, q[None], k[None], v[None], scale=layer.scale, softcap=layer.softcap, window=layer.window)[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_mean_over_queries_and_rows_of_the_entropy_of_their_weights(tmp_path: Path, family: str) -> None:
    model = load_model(str(make_tiny_model(tmp_path, family)), device="cpu", dtype="fp32")
    ids, rows = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(0)), slice(70, 89)
    plain = OneByOne(rows)
    model.decoder.forward(ids, torch.arange(90), plain)
    torch.testing.assert_close(attention_entropies(model.decoder, ids, rows), torch.tensor(plain.entropies), atol=1e-4, rtol=1e-4)
    assert len({round(value, 3) for layer in plain.entropies for value in layer}) > 1


def test_a_head_that_looks_at_one_place_has_less_than_one_that_looks_everywhere(tmp_path: Path) -> None:
    model = induction_model(tmp_path)
    once = torch.arange(3, 103)  # no token twice: the head that looks for earlier places of its token finds none
    found = attention_entropies(model.decoder, once, slice(50, 100))
    assert found.shape == (2, 2) and found.dtype == torch.float32
    twice = attention_entropies(model.decoder, torch.cat((once[:50], once[:50])), slice(60, 100))
    assert float(twice[1, 0]) < float(found[1, 0]) and float(found.max()) <= math.log(100)
