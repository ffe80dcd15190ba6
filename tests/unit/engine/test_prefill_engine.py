from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from winnow.errors import Cancelled, ContextTooLong, Draining, InvalidRequest, Overloaded, UnknownName
from winnow.index.key_tiles import KeyTiles
from winnow.registry import Capabilities
from winnow.types import Document, MethodChoice
from winnow.workers.attention.plan import TilePlan
from winnow.workers.prefill.base import PrefillMethod
from winnow.workers.prefill.costs import DeviceCosts, MethodCosts, Size
from winnow.workers.prefill.job import Failed, PrefillJob, PrefillResult, Progress, RankJob, RankResult
from winnow.workers.prefill.methods.dense import Dense
from winnow.workers.prefill.methods.flashprefill import FlashPrefill
from winnow.workers.prefill.methods.flexprefill import FlexPrefill
from winnow.workers.prefill.methods.recall import Recall
from winnow.workers.prefill.prompt import plan_passes
from winnow.workers.ranking.base import RankContext, Ranker

from .conftest import WAIT_S, Inbox, Rig, prompt, wait

MakeRig = Callable[..., Rig]


@dataclass(frozen=True)
class Gate(PrefillMethod):
    """Dense attention that lets a test stop the engine inside a forward pass."""

    caps: ClassVar[Capabilities] = Capabilities(prefix_safe=True)
    name: ClassVar[str] = "gate"
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    calls: list[int] = field(default_factory=list)

    def plan(self, q: Any, k: Any, layer: Any, raw: Any = None) -> TilePlan | None:
        self.calls.append(layer.idx)
        self.reached.set()
        assert self.go.wait(WAIT_S)
        return None


@dataclass(frozen=True)
class Tail(PrefillMethod):
    """Own keys and the last `recent` ones: approximate, and steered by nothing."""

    caps: ClassVar[Capabilities] = Capabilities(chunked=True, prefix_safe=True)
    name: ClassVar[str] = "tail"
    recent: int = 16

    def plan(self, q: Any, k: Any, layer: Any, raw: Any = None) -> TilePlan | None:
        return TilePlan.streaming(batch=1, mask_heads=1, n_rows=q.shape[2], n_keys=k.shape[2], sink=0, recent=self.recent)


@dataclass(frozen=True)
class Broken(PrefillMethod):
    caps: ClassVar[Capabilities] = Capabilities()
    name: ClassVar[str] = "broken"
    error: BaseException

    def plan(self, q: Any, k: Any, layer: Any, raw: Any = None) -> TilePlan | None:
        raise self.error


class Panic(BaseException):
    """As what comes out of a library's native code."""


def kv_of(result: PrefillResult) -> torch.Tensor:
    segment = result.lease.segment
    return segment.kv[:, :, :, : segment.n_tokens].clone()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3"])
def test_chunks_give_the_kv_of_the_whole_prompt(rig: MakeRig, family: str) -> None:
    ids = prompt(150)
    kv = [kv_of(rig(family, chunk_tokens=c).run_prefill(ids)) for c in (0, 64, 37, 1)]
    for other in kv[1:]:
        torch.testing.assert_close(other, kv[0], atol=2e-5, rtol=2e-5)


def test_result_names_a_sealed_segment_of_all_but_the_last_token(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(100)
    result = r.run_prefill(ids, tail_tokens=7)
    segment = r.store.get(result.segment)
    assert segment.token_ids.tolist() == ids[:-1]
    assert (result.segment.n_tokens, segment.n_tokens, segment.capacity) == (99, 99, 99 + 1 + 7)
    assert (result.density, result.cached_tokens) == (1.0, 0)
    assert result.queue_s >= 0 and result.work_s > 0
    segment.verify()


def test_progress_counts_tokens_up_to_the_whole_prompt(rig: MakeRig) -> None:
    r = rig(chunk_tokens=32)
    inbox = Inbox()
    r.prefill.submit(PrefillJob("r", prompt(100)), inbox)
    r.results.append(inbox.until(PrefillResult))
    done = [0, 16, 32, 48, 64, 80, 96, 97, 99]  # of two layers, the first counts as half its chunk
    assert [(p.done, p.total) for p in inbox.seen[:-1]] == [(d, 99) for d in done]


def test_a_prompt_of_one_token_needs_no_forward_pass(rig: MakeRig) -> None:
    r = rig()
    result = r.run_prefill(prompt(1))
    assert (result.segment.n_tokens, result.density) == (0, 1.0)
    assert len(r.generate(prompt(1), 5)) == 5


def test_no_cache_neither_reads_nor_fills_the_cache(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(100)
    r.run_prefill(ids, no_cache=True)
    assert r.run_prefill(ids).cached_tokens == 0
    assert r.run_prefill(ids, no_cache=True).cached_tokens == 0


def test_another_tenant_sees_no_hit(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(100)
    r.run_prefill(ids, tenant="a")
    assert r.run_prefill(ids, tenant="b").cached_tokens == 0
    assert r.run_prefill(ids, tenant="a").cached_tokens == 99


def test_query_sample_holds_queries_of_spread_positions(rig: MakeRig) -> None:
    chunked, whole = (rig(chunk_tokens=c).run_prefill(prompt(100), query_sample=8) for c in (16, 0))
    for layer in range(2):
        sample = chunked.lease.segment.query_sample(layer)
        assert sample.shape == (4, 8, 16)
        torch.testing.assert_close(sample, whole.lease.segment.query_sample(layer), atol=2e-5, rtol=2e-5)
        assert len(torch.unique(sample[0, :, 0])) == 8


# -- methods and the cache ----------------------------------------------------------------------------------------


SPARSE = FlexPrefill(gamma=0.5, min_budget=32, block=32)


@pytest.mark.promise("R20")
def test_a_method_that_is_not_prefix_safe_never_enters_the_shared_cache(rig: MakeRig) -> None:
    r = rig()
    shared = prompt(400)
    first, second = shared + prompt(30, 1), shared + prompt(30, 2)
    assert r.run_prefill(first, method=SPARSE).density < 1.0
    assert r.run_prefill(second, method=SPARSE).cached_tokens == 0
    assert r.run_prefill(second).cached_tokens == 0  # dense requests see nothing of it either
    assert r.run_prefill(first).cached_tokens >= 384  # the dense one was shared
    assert r.prefill.load().approximate == 2


@pytest.mark.promise("R20")
def test_kv_of_an_approximate_method_is_not_given_to_dense_requests_though_prefix_safe(rig: MakeRig) -> None:
    r = rig()
    ids = prompt(200)
    assert r.run_prefill(ids, method=Tail()).density < 1.0
    assert r.run_prefill(ids, method=Tail(recent=8)).cached_tokens == 0
    assert r.run_prefill(ids).cached_tokens == 0
    assert r.run_prefill(ids, method=Tail()).cached_tokens == 199


@pytest.mark.promise("R20")
@pytest.mark.parametrize(
    "method",
    [SPARSE, Recall(recall=0.7, block=32, every=8), FlashPrefill(block=32, sink_tiles=1, window_tiles=1, alpha=0.7), Tail()],
    ids=lambda m: m.name,
)
def test_whole_chunks_of_a_sparse_method_serve_every_prompt_that_begins_with_them(rig: MakeRig, method: PrefillMethod) -> None:
    """Whatever steers the method, the KV is that of a cold run to the last bit, for no other method's request, and no tail."""
    shared = prompt(400)
    one, two = shared + prompt(60, 1), shared + prompt(75, 2)
    warm, cold = rig(sparse_chunk_tokens=96), rig(sparse_chunk_tokens=96)
    assert warm.run_prefill(one, method=method).cached_tokens == 0
    found, fresh = warm.run_prefill(two, method=method), cold.run_prefill(two, method=method)
    assert (found.cached_tokens, fresh.cached_tokens) == (384, 0), "four chunks of 96, not the 16 tokens of the fifth"
    assert fresh.density < 1.0 and torch.equal(kv_of(found), kv_of(fresh))
    assert warm.run_prefill(shared[:200], method=method).cached_tokens == 192, "a shorter prompt takes fewer chunks"
    assert warm.run_prefill(two).cached_tokens == 0, "a dense request takes none of it"
    assert warm.run_prefill(shared + prompt(60, 3), method=method, context_tokens=300).cached_tokens == 288


@pytest.mark.promise("R20")
def test_the_end_of_a_prompt_stays_dense_and_joins_no_chunk(rig: MakeRig) -> None:
    """Of 400 tokens (the last is not prefilled) the last 64 are dense: with one KV head's own keys kept they equal dense rows."""
    method, ids = Tail(recent=16), prompt(401)
    r = rig(sparse_chunk_tokens=96, dense_tail_tokens=64)
    found = r.run_prefill(ids, method=method)
    sparse = sum(min(i + 1, 16) for i in range(336))
    dense = sum(i + 1 for i in range(336, 400))
    assert found.density == pytest.approx((sparse + dense) / (400 * 401 / 2), rel=1e-6)
    assert r.run_prefill(ids[:350] + prompt(60, 1), method=method).cached_tokens == 288, "chunks that end before its own tail"
    assert r.run_prefill(ids[:336] + prompt(65, 1), method=method).cached_tokens == 288, "not to where its tail begins"
    assert r.run_prefill(ids, method=method).cached_tokens == 400
    assert r.run_prefill(ids, method=method, context_tokens=400).cached_tokens == 288, "a context has no tail"
    assert r.run_prefill(prompt(41, 2), method=method, no_cache=True).density < 1.0, "a prompt shorter than the tail is planned"


def test_the_end_of_a_prompt_shares_the_pass_before_it_and_a_context_ends_its_own() -> None:
    method, dense = Tail(), Dense()

    def passes(n: int, cached: int = 0, context: int = 0, by: PrefillMethod = method) -> list[tuple[int, int, int]]:
        found = plan_passes(by, n, cached, context, chunk=96, tail=64)
        assert all((one.method is None) == (one.planned == 0) for one in found)
        return [(one.start, one.end, one.planned) for one in found]

    assert passes(64) == [(0, 64, 64)], "a prompt no longer than the tail is planned"
    assert passes(90) == [(0, 90, 26)]
    assert passes(200) == [(0, 96, 96), (96, 192, 40), (192, 200, 0)]
    assert passes(200, cached=96) == [(96, 192, 40), (192, 200, 0)]
    assert passes(200, context=120) == [(0, 96, 96), (96, 120, 24), (120, 200, 0)]
    assert passes(200, cached=120, context=120) == [(120, 200, 0)]
    assert passes(200, cached=200) == []
    assert passes(200, cached=7, by=dense) == [(7, 103, 0), (103, 199, 0), (199, 200, 0)]


@pytest.mark.promise("R20")
def test_chunks_from_the_cache_change_no_later_choice_between_sparse_and_dense(
    rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first chunk the method keeps everything and its plans are dropped; that must not steer what follows it."""
    size = Size(96, 96, 4, 16).attended(1.0)[0]
    costs = DeviceCosts((1.0 / size, 0.0, 0.0), {"tail": MethodCosts((1.05 / size, 0.0, 0.0), (0.2 / size, 0.0, 0.0), 1.0)})
    monkeypatch.setattr("winnow.workers.prefill.worker.costs_of", lambda device, dtype: costs)
    monkeypatch.setattr(MethodCosts, "usual_density", lambda self, keys, params: 0.5)
    method, ids, others = Tail(recent=96), prompt(97), prompt(300, 1)
    first, longer = ids, ids[:96] + others
    warm, cold = (rig(sparse_chunk_tokens=96, break_even=True) for _ in range(2))
    assert warm.run_prefill(first, method=method).passes == {"too_dense": 1, "no_gain": 1}
    found, fresh = warm.run_prefill(longer, method=method), cold.run_prefill(longer, method=method)
    assert found.cached_tokens == 96 and 0 < fresh.dense_share < 1
    assert torch.equal(kv_of(found), kv_of(fresh))


@pytest.mark.promise("R20")
def test_a_context_planned_alone_is_reused_exactly_under_other_questions(rig: MakeRig) -> None:
    r = rig()
    context, one, two = prompt(400), prompt(30, 1), prompt(45, 2)
    cold = rig()
    r.run_prefill(context + one, method=SPARSE, context_tokens=400)
    warm = r.run_prefill(context + two, method=SPARSE, context_tokens=400)
    assert warm.cached_tokens == 400
    fresh = cold.run_prefill(context + two, method=SPARSE, context_tokens=400)
    assert fresh.cached_tokens == 0 and fresh.density < 1.0
    assert torch.equal(kv_of(warm)[:, :, :, :400], kv_of(fresh)[:, :, :, :400])
    assert cold.generate(context + two, 16, SPARSE, context_tokens=400) == r.generate(
        context + two, 16, SPARSE, context_tokens=400
    )
    # Another context length is another plan.
    assert r.run_prefill(context + two, method=SPARSE, context_tokens=390).cached_tokens == 0


def test_flexprefill_that_covers_everything_equals_dense(rig: MakeRig) -> None:
    ids = prompt(300)
    everything = rig().run_prefill(ids, method=FlexPrefill(gamma=1.0, tau=0.0, min_budget=32, block=32))
    torch.testing.assert_close(kv_of(everything), kv_of(rig().run_prefill(ids)), atol=2e-5, rtol=2e-5)


def test_density_is_weighted_by_causal_pairs_with_dense_parts_counted_whole(rig: MakeRig) -> None:
    r = rig(chunk_tokens=0)
    recent, n = 16, 200
    result = r.run_prefill(prompt(n + 1), method=Tail(recent=recent), no_cache=True)
    kept = sum(min(i + 1, recent) for i in range(n))
    assert result.density == pytest.approx(kept / (n * (n + 1) / 2), rel=1e-6)
    chunked = rig(sparse_chunk_tokens=48).run_prefill(prompt(n + 1), method=Tail(recent=recent), no_cache=True)
    assert chunked.density == pytest.approx(result.density, rel=1e-6)


def test_recall_of_a_sparse_method_is_measured_and_a_dense_one_has_none(rig: MakeRig) -> None:
    r, ids = rig(chunk_tokens=0), prompt(400)
    found = r.run_prefill(ids, method=SPARSE)
    assert found.recall is not None and 0.0 < found.recall < 1.0
    assert rig(chunk_tokens=0).run_prefill(ids, method=SPARSE).recall == found.recall, "the same rows each time"
    again = r.run_prefill(ids, method=SPARSE)
    assert (again.cached_tokens, again.recall) == (399, None), "nothing was computed"
    assert r.run_prefill(ids).recall is None


def test_where_a_method_would_not_pay_its_layers_run_dense_and_the_result_says_so(rig: MakeRig) -> None:
    """400 tokens are fewer than any method was measured to gain by: the KV is that of a dense run, bit by bit."""
    ids = prompt(400)
    choosing, dense = rig(break_even=True, chunk_tokens=0), rig(chunk_tokens=0).run_prefill(ids)
    found = choosing.run_prefill(ids, method=SPARSE)
    assert torch.equal(kv_of(found), kv_of(dense))
    assert (found.density, found.recall, found.dense_share) == (1.0, 1.0, 1.0)
    assert found.passes == {"too_short": 2}
    assert choosing.run_prefill(ids).passes == {}, "a dense method has nothing to choose"
    assert choosing.prefill.load().approximate == 0
    forced = rig(chunk_tokens=0).run_prefill(ids, method=SPARSE)
    assert (forced.density < 1.0, forced.passes, forced.dense_share) == (True, {}, 0.0)


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of keys that were pooled, one for each layer and chunk."""
    seen: list[int] = []

    def counting(self: KeyTiles, name: Any, k: torch.Tensor, tile: int, compute: Any) -> torch.Tensor:
        return extended(self, name, k, tile, lambda keys, at: (seen.append(keys.shape[2]), compute(keys, at))[1])

    extended = KeyTiles.extended
    monkeypatch.setattr(KeyTiles, "extended", counting)
    return seen


def test_the_engine_keeps_a_methods_state_for_one_prompt_and_the_kv_is_the_same(
    rig: MakeRig, pooled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = FlashPrefill(dense_tail=0, block=32, sink_tiles=1, window_tiles=1, alpha=0.7)
    ids = prompt(513)
    with_state = rig(sparse_chunk_tokens=128)
    first = with_state.run_prefill(ids, method=method, no_cache=True)
    again = with_state.run_prefill(ids, method=method, no_cache=True)
    assert pooled == [128] * 2 * 4 * 2, "of two layers, four chunks and two prompts: each key once"
    monkeypatch.setattr(FlashPrefill, "for_prompt", lambda self, known: self)
    without = rig(sparse_chunk_tokens=128).run_prefill(ids, method=method, no_cache=True)
    assert first.density < 1.0 and torch.equal(kv_of(first), kv_of(without)) and torch.equal(kv_of(again), kv_of(without))


def test_pooled_keys_come_with_the_kv_out_of_the_cache(rig: MakeRig, pooled: list[int]) -> None:
    method = FlashPrefill(dense_tail=0, block=32, sink_tiles=1, window_tiles=1, alpha=0.7)
    common = prompt(384)
    one, other = common + prompt(129, 1), common + prompt(129, 2)
    caching = rig(sparse_chunk_tokens=128)
    caching.run_prefill(one, method=method)
    pooled.clear()
    again = caching.run_prefill(other, method=method)
    assert again.cached_tokens == 384 and pooled == [128] * 2, "of the last chunk only, in two layers"
    alone = rig(sparse_chunk_tokens=128).run_prefill(other, method=method)
    assert again.density < 1.0 and torch.equal(kv_of(again), kv_of(alone))


def test_method_by_name_and_its_mistakes(rig: MakeRig) -> None:
    r = rig()
    choice = MethodChoice("flexprefill", {"gamma": "0.5", "min_budget": "32", "block": "32"})
    assert r.run_prefill(prompt(400), method=choice).density < 1.0
    for wrong, error in ((MethodChoice("flexprefil"), UnknownName), (MethodChoice("flexprefill", {"gama": "1"}), InvalidRequest)):
        inbox = Inbox()
        wait(r.prefill.submit(PrefillJob("r", prompt(20), method=wrong), inbox))
        assert isinstance(inbox.next().error, error)


# -- order, cancellation, faults ----------------------------------------------------------------------------------


@pytest.mark.promise("R2")
@pytest.mark.parametrize("chunk_tokens", [64, 0])
def test_a_short_prompt_overtakes_a_long_one(rig: MakeRig, chunk_tokens: int) -> None:
    r = rig(chunk_tokens=chunk_tokens)
    gate, finished = Gate(), []
    long, short = Inbox(), Inbox()
    r.prefill.submit(PrefillJob("long", prompt(900), method=gate), lambda e: (finished.append("long"), long(e)))
    assert gate.reached.wait(WAIT_S)  # its first step is under way
    r.prefill.submit(PrefillJob("short", prompt(50, 1)), lambda e: (finished.append("short"), short(e)))
    gate.go.set()
    r.results += [short.until(PrefillResult), long.until(PrefillResult)]
    last_of = {name: max(i for i, n in enumerate(finished) if n == name) for name in ("long", "short")}
    assert last_of["short"] < last_of["long"]
    steps_between = finished[: last_of["short"]].count("long")
    assert steps_between <= 2  # "begun", and the step that was under way


@pytest.mark.promise("R6")
@pytest.mark.parametrize("chunk_tokens", [64, 0])
def test_cancel_in_the_middle_frees_everything_within_a_step(rig: MakeRig, chunk_tokens: int) -> None:
    r = rig(chunk_tokens=chunk_tokens)
    gate, inbox = Gate(), Inbox()
    handle = r.prefill.submit(PrefillJob("r", prompt(900), method=gate), inbox)
    assert gate.reached.wait(WAIT_S)
    handle.cancel()
    gate.go.set()
    wait(handle)
    assert isinstance(inbox.next(), Progress)
    event = inbox.next()
    while isinstance(event, Progress):
        event = inbox.next()
    assert isinstance(event.error, Cancelled)
    assert len(gate.calls) <= 1  # one layer, of a chunk or of the whole prompt
    r.assert_idle()
    assert r.store.stats().segments == 0


@pytest.mark.promise("R6")
def test_cancel_while_queued_ends_before_any_work(rig: MakeRig) -> None:
    r = rig()
    gate, first, queued = Gate(), Inbox(), Inbox()
    running = r.prefill.submit(PrefillJob("a", prompt(20), method=gate), first)
    assert gate.reached.wait(WAIT_S)
    waiting = r.prefill.submit(PrefillJob("b", prompt(500)), queued)
    assert r.prefill.load().waiting == 1
    waiting.cancel()
    gate.go.set()
    wait(waiting)
    assert [type(e) for e in (queued.next(),)] == [Failed]
    wait(running)
    r.results.append(first.until(PrefillResult))
    assert r.prefill.load().cancelled == 1


@pytest.mark.promise("R3")
@pytest.mark.parametrize("error", [RuntimeError("no plan today"), Panic("no plan today"), SystemExit("no plan today")])
def test_a_failing_method_fails_its_job_alone(rig: MakeRig, error: BaseException) -> None:
    r = rig()
    inbox = Inbox()
    wait(r.prefill.submit(PrefillJob("r", prompt(100), method=Broken(error)), inbox))
    events = [inbox.next(), inbox.next()]
    assert isinstance(events[1], Failed) and isinstance(events[1].error, RuntimeError)
    assert str(events[1].error).endswith("no plan today")
    r.assert_idle()
    assert r.run_prefill(prompt(100)).segment.n_tokens == 99


@pytest.mark.promise("R3")
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_receiver_that_raises_loses_its_job_and_nothing_else(rig: MakeRig, error: type[BaseException]) -> None:
    r = rig()

    def refuse(event: Any) -> None:
        if isinstance(event, PrefillResult):
            raise error("receiver is gone")

    wait(r.prefill.submit(PrefillJob("r", prompt(100)), refuse))
    r.assert_idle()
    assert r.prefill.load().failed == 1
    assert r.run_prefill(prompt(100)).cached_tokens == 99  # its work was published


def test_the_waiting_queue_is_bounded(rig: MakeRig) -> None:
    r = rig(max_waiting=2)
    gate, inboxes = Gate(), [Inbox() for _ in range(3)]
    r.prefill.submit(PrefillJob("a", prompt(20), method=gate), inboxes[0])
    assert gate.reached.wait(WAIT_S)
    for i in (1, 2):
        r.prefill.submit(PrefillJob(str(i), prompt(30)), inboxes[i])
    with pytest.raises(Overloaded, match="max_waiting=2"):
        r.prefill.submit(PrefillJob("d", prompt(30)), Inbox())
    gate.go.set()
    r.results += [i.until(PrefillResult) for i in inboxes]


def test_refusals_at_submit_name_the_field(rig: MakeRig) -> None:
    r = rig()
    for job, error, text in (
        (PrefillJob("r", []), InvalidRequest, "token_ids"),
        (PrefillJob("r", [3], tail_tokens=-1), InvalidRequest, "tail_tokens"),
        (PrefillJob("r", [3], context_tokens=2), InvalidRequest, "context_tokens"),
        (PrefillJob("r", prompt(2000), tail_tokens=49), ContextTooLong, "2048"),
    ):
        with pytest.raises(error, match=text):
            r.prefill.submit(job, Inbox())
    r.prefill.submit(PrefillJob("r", prompt(2000), tail_tokens=48), inbox := Inbox())
    r.results.append(inbox.until(PrefillResult))


def test_stop_ends_every_job_as_draining(rig: MakeRig) -> None:
    r = rig()
    gate, inboxes = Gate(), [Inbox(), Inbox()]
    r.prefill.submit(PrefillJob("a", prompt(900), method=gate), inboxes[0])
    assert gate.reached.wait(WAIT_S)
    r.prefill.submit(PrefillJob("b", prompt(900)), inboxes[1])
    stopper = threading.Thread(target=r.prefill.stop)
    stopper.start()
    while not r.prefill._is_stopping:
        pass
    gate.go.set()
    stopper.join(WAIT_S)
    for inbox in inboxes:
        event = inbox.next()
        while isinstance(event, Progress):
            event = inbox.next()
        assert isinstance(event.error, Draining)
    with pytest.raises(Draining):
        r.prefill.submit(PrefillJob("c", prompt(9)), Inbox())
    r.assert_idle()


# -- ranking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slow(Ranker):
    """Scores by length; one breath per document, held by the test at the first one."""

    caps: ClassVar[Capabilities] = Capabilities()
    name: ClassVar[str] = "slow"
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def scores(self, query: str, documents: Sequence[Document], ctx: RankContext) -> list[tuple[float, bool]]:
        out = []
        for i, document in enumerate(documents):
            self.reached.set()
            assert self.go.wait(WAIT_S)
            ctx.check_cancelled()
            out.append((float(len(document.text)), False))
            ctx.on_progress(i + 1, len(documents))
        return out


DOCUMENTS = [Document(str(i), "x" * (400 + i)) for i in range(6)]


@pytest.mark.promise("R2")
def test_a_short_prompt_runs_between_the_passes_of_a_ranking(rig: MakeRig) -> None:
    r = rig()
    slow, ranked, short, finished = Slow(), Inbox(), Inbox(), []
    r.prefill.submit_rank(RankJob("rank", "q", DOCUMENTS, slow), lambda e: (finished.append(type(e)), ranked(e)))
    assert slow.reached.wait(WAIT_S)
    r.prefill.submit(PrefillJob("short", prompt(50)), lambda e: (finished.append(type(e)), short(e)))
    slow.go.set()
    r.results.append(short.until(PrefillResult))
    ranking = ranked.until(RankResult).ranking
    assert [d.doc_id for d in ranking.items] == ["5", "4", "3", "2", "1", "0"]
    assert finished.index(PrefillResult) < finished.index(RankResult)


@pytest.mark.promise("R6")
def test_a_cancelled_ranking_ends_at_its_next_pass(rig: MakeRig) -> None:
    r = rig()
    slow, inbox = Slow(), Inbox()
    handle = r.prefill.submit_rank(RankJob("rank", "q", DOCUMENTS, slow), inbox)
    assert slow.reached.wait(WAIT_S)
    handle.cancel()
    slow.go.set()
    wait(handle)
    assert isinstance(inbox.next().error, Cancelled)
    r.assert_idle()


@pytest.mark.parametrize("name", ["likelihood", "icr"])
def test_the_rankers_run_in_the_engine(rig: MakeRig, name: str) -> None:
    r = rig()
    documents = [Document(str(i), text) for i, text in enumerate(["the cat", "a dog and a cat", "on the other hand"])]
    inbox = Inbox()
    r.prefill.submit_rank(RankJob("rank", "cat", documents, MethodChoice(name)), inbox)
    ranking = inbox.until(RankResult).ranking
    assert sorted(d.doc_id for d in ranking.items) == ["0", "1", "2"]


def test_dense_is_the_default_method(rig: MakeRig) -> None:
    r = rig()
    assert r.prefill._method(None) == Dense()
