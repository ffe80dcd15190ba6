"""Parts of the gateway by themselves: admission, stop strings, running calls, routing with a failing store, capabilities."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from winnow.config import WinnowConfig
from winnow.errors import Cancelled, Conflict, Draining, Overloaded, Unsupported, WorkerLost
from winnow.metadata import MetadataUnavailable
from winnow.orchestration.embedded import EmbeddedServer
from winnow.orchestration.metadata import RedisMetadata
from winnow.proto.v1 import internal_pb2
from winnow.registry import Capabilities, Registry
from winnow.services.common.links import Links
from winnow.services.gateway.admission import Admission
from winnow.services.gateway.calls import Calls
from winnow.services.gateway.router import Router, Worker, mismatch
from winnow.services.gateway.text import StopMatcher
from winnow.services.gateway.validation import Served, check_capabilities
from winnow.types import Fingerprint, WorkerInfo
from winnow.wire import PROTOCOL, worker_to_proto
from winnow.workers.attention.backend import LayerSpec

PRINT = Fingerprint(PROTOCOL, "model", "layout", "fp32", 1, ("dense@1", "sparse@2"))


@pytest.mark.promise("R1")
async def test_places_are_given_in_the_order_of_arrival_and_never_exceeded() -> None:
    admission = Admission(2, 3)
    tickets = [admission.enter() for _ in range(5)]
    assert [t.is_waiting for t in tickets] == [False, False, True, True, True]
    with pytest.raises(Overloaded) as caught:
        admission.enter()
    assert 100 <= caught.value.retry_after_ms <= 30_000
    for leaving, starting in ((tickets[1], tickets[2]), (tickets[0], tickets[3])):
        with leaving:
            pass
        assert not starting.is_waiting
        admission.check()
    assert tickets[4].is_waiting
    for ticket in tickets[2:]:
        with ticket:
            await ticket.turn()
        admission.check()
    assert (admission.inflight, admission.queued) == (0, 0)


@pytest.mark.promise("R1")
def test_admission_holds_its_invariants_over_random_arrivals_and_departures() -> None:
    rng = random.Random(7)
    for _ in range(50):
        admission = Admission(rng.randint(1, 4), rng.randint(0, 4))
        inside: list[Any] = []
        for _ in range(60):
            if rng.random() < 0.6:
                try:
                    inside.append(admission.enter())
                except Overloaded:
                    assert len(inside) == admission.max_inflight + admission.max_queue
            elif inside:
                with inside.pop(rng.randrange(len(inside))):
                    pass
            admission.check()
            assert len(inside) == admission.inflight + admission.queued


def test_stop_strings_are_found_however_the_text_is_cut() -> None:
    rng = random.Random(3)
    for _ in range(500):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 20)))
        at = min((text.find(s) for s in stops if s in text), default=-1)
        # what a reader sees depends on the order in which characters come: the first stop string to be complete ends it
        ends = [text.find(s) + len(s) for s in stops if s in text]
        matcher, shown, stopped, i = StopMatcher(stops), "", False, 0
        while i < len(text) and not stopped:
            piece, stopped = matcher.push(text[i : i + 1])
            shown, i = shown + piece, i + 1
        if at < 0:
            assert not stopped and shown + matcher.flush() == text
        else:
            assert stopped and i == min(ends)
            assert not any(s in shown for s in stops)
            assert text.startswith(shown)


async def test_a_call_ended_from_outside_raises_its_reason_and_stops_its_work() -> None:
    calls = Calls()
    started, stopped = asyncio.Event(), asyncio.Event()

    async def work(emit: Any) -> None:
        await emit(1)
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.set()
            raise

    with calls.running("t", "a") as call:
        with pytest.raises(Conflict), calls.running("t", "a"):
            pass

        async def read() -> list[int]:
            return [item async for item in call.events(work, 2)]

        reader = asyncio.create_task(read())
        await started.wait()
        calls.find("t", "a").end(Cancelled("enough"))
        with pytest.raises(Cancelled, match="enough"):
            await reader
        assert stopped.is_set()
    assert len(calls) == 0


async def test_a_slow_reader_holds_back_the_work_at_the_buffers_size_and_loses_nothing() -> None:
    emitted: list[int] = []

    async def work(emit: Any) -> None:
        for i in range(50):
            await emit(i)
            emitted.append(i)

    with Calls().running("t", "a") as call:
        events = call.events(work, 4)
        read = []
        async for item in events:
            read.append(item)
            assert len(emitted) <= len(read) + 5
    assert read == list(range(50))


async def test_an_error_of_the_work_comes_after_what_it_emitted() -> None:
    async def work(emit: Any) -> None:
        await emit(1)
        raise WorkerLost("gone")

    read = []
    with Calls().running("t", "a") as call, pytest.raises(WorkerLost):
        async for item in call.events(work, 4):
            read.append(item)
    assert read == [1]


@pytest.mark.promise("R18")
async def test_draining_refuses_new_calls_and_ends_the_rest_after_the_grace() -> None:
    calls = Calls()

    async def one() -> None:
        with calls.running("t", "a") as call:
            async for _ in call.events(lambda emit: asyncio.Event().wait(), 1):  # type: ignore[arg-type]
                pass

    task = asyncio.create_task(one())
    while not len(calls):
        await asyncio.sleep(0)
    await calls.drain(0.05)
    with pytest.raises(Draining):
        await task
    with pytest.raises(Draining), calls.running("t", "b"):
        pass


class Answering:
    """A worker that fits; Hello and Load only."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info

    async def Hello(self, request: Any, context: Any) -> Any:
        return internal_pb2.HelloReply(info=worker_to_proto(self.info))

    async def Load(self, request: Any, context: Any) -> Any:
        return internal_pb2.LoadReply()


class Store:
    """The part of a metadata store the router uses; `up` False is a store that does not answer."""

    def __init__(self, *infos: WorkerInfo) -> None:
        self.infos = list(infos)
        self.up = True

    async def workers(self) -> list[WorkerInfo]:
        if not self.up:
            raise MetadataUnavailable("away")
        return self.infos


@pytest.mark.promise("R11")
async def test_workers_stay_known_while_the_store_is_away_or_has_forgotten_them(serve, config: WinnowConfig) -> None:
    info = WorkerInfo("prefill-0", 1, ("prefill",), "", "host", PRINT)
    worker = Answering(info)
    server = await serve({"Worker": worker})
    worker.info = dataclasses.replace(info, address=server.address)
    store = Store(worker.info)
    links = Links(config)
    router = Router(links, PRINT, store, poll_s=60)  # type: ignore[arg-type]
    try:
        await router.refresh()
        assert [w.state for w in router.serving("prefill")] == ["serving"]
        store.up = False
        await router.refresh()
        assert (len(router.serving("prefill")), router.metadata_ok) == (1, False)
        store.up, store.infos = True, []
        await router.refresh()
        assert (len(router.serving("prefill")), router.metadata_ok) == (1, True)
        store.infos = [dataclasses.replace(worker.info, epoch=0)]  # an old snapshot was restored
        await router.refresh()
        assert [w.info.epoch for w in router.serving("prefill")] == [1]
        await server.stop(0)
        await router.refresh()
        assert router.serving("prefill") == []
        with pytest.raises(WorkerLost, match="no prefill worker"):
            router.pick("prefill")
    finally:
        await links.close()


@pytest.mark.promise("R8")
async def test_a_channel_closed_under_a_question_ends_neither_the_round_nor_the_polling(serve, config: WinnowConfig) -> None:
    """A request that finds a worker gone closes its channel while a poll waits for that worker's answer."""
    asked = asyncio.Event()

    class Silent(Answering):
        async def Hello(self, request: Any, context: Any) -> Any:
            asked.set()
            await asyncio.Event().wait()

    first, second = (
        cls(WorkerInfo("prefill-0", epoch, ("prefill",), "", "host", PRINT)) for cls, epoch in ((Silent, 1), (Answering, 2))
    )
    servers = [await serve({"Worker": w}) for w in (first, second)]
    for worker, server in zip((first, second), servers, strict=True):
        worker.info = dataclasses.replace(worker.info, address=server.address)
    store = Store(first.info)
    links = Links(config)
    router = Router(links, PRINT, store, poll_s=0.01)  # type: ignore[arg-type]
    starting = asyncio.create_task(router.start())
    try:
        await asyncio.wait_for(asked.wait(), 5)
        await router.mark_lost(router.workers[0], "its connection broke")
        await asyncio.wait_for(starting, 5)
        store.infos = [second.info]
        async with asyncio.timeout(5):
            while not router.serving("prefill"):
                await asyncio.sleep(0.01)
        assert [w.info.epoch for w in router.workers] == [2]
    finally:
        await router.stop()
        await links.close()


async def test_a_restarted_worker_replaces_its_older_self(serve, config: WinnowConfig) -> None:
    first, second = (Answering(WorkerInfo("prefill-0", epoch, ("prefill",), "", "host", PRINT)) for epoch in (1, 2))
    servers = [await serve({"Worker": w}) for w in (first, second)]
    for worker, server in zip((first, second), servers, strict=True):
        worker.info = dataclasses.replace(worker.info, address=server.address)
    store = Store(first.info)
    links = Links(config)
    router = Router(links, PRINT, store, poll_s=60)  # type: ignore[arg-type]
    try:
        await router.refresh()
        store.infos = [second.info]
        await router.refresh()
        assert [(w.info.epoch, w.info.address) for w in router.workers] == [(2, servers[1].address)]
    finally:
        await links.close()


def test_work_goes_near_its_segment_then_to_the_idlest_and_equal_prompts_stay_together(config: WinnowConfig) -> None:
    router = Router(Links(config), PRINT)
    for i in range(3):
        info = WorkerInfo(f"w{i}", 1, ("prefill", "decode"), f"127.0.0.1:{i}", f"host{i % 2}", PRINT)
        router._table[info.worker_id] = Worker(info, state="serving")
    w0, w1, w2 = router.workers
    w0.assigned, w1.assigned, w2.assigned = 5, 1, 2
    assert router.pick("prefill") is w1
    assert router.pick("decode", near=w0.info) is w0
    assert router.pick("decode", near=w0.info, skip={w0}) is w2  # same host
    w0.assigned = 1
    same = {router.pick("prefill", affinity="some prefix").name for _ in range(5)}
    assert len(same) == 1
    spread = {router.pick("prefill", affinity=f"prefix {i}").name for i in range(50)}
    assert spread == {"w0", "w1", "w2"}
    router._table[next(iter(same))].assigned = 50
    assert router.pick("prefill", affinity="some prefix").name not in same


@pytest.mark.promise("R11")
async def test_a_prompt_goes_where_the_store_says_its_prefix_is_unless_that_is_stale_busy_or_unknown(
    config: WinnowConfig,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="wn-"))  # short enough for a socket
    server = EmbeddedServer(folder)
    metadata = RedisMetadata(server.start(), timeout_s=0.5)
    links = Links(config)
    router, other = Router(links, PRINT, metadata), Router(links, PRINT, metadata)
    try:
        for i in range(3):
            info = WorkerInfo(f"w{i}", 7, ("prefill",), f"127.0.0.1:{i}", "host", PRINT)
            router._table[info.worker_id] = Worker(info, state="serving")
        _, w1, w2 = router.workers
        assert await router.find_holder("prefill", "p") is None
        await other.note_holder(w1, "p", 64)
        await other.note_holder(w2, "p", 64)
        w1.assigned = 1
        assert await router.find_holder("prefill", "p") is w2  # the less busy one of two
        assert await router.find_holder("prefill", "q") is None
        w2.info = dataclasses.replace(w2.info, epoch=8)  # restarted: its cache is gone
        assert await router.find_holder("prefill", "p") is w1
        w1.assigned = 50
        assert await router.find_holder("prefill", "p") is None
        w1.assigned = 0
        server.stop()
        assert await router.find_holder("prefill", "p") is None and not router.metadata_ok
        await other.note_holder(w1, "p", 64)
        assert not other.metadata_ok
    finally:
        await metadata.close()
        await links.close()
        server.stop()
        shutil.rmtree(folder)


@pytest.mark.promise("R17")
@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol", 2), ("model", "x"), ("kv_layout", "x"), ("dtype", "bf16"), ("tensor_parallel", 2), ("methods", ("dense@9",))],
)
def test_each_field_of_a_fingerprint_is_compared_and_named(field: str, value: Any) -> None:
    problem = mismatch(PRINT, dataclasses.replace(PRINT, **{field: value}))
    assert ("method dense differs" if field == "methods" else f"{field} differs") in problem
    assert mismatch(PRINT, PRINT) == ""


@dataclasses.dataclass(frozen=True)
class Spec:
    """The part of a ModelSpec that capabilities are compared with."""

    family: str = "llama"
    n_q_heads: int = 4
    n_kv_heads: int = 2
    windowed: bool = False
    softcapped: bool = False
    layers: tuple[LayerSpec, ...] = ()


@pytest.mark.promise("R24")
@pytest.mark.parametrize(
    ("caps", "spec", "dtype", "why"),
    [
        (Capabilities(families=frozenset({"qwen3"})), Spec(), "fp32", "families qwen3, not llama"),
        (Capabilities(heads=frozenset({"mha"})), Spec(), "fp32", "needs mha heads, the model has gqa"),
        (Capabilities(dtypes=frozenset({"fp16"})), Spec(), "fp32", "needs fp16, the model runs in fp32"),
        (Capabilities(sliding_window=False), Spec(windowed=True), "fp32", "sliding-window layers"),
        (Capabilities(softcap=False), Spec(softcapped=True), "fp32", "caps its attention logits"),
    ],
)
def test_a_method_that_cannot_work_with_the_model_is_refused_with_the_way_out(
    caps: Capabilities, spec: Any, dtype: str, why: str
) -> None:
    registry: Registry[Any] = Registry("prefill method", "winnow.none")

    @registry.register("picky")
    @dataclasses.dataclass(frozen=True)
    class Picky:
        pass

    @registry.register("easy")
    @dataclasses.dataclass(frozen=True)
    class Easy:
        pass

    Picky.caps, Easy.caps = caps, Capabilities()  # type: ignore[attr-defined]
    served = Served("m", spec, dtype, "")
    with pytest.raises(Unsupported, match=f"prefill: picky cannot work with m: .*{why}; pick one of easy"):
        check_capabilities("prefill", "picky", caps, served, registry)
    check_capabilities("prefill", "easy", Capabilities(), served, registry)
