"""The life of a request through a real gateway: order, text, cancel, loss, fallback, drain."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from winnow import errors
from winnow.proto.v1 import winnow_pb2, winnow_pb2_grpc
from winnow.services.common.auth import mint
from winnow.types import Chunk

SECRET = "a-signing-secret-for-tests-only-0123456789"
SPARSE = "retrieval-attention"


async def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait for a state that is reached by events elsewhere, without guessing how long it takes."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def first(stream: Any) -> Chunk:
    async for chunk in stream:
        return chunk
    raise AssertionError("nothing came")


async def test_a_generation_streams_its_text_and_ends_with_usage(start, stand_in) -> None:
    gateway, client = await start(stand_in)
    stand_in.text = "héllo wörld — ünïcode ✓ 漢字"  # bytes of one character come in several tokens
    result = await client.complete("a prompt", max_tokens=200)
    assert result.text == stand_in.text
    assert result.finish_reason == "eos"
    assert result.usage.completion_tokens == len(stand_in.tokenizer.encode(stand_in.text)) == len(result.token_ids)
    assert result.usage.prompt_tokens == len(stand_in.tokenizer.encode_prompt("a prompt"))
    assert 0 < result.usage.ttft_s < 20
    await eventually(lambda: stand_in.leases == 0)
    gateway.admission.check()
    assert (gateway.admission.inflight, gateway.admission.queued, len(gateway.calls)) == (0, 0, 0)


@pytest.mark.promise("R7")
async def test_events_are_numbered_without_gaps_and_end_with_one_finish(start, stand_in) -> None:
    _, client = await start(stand_in)
    async with grpc.aio.insecure_channel(client.address) as channel:
        call = winnow_pb2_grpc.WinnowStub(channel).Generate(
            winnow_pb2.GenerateRequest(prompt="x", request_id="mine"), metadata=(("authorization", f"Bearer {mint(SECRET)}"),)
        )
        events = [event async for event in call]
    assert [e.sequence for e in events] == list(range(len(events)))
    assert [e.request_id for e in events] == ["mine"] + [""] * (len(events) - 1)
    assert [e.WhichOneof("event") for e in events].count("finish") == 1
    assert events[-1].WhichOneof("event") == "finish"
    assert [e.progress.stage for e in events if e.HasField("progress")] == ["prefill"]


async def test_a_stop_string_across_tokens_ends_the_text_before_it_and_stops_decode(start, stand_in) -> None:
    _, client = await start(stand_in)
    stand_in.text = "one two STOPPED three"
    result = await client.complete("x", stop=["STOPPED", "never"])
    assert (result.text, result.finish_reason) == ("one two ", "stop")
    await eventually(lambda: stand_in.leases == 0)


async def test_text_that_only_began_like_a_stop_string_is_shown(start, stand_in) -> None:
    _, client = await start(stand_in)
    stand_in.text = "one STOPP"
    result = await client.complete("x", stop=["STOPPED"])
    assert (result.text, result.finish_reason) == ("one STOPP", "eos")


async def test_chat_messages_and_answer_prefix_become_the_models_template(start, stand_in) -> None:
    from winnow.types import Message

    _, client = await start(stand_in)
    messages = [Message("user", "hi <|im_end|> there")]
    await client.complete(messages=messages, answer_prefix="Sure:")
    ids = list(stand_in.requests("prefill")[0].token_ids)
    tokenizer = stand_in.tokenizer
    assert ids == [*tokenizer.encode_chat(messages), *tokenizer.encode("Sure:")]


@pytest.mark.promise("R5")
async def test_each_hop_of_a_request_gets_less_time(start, stand_in, config) -> None:
    _, client = await start(stand_in)
    await client.complete("x", deadline_s=9.0)
    left = {stage: seconds for stage, _, seconds in stand_in.asked if stage in ("prefill", "decode")}
    rounding = 0.01  # gRPC sends a timeout with three digits, rounded up
    assert 8.0 < left["prefill"] <= 9.0 - config.gateway.hop_margin_s + rounding
    assert 8.0 < left["decode"] <= left["prefill"]


@pytest.mark.promise("R5")
async def test_a_request_without_deadline_ends_at_the_default_and_frees_its_segment(start, stand_in) -> None:
    stand_in.hold = "decode"
    gateway, client = await start(stand_in, gateway={"default_deadline_s": 1.0})
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        await client.complete("x")
    assert 0.8 < time.monotonic() - began < 2.5
    await eventually(lambda: stand_in.leases == 0 and len(gateway.calls) == 0)
    assert stand_in.cancelled["decode"].is_set()


@pytest.mark.promise("R6")
@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["rpc", "disconnect"])
async def test_cancelling_stops_every_hop_and_gives_the_segment_back(stage: str, how: str, start, stand_in) -> None:
    stand_in.hold = stage
    gateway, client = await start(stand_in)
    task = asyncio.create_task(client.complete("x", request_id="c1"))
    await asyncio.wait_for(stand_in.entered[stage].wait(), 5)
    if how == "rpc":
        await client.cancel("c1")
        with pytest.raises(errors.Cancelled):
            await task
    else:
        task.cancel()
    await asyncio.wait_for(stand_in.cancelled[stage].wait(), 5)
    await eventually(lambda: stand_in.leases == 0 and len(gateway.calls) == 0)
    gateway.admission.check()
    assert gateway.admission.inflight == 0
    with pytest.raises(errors.UnknownName):
        await client.cancel("c1")


@pytest.mark.promise("R6")
async def test_a_queued_request_can_be_cancelled_and_never_reaches_a_worker(start, stand_in) -> None:
    stand_in.hold = "prefill"
    gateway, client = await start(stand_in, gateway={"max_inflight": 1})
    working = asyncio.create_task(client.complete("first"))
    await asyncio.wait_for(stand_in.entered["prefill"].wait(), 5)
    stages: list[str] = []

    async def read() -> None:
        async for chunk in client.generate("second", request_id="q"):
            stages.append(chunk.stage)

    queued = asyncio.create_task(read())
    await eventually(lambda: stages == ["queued"])
    assert gateway.admission.queued == 1
    await client.cancel("q")
    with pytest.raises(errors.Cancelled):
        await queued
    assert gateway.admission.queued == 0
    stand_in.go.set()
    await working
    assert len(stand_in.requests("prefill")) == 1


async def test_a_request_id_in_use_is_a_conflict_but_not_for_another_tenant(start, stand_in) -> None:
    from winnow import AsyncClient

    stand_in.hold = "decode"
    _, client = await start(stand_in)
    task = asyncio.create_task(client.complete("x", request_id="same"))
    await asyncio.wait_for(stand_in.entered["decode"].wait(), 5)
    with pytest.raises(errors.Conflict, match="request_id"):
        await client.complete("x", request_id="same")
    async with AsyncClient(client.address, mint(SECRET, tenant="other")) as other:
        with pytest.raises(errors.UnknownName):
            await other.cancel("same")
        second = asyncio.create_task(other.complete("x", request_id="same"))
        await eventually(lambda: len(stand_in.requests("decode")) == 2)
        stand_in.go.set()
        await asyncio.gather(task, second)
    assert {r.tenant for r in stand_in.requests("prefill")} == {"default", "other"}


@pytest.mark.promise("R1")
async def test_one_request_more_than_places_and_queue_is_refused_at_once(start, stand_in) -> None:
    stand_in.hold = "decode"
    gateway, client = await start(stand_in)  # 2 places, 1 waits
    tasks = [asyncio.create_task(client.complete("x")) for _ in range(3)]
    await eventually(lambda: (gateway.admission.inflight, gateway.admission.queued) == (2, 1))
    delays = []
    for _ in range(5):
        began = time.monotonic()
        with pytest.raises(errors.Overloaded, match=r"2 requests are worked on and 1 wait") as caught:
            await client.complete("x")
        delays.append(time.monotonic() - began)
        assert 100 <= caught.value.retry_after_ms <= 30_000
    assert min(delays) < 0.05  # the best of five, because other processes share the cores
    gateway.admission.check()
    stand_in.go.set()
    assert [r.text for r in await asyncio.gather(*tasks)] == ["hello world"] * 3


@pytest.mark.promise("R8")
async def test_a_prefill_worker_lost_in_the_middle_is_replaced_by_another(start, stand_in, bundle) -> None:
    other = type(stand_in)("worker-1", bundle)
    other.hold = stand_in.hold = "prefill"
    _, client = await start(stand_in, other)
    task = asyncio.create_task(client.complete("x"))
    await eventually(lambda: stand_in.entered["prefill"].is_set() or other.entered["prefill"].is_set())
    hit, spare = (stand_in, other) if stand_in.entered["prefill"].is_set() else (other, stand_in)
    spare.hold = ""
    await hit.server.stop(0)
    assert (await asyncio.wait_for(task, 10)).text == "hello world"
    assert len(spare.requests("prefill")) == 1
    status = await client.status()
    assert {w.info.worker_id: w.state for w in status.workers}[hit.info.worker_id] == "lost"


@pytest.mark.promise("R8")
async def test_a_prefill_worker_that_restarts_gets_the_request_again(start, stand_in, bundle, config) -> None:
    stand_in.hold = "prefill"
    gateway, client = await start(stand_in)
    task = asyncio.create_task(client.complete("x"))
    await asyncio.wait_for(stand_in.entered["prefill"].wait(), 5)
    port = stand_in.server.port
    await stand_in.server.stop(0)
    restarted = type(stand_in)("worker-0", bundle)
    restarted.info = type(restarted.info)(**{**vars(restarted.info), "epoch": 2})
    from winnow.services.common.auth import INTERNAL
    from winnow.services.common.server import build_server

    names = ("Worker", "Prefill", "Segments", "Retrieval", "Draft", "Decode")
    server = build_server({n: restarted for n in names}, config, audience=INTERNAL, port=port)
    restarted.info = type(restarted.info)(**{**vars(restarted.info), "address": await server.start()})
    try:
        assert (await asyncio.wait_for(task, 15)).text == "hello world"
        assert [w.info.epoch for w in gateway.router.workers] == [2]
    finally:
        await server.stop(0)


@pytest.mark.promise("R8")
async def test_work_that_lost_two_workers_is_not_given_to_a_third(start, stand_in, bundle) -> None:
    workers = [stand_in, *(type(stand_in)(f"worker-{i}", bundle) for i in (1, 2))]
    for worker in workers:
        worker.fail["prefill"] = errors.WorkerLost("gone")
    _, client = await start(*workers)
    with pytest.raises(errors.WorkerLost):
        await client.complete("x", deadline_s=5)
    # the client tries a call that did no work again, each attempt costs at most two workers
    per_request: dict[str, int] = {}
    for worker in workers:
        for request in worker.requests("prefill"):
            per_request[request.request_id] = per_request.get(request.request_id, 0) + 1
    assert per_request and max(per_request.values()) <= 2


async def test_a_lost_decode_worker_is_unavailable_and_the_segment_goes_back(start, stand_in) -> None:
    stand_in.fail["decode"] = errors.WorkerLost("gone")
    _, client = await start(stand_in)
    with pytest.raises(errors.WorkerLost):
        await client.complete("x", deadline_s=5)
    await eventually(lambda: stand_in.leases == 0)


async def test_a_lost_lease_ends_the_request_as_aborted(start, stand_in) -> None:
    stand_in.hold = "decode"
    stand_in.fail["renew"] = errors.LeaseLost("segment s1: fencing token 1 is older than 2")
    _, client = await start(stand_in)
    with pytest.raises(errors.LeaseLost):
        await client.complete("x")
    assert stand_in.renewed.is_set()


async def test_a_lease_is_renewed_while_a_request_runs(start, stand_in) -> None:
    stand_in.hold = "decode"
    _, client = await start(stand_in)
    task = asyncio.create_task(client.complete("x"))
    await asyncio.wait_for(stand_in.renewed.wait(), 5)
    stand_in.go.set()
    assert (await task).finish_reason == "eos"


@pytest.mark.promise("R10")
async def test_without_retrieval_decode_falls_back_and_says_so_or_refuses_when_strict(start, stand_in) -> None:
    stand_in.fail["open"] = errors.WorkerLost("gone")
    _, client = await start(stand_in)
    result = await client.complete("x " * 600, decode=SPARSE)
    assert result.usage.fallback_used == "decode: dense (retrieval lost)"
    assert [r.method.name for r in stand_in.requests("decode")] == ["dense"]
    with pytest.raises(errors.Unsupported, match="needs a retrieval worker"):
        await client.complete("x " * 600, decode=SPARSE, strict=True)
    await eventually(lambda: stand_in.leases == 0)


async def test_a_decode_method_that_needs_an_index_gets_one_and_it_is_closed(start, stand_in) -> None:
    _, client = await start(stand_in)
    result = await client.complete("x " * 600, decode=SPARSE)
    request = stand_in.requests("decode")[0]
    assert (request.method.name, request.index_id, request.retrieval_address) == (SPARSE, "i1", stand_in.info.address)
    assert result.usage.keys_read_share == pytest.approx(0.25)
    assert result.usage.fallback_used == ""
    await eventually(lambda: [r.index_id for r in stand_in.requests("close")] == ["i1"])


@pytest.mark.promise("R10")
async def test_without_draft_worker_the_whole_prompt_is_read_or_strict_refuses(start, stand_in) -> None:
    stand_in.info = type(stand_in.info)(**{**vars(stand_in.info), "roles": ("prefill", "decode", "retrieval")})
    _, client = await start(stand_in)
    result = await client.complete("x " * 100, reducer="specpc")
    assert result.usage.fallback_used == "reducer: whole prompt (draft lost)"
    assert result.usage.reduced_from_tokens == 0
    with pytest.raises(errors.Unsupported, match="needs a draft worker"):
        await client.complete("x " * 100, reducer="specpc", strict=True)


async def test_a_reducer_shortens_the_prompt_that_prefill_sees(start, stand_in) -> None:
    _, client = await start(stand_in)
    result = await client.complete("abcdefgh " * 20, reducer="specpc")
    seen = stand_in.requests("prefill")[0].token_ids
    assert result.usage.prompt_tokens == len(seen) < result.usage.reduced_from_tokens


@pytest.mark.promise("R10")
async def test_a_fallback_reported_by_the_decode_worker_is_passed_on(start, stand_in) -> None:
    stand_in.fallback = "dense (retrieval lost)"
    _, client = await start(stand_in)
    assert (await client.complete("x")).usage.fallback_used == "decode: dense (retrieval lost)"


@pytest.mark.promise("R17")
@pytest.mark.parametrize("field", ["protocol", "model", "kv_layout", "dtype", "methods"])
async def test_a_worker_that_does_not_fit_is_refused_by_name_and_gets_no_work(field: str, start, stand_in) -> None:
    odd: Any = {"protocol": 99, "methods": ("dense@99",)}.get(field, "other")
    print_ = type(stand_in.info.fingerprint)(**{**vars(stand_in.info.fingerprint), field: odd})
    stand_in.info = type(stand_in.info)(**{**vars(stand_in.info), "fingerprint": print_})
    _, client = await start(stand_in)
    with pytest.raises(errors.WorkerLost, match="no prefill worker"):
        await client.complete("x", deadline_s=3)
    worker = (await client.status()).workers[0]
    assert worker.state == "refused"
    assert ("method dense differs" if field == "methods" else f"{field} differs") in worker.reason
    assert stand_in.asked == []


@pytest.mark.promise("R4")
async def test_a_reader_that_stops_reading_costs_one_buffer_and_delays_nobody(start, stand_in) -> None:
    stand_in.text = "word " * 300
    gateway, client = await start(stand_in, gateway={"max_stream_buffer": 4})
    stalled = client.generate("x", max_tokens=2000, request_id="slow", deadline_s=5)
    await first(stalled)
    assert (await client.complete("y", max_tokens=2000)).text == stand_in.text
    await stalled.aclose()
    await eventually(lambda: len(gateway.calls) == 0 and stand_in.leases == 0)


@pytest.mark.promise("R18")
async def test_draining_says_not_serving_refuses_new_work_and_lets_the_running_finish(start, stand_in) -> None:
    stand_in.hold = "decode"
    gateway, client = await start(stand_in)
    running = asyncio.create_task(client.complete("x"))
    await asyncio.wait_for(stand_in.entered["decode"].wait(), 5)
    async with grpc.aio.insecure_channel(client.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        draining = asyncio.create_task(gateway.drain(10.0))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = winnow_pb2_grpc.WinnowStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            call = stub.Generate(winnow_pb2.GenerateRequest(prompt="y"), metadata=(("authorization", f"Bearer {mint(SECRET)}"),))
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()
    stand_in.go.set()
    assert (await running).text == "hello world"
    await asyncio.wait_for(draining, 10)


@pytest.mark.promise("R18")
async def test_what_does_not_finish_within_the_grace_ends_unavailable(start, stand_in) -> None:
    stand_in.hold = "decode"
    gateway, client = await start(stand_in)
    running = asyncio.create_task(client.complete("x"))
    await asyncio.wait_for(stand_in.entered["decode"].wait(), 5)
    await gateway.drain(0.2)
    with pytest.raises(errors.Draining):
        await running
    await eventually(lambda: stand_in.leases == 0)


async def test_a_ranking_keeps_every_document_once_and_top_n_cuts(start, stand_in) -> None:
    _, client = await start(stand_in)
    seen: list[tuple[int, int]] = []
    ranking = await client.rank("q", ["a", "b", "c"], on_progress=lambda d, t: seen.append((d, t)))
    assert [i.doc_id for i in ranking.items] == ["0", "1", "2"]
    assert seen == [(0, 3)]
    assert [i.doc_id for i in (await client.rank("q", ["a", "b", "c"], top_n=2)).items] == ["0", "1"]


async def test_a_session_reads_its_text_once_and_questions_begin_with_its_exact_tokens(start, stand_in) -> None:
    _, client = await start(stand_in)
    session = await client.open_session("the long text " * 20)
    context = list(stand_in.requests("prefill")[0].token_ids)[:-1]
    assert stand_in.requests("prefill")[0].context_tokens == len(context) == session.tokens
    for question in ("What?", "Why?"):
        assert "".join([c.text async for c in client.ask(session.session_id, question)]) == "hello world"
    for request in stand_in.requests("prefill")[1:]:
        assert list(request.token_ids)[: len(context)] == context
        assert request.context_tokens == len(context)
    rendered = stand_in.tokenizer.decode(stand_in.requests("prefill")[1].token_ids)
    assert "the long text" in rendered and rendered.index("What?") > rendered.rindex("the long text")
    assert [s.session_id for s in await client.sessions()] == [session.session_id]
    await client.close_session(session.session_id)
    await eventually(lambda: stand_in.leases == 0)
    with pytest.raises(errors.UnknownName, match="session_id"):
        await client.complete(session=session.session_id, question="again?")


@pytest.mark.promise("R29")
async def test_another_tenants_session_reads_as_not_found(start, stand_in) -> None:
    from winnow import AsyncClient

    _, client = await start(stand_in)
    session = await client.open_session("text")
    async with AsyncClient(client.address, mint(SECRET, tenant="other")) as other:
        assert await other.sessions() == []
        with pytest.raises(errors.UnknownName):
            await other.complete(session=session.session_id, question="?")
        with pytest.raises(errors.UnknownName):
            await other.close_session(session.session_id)


async def test_a_session_that_is_idle_too_long_closes_itself_and_its_lease_was_kept_until_then(start, stand_in) -> None:
    _, client = await start(stand_in)
    session = await client.open_session("text", idle_timeout_s=1.0)
    assert 0 < session.idle_left_s <= 1.0
    await asyncio.wait_for(stand_in.renewed.wait(), 5)
    await asyncio.wait_for(stand_in.released.wait(), 5)
    assert await client.sessions() == []
