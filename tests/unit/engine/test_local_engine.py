from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from winnow.config import KVConfig, PrefillConfig, WinnowConfig
from winnow.errors import ContextTooLong
from winnow.types import MethodChoice, Sampling
from winnow.workers.decode.job import Tokens
from winnow.workers.engine import LocalEngine
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.job import PrefillResult

from .conftest import Rig, prompt

GREEDY = Sampling(max_tokens=16, ignore_eos=True)


@pytest.fixture
def engine(tiny: Callable[..., LoadedModel], tmp_path: Path) -> Iterator[LocalEngine]:
    config = WinnowConfig(
        kv=KVConfig(dir=str(tmp_path), budget_bytes=64 << 20, block_tokens=16),
        prefill=PrefillConfig(chunk_tokens=64, break_even=False),
    )
    with LocalEngine(tiny(), config) as made:
        yield made
        assert (made.prefill.load().running, made.decode.load().running, made.store.stats().leases) == (0, 0, 0)
        made.store.check()


def text(events: Any) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


def test_the_prefill_result_comes_first_then_the_tokens_of_the_engines(engine: LocalEngine, rig: Callable[..., Rig]) -> None:
    ids = prompt(120)
    events = list(engine.generate(ids, GREEDY))
    assert isinstance(events[0], PrefillResult) and all(isinstance(e, Tokens) for e in events[1:])
    assert text(events) == rig().generate(ids, 16)
    assert next(engine.generate(ids, GREEDY)).cached_tokens == 119


def test_methods_by_name_in_both_places(engine: LocalEngine) -> None:
    ids = prompt(400)
    sparse = MethodChoice("flexprefill", {"gamma": "0.5", "min_budget": "32", "block": "32"})
    retrieval = {"sink_tokens": "16", "recent_tokens": "32", "index": "flat"}
    dense = text(engine.generate(ids, GREEDY))
    events = list(engine.generate(ids, GREEDY, sparse, MethodChoice("retrieval-attention", {**retrieval, "top_k": "20"})))
    assert events[0].density < 1.0 and events[-1].keys_read_share < 0.5
    everything = list(engine.generate(ids, GREEDY, None, MethodChoice("retrieval-attention", {**retrieval, "top_k": "1000"})))
    assert text(everything) == dense
    assert everything[-1].keys_read_share == pytest.approx(1.0)


@pytest.mark.promise("R6")
@pytest.mark.parametrize("n_events", [0, 1, 3])
def test_closing_the_iterator_frees_everything(engine: LocalEngine, n_events: int) -> None:
    events = engine.generate(prompt(300), Sampling(max_tokens=200, ignore_eos=True))
    for _ in range(n_events):
        next(events)
    events.close()  # the fixture checks the ledgers


def test_an_error_is_raised_where_the_caller_waits(engine: LocalEngine) -> None:
    with pytest.raises(ContextTooLong):
        list(engine.generate(prompt(2000), Sampling(max_tokens=500)))
