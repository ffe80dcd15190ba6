from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from winnow.errors import Cancelled, ContextTooLong, Draining, InvalidRequest, Overloaded, Skewed, UnknownName, Unsupported
from winnow.index.segment import KVSegment, SegmentLayout
from winnow.registry import Capabilities
from winnow.types import MethodChoice, Sampling
from winnow.workers.decode.base import DecodeMethod, DecodeState
from winnow.workers.decode.job import DecodeJob, Failed, Tokens
from winnow.workers.decode.methods.dense import Dense, DenseState
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.prefill import calibration
from winnow.workers.prefill.methods import duoattention as duo_prefill

from .conftest import WAIT_S, Inbox, Rig, prompt, wait

MakeRig = Callable[..., Rig]


class WatchedState(DenseState):
    """Dense through the general path; counts closes, may raise or stop the engine at a step."""

    def __init__(self, segment: KVSegment, method: Watched) -> None:
        super().__init__(segment)
        self.method = method
        self.n = 0

    def submit(self, layer: Any, q: Any, n_cached: int) -> None:
        if layer.idx == 0:
            self.n += 1
            self.method.steps.append(self.n)
            if self.n == self.method.pause_at:
                self.method.reached.set()
                assert self.method.go.wait(WAIT_S)
            if self.n == self.method.submit_fails_at:
                raise self.method.error("poisoned submit")

    def collect(self, layer: Any, q: Any, n_cached: int) -> Any:
        if layer.idx == 1 and self.n == self.method.collect_fails_at:
            raise self.method.error("poisoned collect")
        out = super().collect(layer, q, n_cached)
        return out * torch.nan if self.n == self.method.nan_at else out

    def close(self) -> None:
        super().close()
        self.method.closed.append(1)


@dataclass(frozen=True)
class Watched(DecodeMethod):
    caps: ClassVar[Capabilities] = Capabilities(exact=True)
    name: ClassVar[str] = "watched"
    pause_at: int = 0
    submit_fails_at: int = 0
    collect_fails_at: int = 0
    error: type[BaseException] = RuntimeError
    nan_at: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    closed: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def open(self, segment: KVSegment, retrieval: Any, *, strict: bool = False) -> DecodeState:
        return WatchedState(segment, self)


class Session:
    """A retrieval session that nobody searches; counts closes."""

    sink_tokens = recent_tokens = 0

    def __init__(self) -> None:
        self.n_closed = 0

    def submit(self, layer: Any, q: Any, top_k: int) -> None: ...

    def collect(self, layer: Any) -> Any: ...

    def close(self) -> None:
        self.n_closed += 1


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("n_prompt", [1, 2, 90])
def test_greedy_text_equals_transformers(rig: MakeRig, tiny: Any, family: str, n_prompt: int) -> None:
    ids = prompt(n_prompt, seed=n_prompt)
    reference = AutoModelForCausalLM.from_pretrained(tiny.folder(family), dtype=torch.float32)
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([ids]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, n_prompt:].tolist()
    assert rig(family).generate(ids, 40) == expected


@pytest.mark.promise("R20")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cached_prefix_and_full_hit_give_the_cold_text(rig: MakeRig, family: str) -> None:
    ids, other = prompt(130), prompt(130)[:100] + prompt(30, 5)
    cold = rig(family).generate(ids, 24)
    r = rig(family)
    assert r.run_prefill(other).cached_tokens == 0
    partial = r.run_prefill(ids, tail_tokens=24)
    assert partial.cached_tokens == 100  # where they differ, in the middle of a block of 16
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=24), partial)
    assert inbox.tokens() == cold
    whole = r.run_prefill(ids, tail_tokens=24)
    assert (whole.cached_tokens, whole.segment.n_tokens) == (129, 129)
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=24), whole)
    assert inbox.tokens() == cold


@pytest.mark.promise("R20")
def test_a_full_hit_runs_no_forward_pass(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig()
    ids = prompt(100)
    r.run_prefill(ids)
    calls = []
    original = type(r.model.decoder).forward
    monkeypatch.setattr(type(r.model.decoder), "forward", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    assert r.run_prefill(ids).cached_tokens == 99
    assert calls == []


@pytest.mark.promise("R20")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_text_is_the_same_alone_and_in_a_batch_of_eight(rig: MakeRig, family: str) -> None:
    prompts = [prompt(20 + 17 * i, seed=i) for i in range(8)]
    alone = [rig(family).generate(p, 24) for p in prompts]
    r = rig(family)
    results = [r.run_prefill(p, tail_tokens=24) for p in prompts]
    hold = Watched(pause_at=1)  # keeps the engine in its first step until all are queued
    first, _ = r.start_decode(prompts[0], Sampling(max_tokens=24), results[0], method=hold)
    assert hold.reached.wait(WAIT_S)
    rest = [r.start_decode(p, Sampling(max_tokens=24), result)[0] for p, result in list(zip(prompts, results, strict=True))[1:]]
    hold.go.set()
    assert [inbox.tokens() for inbox in (first, *rest)] == alone
    assert r.decode.load().steps <= 26  # they did run together


@pytest.mark.promise("R20")
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=7, max_tokens=20),
        Sampling(temperature=1.5, top_k=20, seed=7, max_tokens=20),
        Sampling(temperature=0.8, top_p=0.9, min_p=0.01, seed=7, max_tokens=20),
    ],
)
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(rig: MakeRig, sampling: Sampling) -> None:
    r = rig()
    ids = prompt(60)
    alone = r.start_decode(ids, sampling)[0].tokens()
    assert r.start_decode(ids, sampling)[0].tokens() == alone
    mates = [r.run_prefill(prompt(40, seed=i), tail_tokens=20) for i in range(4)]
    own = r.run_prefill(ids, tail_tokens=20)
    inboxes = [
        r.start_decode(prompt(40, seed=i), Sampling(temperature=2.0, top_p=0.5, max_tokens=20), mates[i])[0] for i in range(4)
    ]
    assert r.start_decode(ids, sampling, own)[0].tokens() == alone
    for inbox in inboxes:
        inbox.tokens()
    assert r.start_decode(ids, Sampling(temperature=1.0, seed=8, max_tokens=20))[0].tokens() != alone


# -- ends ---------------------------------------------------------------------------------------------------------


def test_end_of_sequence_ends_the_text_and_is_not_part_of_it(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(60)
    text = r.generate(ids, 12)
    eos = text[5]
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=12), eos_token_ids=(eos,))
    assert inbox.tokens() == text[: text.index(eos)]
    assert inbox.seen[-1].finish_reason == "eos"
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=12, ignore_eos=True), eos_token_ids=(eos,))
    assert inbox.tokens() == text
    assert (inbox.seen[-1].finish_reason, inbox.seen[-1].keys_read_share, inbox.seen[-1].fallback_used) == ("length", 1.0, "")


def test_a_full_segment_or_context_ends_the_text_as_length(rig: MakeRig) -> None:
    r = rig()
    result = r.run_prefill(prompt(50), tail_tokens=3)  # the last token and three more fit
    inbox, _ = r.start_decode(prompt(50), Sampling(max_tokens=100), result)
    assert len(inbox.tokens()) == 4
    assert inbox.seen[-1].finish_reason == "length"
    assert result.lease.segment.n_total == result.lease.segment.capacity
    ids = prompt(2046)
    result = r.run_prefill(ids, tail_tokens=2)
    assert len(r.start_decode(ids, Sampling(max_tokens=100), result)[0].tokens()) == 3  # positions 2045, 2046 and 2047


def test_the_tail_holds_the_tokens_that_were_fed(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(50)
    result = r.run_prefill(ids)
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=10), result)
    text = inbox.tokens()
    segment = result.lease.segment
    assert segment.token_ids.tolist() == ids + text[:-1]
    assert segment.n_tokens == 49
    segment.verify()


def test_logprobs_come_with_every_token(rig: MakeRig) -> None:
    inbox, _ = rig().start_decode(prompt(30), Sampling(max_tokens=5, logprobs=3))
    ids = inbox.tokens()
    for event, token in zip(inbox.seen, ids, strict=True):
        (entry,) = event.logprobs
        assert entry[0][0] == token == entry[1][0] and len(entry) == 4
        assert 0 >= entry[1][1] >= entry[2][1] >= entry[3][1]


# -- cancellation, faults, limits ---------------------------------------------------------------------------------


@pytest.mark.promise("R6")
def test_cancel_frees_the_slot_within_one_step_and_others_go_on(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(40)
    expected = r.generate(ids, 20)
    doomed, other = Watched(pause_at=4), Watched()
    inbox, handle = r.start_decode(prompt(30, 1), Sampling(max_tokens=60), method=doomed)
    assert doomed.reached.wait(WAIT_S)
    result = r.run_prefill(ids, tail_tokens=20)
    mate, _ = r.start_decode(ids, Sampling(max_tokens=20), result, method=other)
    handle.cancel()
    doomed.go.set()
    wait(handle)
    assert doomed.steps == [1, 2, 3, 4]
    assert (doomed.closed, r.decode.load().cancelled) == ([1], 1)
    assert mate.tokens() == expected
    events = [inbox.next() for _ in range(5)]
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, Cancelled)
    assert other.closed == [1]


@pytest.mark.promise("R6")
def test_cancel_while_waiting_closes_the_retrieval_session(rig: MakeRig) -> None:
    r = rig(max_batch=1)
    busy, session = Watched(pause_at=1), Session()
    _, running = r.start_decode(prompt(30), Sampling(max_tokens=3), method=busy)
    assert busy.reached.wait(WAIT_S)
    inbox, waiting = r.start_decode(prompt(30, 1), Sampling(max_tokens=3), retrieval=session)
    assert (r.decode.load().running, r.decode.load().waiting) == (1, 1)
    waiting.cancel()
    busy.go.set()
    wait(waiting)
    wait(running)
    assert isinstance(inbox.next().error, Cancelled)
    assert session.n_closed == 1


@pytest.mark.promise("R6")
def test_cancel_after_the_end_changes_nothing(rig: MakeRig) -> None:
    r = rig()
    inbox, handle = r.start_decode(prompt(30), Sampling(max_tokens=3))
    inbox.tokens()
    wait(handle)
    handle.cancel()
    assert (r.decode.load().finished, r.decode.load().cancelled) == (1, 0)


@pytest.mark.promise("R3")
@pytest.mark.parametrize(
    "poison",
    [
        {"submit_fails_at": 3},
        {"collect_fails_at": 3},
        {"nan_at": 3},
        {"submit_fails_at": 3, "error": SystemExit},
        {"collect_fails_at": 3, "error": SystemExit},
    ],
    ids=["submit", "collect", "nan", "submit-panics", "collect-panics"],
)
def test_a_poisoned_sequence_ends_alone(rig: MakeRig, poison: dict[str, Any]) -> None:
    r = rig()
    prompts = [prompt(30 + i, seed=i) for i in range(4)]
    expected = [r.generate(p, 12) for p in prompts]
    results = [r.run_prefill(p, tail_tokens=12) for p in prompts]
    methods = [Watched(pause_at=1), Watched(), Watched(**poison), Dense()]
    inboxes = []
    for p, result, method in zip(prompts, results, methods, strict=True):
        inboxes.append(r.start_decode(p, Sampling(max_tokens=12), result, method=method)[0])
        if method.__class__ is Watched and method.pause_at:
            assert method.reached.wait(WAIT_S)
    methods[0].go.set()
    assert [inboxes[i].tokens() for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]
    events = [inboxes[2].next() for _ in range(3)]
    assert [e.token_ids[0] for e in events[:2]] == expected[2][:2]
    assert isinstance(events[2], Failed) and isinstance(events[2].error, RuntimeError | ArithmeticError)
    assert [m.closed for m in methods[:3]] == [[1], [1], [1]]
    assert r.decode.load().failed == 1
    assert results[2].lease.segment.check() is None


@pytest.mark.promise("R3")
def test_a_receiver_that_raises_ends_its_sequence_alone(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(30)
    result, method = r.run_prefill(ids), Watched()

    def refuse(event: Any) -> None:
        if isinstance(event, Tokens) and event.sequence == 2:
            raise ValueError("receiver is gone")

    wait(r.decode.submit(DecodeJob("r", result.lease.segment, ids[-1], Sampling(max_tokens=50), method), refuse))
    assert (method.closed, len(method.steps), r.decode.load().failed) == ([1], 3, 1)


def test_a_batch_is_bounded_and_the_queue_too(rig: MakeRig) -> None:
    r = rig(max_batch=2, max_waiting=1)
    results = [r.run_prefill(prompt(20, i)) for i in range(4)]
    methods = [Watched(pause_at=1), Watched(), Watched()]
    inboxes = [r.start_decode(prompt(20, 0), Sampling(max_tokens=4), results[0], method=methods[0])[0]]
    assert methods[0].reached.wait(WAIT_S)
    inboxes.append(r.start_decode(prompt(20, 1), Sampling(max_tokens=4), results[1], method=methods[1])[0])
    with pytest.raises(Overloaded, match="max_waiting=1"):
        r.start_decode(prompt(20, 2), Sampling(max_tokens=4), results[2])
    methods[0].go.set()
    inboxes[1].until(Tokens)  # admitted: the queue is free again
    inboxes.append(r.start_decode(prompt(20, 2), Sampling(max_tokens=4), results[2], method=methods[2])[0])
    for inbox in (inboxes[0], inboxes[2]):
        inbox.tokens()
    assert methods[1].closed == [1]


def test_refusals_at_submit(rig: MakeRig) -> None:
    r = rig()
    result = r.run_prefill(prompt(20))
    good = result.lease.segment
    foreign = KVSegment.create(SegmentLayout(3, 2, 16, "fp32"), 8)
    full = KVSegment.create(good.layout, 2)
    full.advance([1, 2])
    for job, error, text in (
        (DecodeJob("r", good, 3, Sampling(max_tokens=0)), InvalidRequest, "max_tokens"),
        (DecodeJob("r", good, 3, method=MethodChoice("dens")), UnknownName, "dense"),
        (DecodeJob("r", foreign, 3), Skewed, "layout"),
        (DecodeJob("r", full, 3), ContextTooLong, "capacity 2"),
    ):
        with pytest.raises(error, match=text):
            r.decode.submit(job, Inbox())
    assert r.decode.load().waiting == 0


def test_stop_ends_running_and_waiting_sequences_as_draining(rig: MakeRig) -> None:
    r = rig(max_batch=1)
    results = [r.run_prefill(prompt(20, i)) for i in range(2)]
    busy = Watched(pause_at=2)
    first, _ = r.start_decode(prompt(20, 0), Sampling(max_tokens=50), results[0], method=busy)
    assert busy.reached.wait(WAIT_S)
    second, _ = r.start_decode(prompt(20, 1), Sampling(max_tokens=50), results[1])
    stopper = threading.Thread(target=r.decode.stop)
    stopper.start()
    while not r.decode._is_stopping:
        pass
    busy.go.set()
    stopper.join(WAIT_S)
    ends = []
    for inbox in (first, second):
        event = inbox.next()
        while isinstance(event, Tokens):
            event = inbox.next()
        ends.append(type(event.error))
    assert (ends, busy.closed) == ([Draining, Draining], [1])
    with pytest.raises(Draining):
        r.start_decode(prompt(20, 1), Sampling(), results[1])


# -- methods bound to the model -----------------------------------------------------------------------------------

DUO = {"sink": "8", "recent": "32"}


class RowsMasked:
    """One forward pass over a whole text. Rows from `first_row` on read, in KV heads that stream, j < sink and i - j < recent."""

    def __init__(self, streaming: torch.Tensor, sink: int, recent: int, first_row: int) -> None:
        self.streaming, self.sink, self.recent, self.first_row = streaming, sink, recent, first_row

    def attend(self, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, raw: Any) -> torch.Tensor:
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
        kept = (j < self.sink) | (i - j < self.recent) | (i < self.first_row)
        group = layer.n_q_heads // layer.n_kv_heads
        mask = (j <= i) & (kept | ~self.streaming[layer.idx][:, None, None]).repeat_interleave(group, 0)
        z = (q @ k.repeat_interleave(group, 0).transpose(1, 2) * layer.scale).masked_fill(~mask, -torch.inf)
        return torch.softmax(z, -1) @ v.repeat_interleave(group, 0)


def masked_text(model: LoadedModel, ids: list[int], text: list[int], backend: RowsMasked) -> list[int]:
    """The greedy choice after each token of `text`'s own past, by one forward pass over all of it."""
    tokens = torch.tensor(ids + text[:-1])
    hidden = model.decoder.forward(tokens, torch.arange(len(tokens)), backend)
    chosen: list[int] = model.decoder.logits(hidden[len(ids) - 1 :]).argmax(-1).tolist()
    return chosen


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_HOME", str(tmp_path / "home"))


@pytest.fixture
def calibrated(own_home: None, tmp_path: Path) -> LoadedModel:
    """Of 2 KV heads: in layer 0 the first streams, in layer 1 both, in layer 2 none, in layer 3 the second."""
    folder = make_tiny_model(tmp_path / "four-layers", num_hidden_layers=4)
    model = load_model(str(folder), dtype="fp32", device="cpu")
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.1], [0.8, 0.7], [0.9, 0.3]])
    calibration.save("duoattention", model.fingerprint, {"scores": scores}, {})
    return model


@pytest.mark.parametrize("prefill", [None, MethodChoice("duoattention", DUO)], ids=["dense", "duoattention"])
def test_duoattention_decodes_what_the_masked_model_says(rig: MakeRig, calibrated: LoadedModel, prefill: Any) -> None:
    r = rig(model=calibrated)
    ids = prompt(100)
    result = r.run_prefill(ids, tail_tokens=24, method=prefill)
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=24), result, method=MethodChoice("duoattention", DUO))
    text = inbox.tokens()
    streaming = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    rule = RowsMasked(streaming, 8, 32, first_row=0 if prefill else 99)
    assert text == masked_text(calibrated, ids, text, rule)
    assert text != masked_text(calibrated, ids, text, RowsMasked(streaming, 8, 32, first_row=999))  # the rule shows in the text
    cached = sum(range(100, 124))  # by each of 8 KV heads, 4 of which stream
    share = (4 * cached + 4 * 24 * 40) / (8 * cached)
    assert inbox.seen[-1].keys_read_share == pytest.approx(share)
    assert inbox.seen[-1].fallback_used == ""


def test_duoattention_after_its_prefill_equals_one_prefill_of_the_whole_text(rig: MakeRig, calibrated: LoadedModel) -> None:
    r = rig(model=calibrated)
    ids, rule = prompt(100), MethodChoice("duoattention", DUO)
    result = r.run_prefill(ids, tail_tokens=24, method=rule)
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=24), result, method=rule)
    whole = ids + inbox.tokens()
    segment = result.lease.segment
    assert segment.n_total == 123
    once, dense = (rig(model=calibrated).run_prefill(whole, method=method).lease.segment for method in (rule, None))
    assert once.n_tokens == 123
    torch.testing.assert_close(segment.kv[..., :123, :], once.kv[..., :123, :], atol=2e-5, rtol=2e-5)
    assert (segment.kv[1:, ..., 100:123, :] - dense.kv[1:, ..., 100:123, :]).abs().amax() > 0.01


def test_duoattention_without_a_streaming_head_gives_the_dense_text(rig: MakeRig, own_home: None) -> None:
    r = rig()
    ids = prompt(100)
    expected = r.generate(ids, 24)
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=24), method=MethodChoice("duoattention", {**DUO, "sparsity": "0"}))
    assert inbox.tokens() == expected
    assert inbox.seen[-1].keys_read_share == 1.0


def test_a_method_that_is_not_calibrated_is_refused_at_submit(rig: MakeRig, own_home: None) -> None:
    r, session = rig(), Session()
    result = r.run_prefill(prompt(20))
    with pytest.raises(Unsupported, match="winnow calibrate duoattention"):
        r.decode.submit(
            DecodeJob("r", result.lease.segment, 3, method=MethodChoice("duoattention"), retrieval=session),  # type: ignore[arg-type]
            Inbox(),
        )
    assert (r.decode.load().waiting, session.n_closed) == (0, 0)


def test_a_method_is_bound_to_the_model_once_and_what_it_returns_is_opened(rig: MakeRig) -> None:
    models = []

    class Bindable(Watched):
        def bind(self, model: LoadedModel) -> DecodeMethod:
            models.append(model)
            return bound

    r, bound = rig(), Bindable()
    r.start_decode(prompt(30), Sampling(max_tokens=5), method=Bindable())[0].tokens()
    assert models == [r.model]
    assert (bound.steps, bound.closed) == ([1, 2, 3, 4, 5], [1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_duoattention_with_the_shipped_classes_decodes_what_the_masked_model_says(rig: MakeRig) -> None:
    model = load_model("default", dtype="fp32", device="cpu")
    ids = model.tokenizer.encode("The old mill stood by the river, and nobody had opened its door since the great flood. " * 12)
    r = rig(model=model)
    inbox, _ = r.start_decode(ids, Sampling(max_tokens=12), method=MethodChoice("duoattention", DUO))
    text = inbox.tokens()
    classes = duo_prefill.DuoAttention().bind(model).classes
    assert classes is not None and sum(classes.counts) == 45
    assert text == masked_text(model, ids, text, RowsMasked(classes.streaming, 8, 32, first_row=len(ids) - 1))
    cached = sum(range(len(ids), len(ids) + 12))
    assert inbox.seen[-1].keys_read_share == pytest.approx((45 * cached + 45 * 12 * 40) / (90 * cached))
