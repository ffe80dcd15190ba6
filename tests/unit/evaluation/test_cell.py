"""One cell: the measured prefill is the real one, answers are the model's, likelihoods are torch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from winnow.index.segment import KVSegment, SegmentLayout
from winnow.orchestration.evaluation.cell import CellResult, measured_json, next_logits, run_cell
from winnow.orchestration.evaluation.measured import MeasuredBackend, Recorder
from winnow.orchestration.evaluation.prompt import Prompt
from winnow.orchestration.evaluation.task import tasks
from winnow.registry import Capabilities
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.plan import TilePlan
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.backend import PrefillBackend, Tally
from winnow.workers.prefill.base import PrefillMethod, prefill_methods
from winnow.workers.prefill.prompt import forward_steps, plan_passes
from winnow.workers.prefill.scoring import pool_mean

N = 700


@dataclass(frozen=True)
class Pooling(PrefillMethod):
    """Pools tiles of 32 keys as methods do, notes of the first layer how many keys it was given, and reads everything."""

    caps = Capabilities()
    name = "pooling"
    pooled: ClassVar[list[int]] = []

    def plan(self, q: Tensor, k: Tensor, layer: LayerSpec, raw: RawQK | None = None) -> TilePlan | None:
        def pool(keys: Tensor, _: int) -> Tensor:
            if layer.idx == 0:
                self.pooled.append(keys.shape[2])
            return pool_mean(keys, 32)

        assert self.of_key_tiles(layer.idx, k, 32, pool).shape[2] == -(-k.shape[2] // 32)
        return None


def sparse() -> PrefillMethod:
    return prefill_methods.create("flexprefill", {"block": 32, "min_budget": 64, "gamma": 0.5})


def ids(n: int = N, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def cell(
    model: LoadedModel, prompt: Prompt, method: PrefillMethod | None = None, task: str = "needle", **options: object
) -> CellResult:
    return run_cell(model, tasks.create(task), prompt, method or prefill_methods.create("dense"), **options)  # type: ignore[arg-type]


def passed(model: LoadedModel, backend_of: type[PrefillBackend], method: PrefillMethod | None, **fields: object
           ) -> tuple[Tensor, KVSegment, Tally]:  # fmt: skip
    spec = model.spec
    segment = KVSegment.create(SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, model.dtype_name), N)
    tally = Tally()
    backend = backend_of(segment, 0, method, tally, **fields)  # type: ignore[arg-type]
    return model.decoder.forward(torch.tensor(ids()), torch.arange(N), backend), segment, tally


@pytest.mark.parametrize("method", [None, sparse()], ids=["dense", "sparse"])
def test_the_measuring_backend_does_exactly_what_the_real_one_does(tiny: LoadedModel, method: PrefillMethod | None) -> None:
    hidden, segment, tally = passed(tiny, PrefillBackend, method)
    recorder = Recorder(N, n_rows=20, map_at=(1, 2))
    measured, same, again = passed(tiny, MeasuredBackend, method, recorder=recorder)
    assert torch.equal(measured, hidden)
    assert torch.equal(same.kv, segment.kv)
    assert again.density == pytest.approx(tally.density)
    assert sorted(recorder.layers) == list(range(tiny.spec.n_layers))
    assert recorder.map is not None and (recorder.map.layer, recorder.map.head, recorder.map.n_tokens) == (1, 2, N)


def test_dense_recalls_everything_and_differs_by_nothing(tiny: LoadedModel) -> None:
    first = cell(tiny, Prompt(ids(), ("x",), max_new_tokens=4), n_rows=32)
    second = cell(tiny, Prompt(ids(), ("x",), max_new_tokens=4), dense_logits=first.logits)
    assert (first.density, second.kl, second.text) == (1.0, 0.0, first.text)
    assert first.measured is not None and second.measured is None
    overall = first.measured.overall
    names = ("recall_mean", "recall_p5", "recall_min", "oracle_ratio", "density")
    assert {name: overall[name] for name in names} == dict.fromkeys(names, 1.0)
    assert overall["eps"] < 1e-5


def test_a_sparse_method_is_measured_on_the_kv_it_left_itself(tiny: LoadedModel) -> None:
    dense = cell(tiny, Prompt(ids(), ("x",), max_new_tokens=4))
    found = cell(tiny, Prompt(ids(), ("x",), max_new_tokens=4), sparse(), dense_logits=dense.logits, n_rows=32)
    assert found.measured is not None
    overall, by_head = found.measured.overall, found.measured.by_head
    assert 0.05 < found.density < 0.95 and overall["density"] == pytest.approx(found.density)
    assert overall["recall_min"] <= overall["recall_p5"] <= overall["recall_mean"] < 1.0
    assert overall["recall_mean"] <= overall["oracle_ratio"] <= 1.0
    assert overall["eps"] > 0 and found.kl > 0
    shape = (tiny.spec.n_layers, tiny.spec.n_q_heads)
    assert {(len(rows), len(rows[0])) for rows in by_head.values()} == {shape}
    flat = torch.tensor(by_head["recall_mean"])
    assert float(flat.mean()) == pytest.approx(overall["recall_mean"], rel=1e-5)
    assert float(torch.tensor(by_head["recall_min"]).amin()) == pytest.approx(overall["recall_min"], rel=1e-5)
    assert all(seconds > 0 for seconds in found.measured.select_s + found.measured.attend_s)
    assert measured_json(found.measured)["by_head"].keys() == by_head.keys()


def test_the_answer_is_the_greedy_one(tiny: LoadedModel) -> None:
    """Each token against a dense prefill of everything before it."""
    prompt = Prompt(ids(60), ("x",), max_new_tokens=6, stop=())
    said: list[int] = []
    for _ in range(6):
        said.append(int(next_logits(tiny, Prompt((*prompt.token_ids, *said))).argmax()))
        if said[-1] in tiny.tokenizer.eos_ids:
            break
    assert cell(tiny, prompt).text == tiny.tokenizer.decode(said).lstrip()


def test_an_answer_ends_before_its_stop_string(tiny: LoadedModel) -> None:
    whole = cell(tiny, Prompt(ids(60), ("x",), max_new_tokens=12, stop=())).text
    stop = whole[len(whole) // 2]
    assert cell(tiny, Prompt(ids(60), ("x",), max_new_tokens=12, stop=(stop,))).text == whole.partition(stop)[0]


@pytest.mark.parametrize("chunk", [0, 64])
def test_a_likelihood_is_the_geometric_mean_of_the_next_tokens_probabilities(tiny: LoadedModel, chunk: int) -> None:
    prompt = Prompt(ids(300), scored_tokens=100)
    hidden, _, _ = passed(tiny, PrefillBackend, None)  # the first 300 tokens see nothing of those after them
    losses = torch.nn.functional.cross_entropy(
        tiny.decoder.logits(hidden[199:299]).double(), torch.tensor(ids()[200:300]), reduction="mean"
    )
    assert cell(tiny, prompt, task="perplexity", chunk_tokens=chunk).score == pytest.approx(float((-losses).exp()), rel=1e-4)


def test_a_likelihood_is_of_what_the_method_planned(tiny: LoadedModel) -> None:
    """The end of a served prompt is dense whatever the method."""
    hidden, _, _ = passed(tiny, PrefillBackend, None)
    for scored, tail, last in ((100, 128, 172), (100, 0, 300), (150, 200, 151)):  # as much of the end as leaves room
        losses = torch.nn.functional.cross_entropy(
            tiny.decoder.logits(hidden[last - scored - 1 : last - 1]).double(), torch.tensor(ids()[last - scored : last])
        )
        found = cell(tiny, Prompt(ids(300), scored_tokens=scored), task="perplexity", tail_tokens=tail).score
        assert found == pytest.approx(float((-losses).exp()), rel=1e-4)


def test_chunks_change_nothing_of_dense_and_are_measured_as_one(tiny: LoadedModel) -> None:
    prompt = Prompt(ids(), ("x",), max_new_tokens=4)
    whole, parts = cell(tiny, prompt, n_rows=32), cell(tiny, prompt, n_rows=32, chunk_tokens=128)
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-4, rtol=1e-4)
    assert parts.measured is not None and parts.measured.overall["recall_mean"] == pytest.approx(1.0)
    streamed = cell(
        tiny, prompt, prefill_methods.create("flexprefill", {"block": 32, "min_budget": 64}), n_rows=8, chunk_tokens=128
    )
    assert streamed.density < 1.0  # it cannot be chunked, and is not


def test_keys_are_pooled_once_a_prefill_whatever_its_chunks(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As served: a chunk pools its own keys, and each prefill of a prompt pools all of them."""
    monkeypatch.setattr(Pooling, "pooled", [])
    chunks = [256, 256, 188]
    cell(tiny, Prompt(ids(), ("x",), max_new_tokens=1), Pooling(), chunk_tokens=256, n_rows=8)
    assert Pooling.pooled == chunks * 2  # the timed prefill and the measured one
    next_logits(tiny, Prompt(ids()), 256, 0, Pooling())
    assert Pooling.pooled == chunks * 3


def test_pooled_keys_that_are_kept_change_nothing(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> CellResult:
        return cell(tiny, Prompt(ids(), ("x",), max_new_tokens=4), sparse(), chunk_tokens=256, n_rows=16)

    kept = found()
    monkeypatch.setattr(PrefillMethod, "for_prompt", lambda self, known=None: self)
    anew = found()
    assert torch.equal(kept.logits, anew.logits) and (kept.density, kept.text) == (anew.density, anew.text)
    assert kept.measured is not None and anew.measured is not None
    assert kept.density < 1.0 and kept.measured.overall == anew.measured.overall


def test_the_next_token_is_the_pipelines(tiny: LoadedModel) -> None:
    """The same prompt by the code that serves."""
    spec = tiny.spec
    segment = KVSegment.create(SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, tiny.dtype_name), N)
    method, tally = sparse(), Tally()
    for _ in forward_steps(tiny.decoder, segment, ids(), plan_passes(method, N, 0, 0, 0, 0), 0, tally):
        pass
    found = cell(tiny, Prompt(ids(), ("x",), max_new_tokens=1), method)
    assert found.density == tally.density


def test_scores_that_are_not_finite_end_the_cell(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.decoder, "norm", torch.full_like(tiny.decoder.norm, torch.nan))
    with pytest.raises(ArithmeticError, match="dense: the scores after a prompt of 60 tokens are not finite"):
        cell(tiny, Prompt(ids(60), ("x",), max_new_tokens=4))
