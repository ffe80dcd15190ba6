"""The gateway over the real roles in one process: real model, real KV, real engines, nothing played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from prometheus_client import REGISTRY

from winnow import errors
from winnow.client import Client
from winnow.client_async import AsyncClient
from winnow.config import KVConfig, WinnowConfig
from winnow.registry import parse_spec
from winnow.services.common.auth import mint
from winnow.services.gateway.server import Gateway
from winnow.services.roles import ROLES, RoleProcess
from winnow.workers.prefill.base import prefill_methods

SECRET = "a-signing-secret-for-tests-only-0123456789"
TEXT = "In the year of the long text, nothing much was said about anything at all. " * 8


@pytest.fixture
async def pipeline(config: WinnowConfig, bundle: Any, tmp_path: Any) -> AsyncIterator[tuple[RoleProcess, Gateway, AsyncClient]]:
    kv = config.kv.model_copy(update={"budget_bytes": 64 << 20, "dir": str(tmp_path / "kv"), "lease_s": 5.0})
    config = config.model_copy(
        update={"kv": kv, "telemetry": config.telemetry.model_copy(update={"metrics": False}),
                "model": config.model.model_copy(update={"threads": 1})}
    )  # fmt: skip
    process = RoleProcess("all-0", ROLES, config, None)
    info = await process.start()
    gateway = Gateway(config, None, bundle, workers=[info.address], poll_s=0.2)
    client = AsyncClient(await gateway.start(), mint(SECRET))
    yield process, gateway, client
    await client.close()
    await gateway.stop()
    await process.stop()


async def empty(process: RoleProcess, gateway: Gateway) -> None:
    async with asyncio.timeout(5):
        while any(process.ledgers().values()) or len(gateway.calls):
            await asyncio.sleep(0.02)
    gateway.admission.check()


@pytest.mark.timeout(120)
async def test_every_call_of_the_public_service_works_on_the_real_pipeline(pipeline: Any) -> None:
    process, gateway, client = pipeline
    cold = await client.complete(TEXT, max_tokens=12, no_cache=True)
    assert cold.finish_reason in ("length", "eos")
    assert cold.usage.completion_tokens == len(cold.token_ids) > 0
    first = await client.complete(TEXT, max_tokens=12)
    again = await client.complete(TEXT, max_tokens=12)
    assert cold.token_ids == first.token_ids == again.token_ids
    assert (first.usage.cached_tokens, first.usage.prefill_density) == (0, 1.0)
    block = KVConfig().block_tokens
    assert again.usage.cached_tokens >= (first.usage.prompt_tokens - 1) // block * block

    sparse = await client.complete(TEXT, max_tokens=6, decode="retrieval-attention", prefill="flexprefill")
    assert sparse.usage.fallback_used == ""
    assert 0 < sparse.usage.keys_read_share <= 1 and 0 < sparse.usage.prefill_density <= 1

    reduced = await client.complete(TEXT, max_tokens=4, reducer="specpc")
    assert 0 < reduced.usage.prompt_tokens <= reduced.usage.reduced_from_tokens

    logprobs = await client.complete(TEXT, sampling=_sampling(logprobs=3), max_tokens=3)
    assert len(logprobs.logprobs) == len(logprobs.token_ids)
    assert all(top[0].token_id == token for top, token in zip(logprobs.logprobs, logprobs.token_ids, strict=True))

    ranking = await client.rank("long text", ["a long text", "something else", ""])
    assert sorted(i.doc_id for i in ranking.items) == ["0", "1", "2"]
    assert [i.rank for i in ranking.items] == [1, 2, 3]

    session = await client.open_session(TEXT)
    for question in ("What was said?", "When?"):
        last = [c async for c in client.ask(session.session_id, question, max_tokens=4)][-1]
        assert last.usage.cached_tokens >= session.tokens // block * block, "a question pays for itself only"
    await client.close_session(session.session_id)

    status = await client.status()
    assert [(w.info.worker_id, w.state) for w in status.workers] == [("all-0", "serving")]
    assert {m.slot for m in await client.methods()} == {"prefill", "decode", "draft", "ranker", "index"}
    await empty(process, gateway)


@pytest.mark.promise("R6")
@pytest.mark.timeout(60)
async def test_cancelling_a_real_generation_empties_every_ledger(pipeline: Any) -> None:
    process, gateway, client = pipeline
    stream = client.generate(TEXT, max_tokens=1000, request_id="c", sampling=_sampling(ignore_eos=True))
    async for chunk in stream:
        if chunk.token_ids:
            await client.cancel("c")
            break
    with pytest.raises(errors.Cancelled):
        async for _ in stream:
            pass
    await empty(process, gateway)


@pytest.mark.promise("R24")
@pytest.mark.timeout(60)
async def test_an_answer_that_fills_the_context_to_the_last_token_works_and_one_more_is_refused(
    pipeline: Any, bundle: Any
) -> None:
    _, _, client = pipeline
    tokenizer, spec, _ = bundle
    n_prompt = len(tokenizer.encode_prompt(TEXT))
    room = spec.max_context - n_prompt
    long = tokenizer.decode(tokenizer.encode("a" * (room - 8)))
    prompt = TEXT + long
    left = spec.max_context - len(tokenizer.encode_prompt(prompt))
    result = await client.complete(prompt, max_tokens=left, sampling=_sampling(ignore_eos=True))
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", left)
    with pytest.raises(errors.ContextTooLong, match=str(spec.max_context)):
        await client.complete(prompt, max_tokens=left + 1)


SPARSE = "flexprefill:block=32,min_budget=64,gamma=0.5"


@pytest.mark.timeout(60)
async def test_a_sparse_prefill_says_how_much_attention_mass_it_kept(pipeline: Any) -> None:
    process, gateway, client = pipeline
    before = REGISTRY.get_sample_value("winnow_prefill_recall_count", {"method": "flexprefill"}) or 0
    sparse = await client.complete(TEXT, max_tokens=1, prefill=SPARSE, no_cache=True)
    assert sparse.usage.prefill_density < 1
    assert sparse.usage.prefill_recall is not None and 0.2 < sparse.usage.prefill_recall < 0.9
    assert REGISTRY.get_sample_value("winnow_prefill_recall_count", {"method": "flexprefill"}) == before + 1
    dense = await client.complete(TEXT, max_tokens=1, no_cache=True)
    assert dense.usage.prefill_recall is None, "not measured is not 0 and not 1"
    assert REGISTRY.get_sample_value("winnow_prefill_recall_count", {"method": "dense"}) is None

    def synchronous() -> Any:
        with Client(client.address, mint(SECRET)) as own:
            return own.complete(TEXT, max_tokens=1, prefill=SPARSE, no_cache=True)

    assert (await asyncio.to_thread(synchronous)).usage.prefill_recall == sparse.usage.prefill_recall, "the same rows each time"
    session = await client.open_session(TEXT, prefill=SPARSE)
    assert session.HasField("recall") and 0.2 < session.recall < 0.9
    await client.close_session(session.session_id)
    await empty(process, gateway)


@pytest.mark.timeout(60)
async def test_recall_as_the_knob_is_reached_and_reported(pipeline: Any) -> None:
    process, gateway, client = pipeline
    found = {r: (await client.complete(TEXT, max_tokens=1, recall=r, prefill="recall:block=32,every=8", no_cache=True)).usage
             for r in (0.7, 0.9, 1.0)}  # fmt: skip
    for wanted, usage in found.items():
        assert usage.prefill_recall is not None and usage.prefill_recall >= wanted - 0.1  # of four rows
    assert found[0.7].prefill_density < found[0.9].prefill_density < found[1.0].prefill_density == 1.0
    session = await client.open_session(TEXT, recall=0.9)
    assert session.prefill == "recall:recall=0.9"
    await client.close_session(session.session_id)
    with pytest.raises(errors.InvalidRequest, match=r"recall must be in \(0, 1\]"):
        await client.complete(TEXT, max_tokens=1, prefill="recall:recall=1.5")  # past the client's own check
    await empty(process, gateway)


@pytest.mark.timeout(60)
async def test_a_method_that_would_not_pay_runs_dense_and_is_counted(config: WinnowConfig, pipeline: Any) -> None:
    """The default, which the other tests here switch off."""
    process, gateway, client = pipeline
    process._parts.prefill.config = config.prefill.model_copy(update={"break_even": True})
    labels = {"method": "flexprefill", "reason": "too_short"}
    before = REGISTRY.get_sample_value("winnow_prefill_passes_total", labels) or 0
    usage = (await client.complete(TEXT, max_tokens=1, prefill=SPARSE, no_cache=True)).usage
    assert (usage.prefill_density, usage.prefill_recall, usage.prefill_dense_share) == (1.0, 1.0, 1.0)
    assert REGISTRY.get_sample_value("winnow_prefill_passes_total", labels) == before + 2, "two layers, one pass"
    await empty(process, gateway)


@pytest.mark.promise("R20")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [SPARSE, "prism:block=32,threshold=0.5", "recall:block=32,every=8,recall=0.7"])
async def test_kv_of_a_method_that_is_not_prefix_safe_serves_that_prompt_and_method_alone(method: str, pipeline: Any) -> None:
    """Every answer that could be made from it is compared, to the last bit of its scores, with one made without a cache."""
    process, gateway, client = pipeline
    name, params = parse_spec(method)
    assert not prefill_methods.create(name, dict(params)).caps.prefix_safe
    longer, other = TEXT + "And then?", method.replace("block=32", "block=64")

    async def ask(prompt: str, prefill: str, *, cold: bool = False) -> tuple[list[Any], int]:
        found = await client.complete(prompt, sampling=_sampling(logprobs=5), max_tokens=3, prefill=prefill, no_cache=cold)
        return [[(t.token_id, t.logprob) for t in token] for token in found.logprobs], found.usage.cached_tokens

    cold = {case: (await ask(*case, cold=True))[0]
            for case in ((TEXT, method), (TEXT, other), (TEXT, "dense"), (longer, method), (longer, "dense"))}  # fmt: skip
    assert len({repr(scores) for scores in cold.values()}) == len(cold), "a KV taken from another of them would not be seen"

    first = await client.complete(TEXT, max_tokens=3, prefill=method)
    assert (first.usage.cached_tokens, first.usage.prefill_density < 1) == (0, True)
    # (a) the same prompt by another method, by the same one with another parameter, and dense
    for case in ((TEXT, "dense"), (TEXT, other)):
        assert await ask(*case) == (cold[case], 0)
    # (b) the same prompt by the same method
    whole = first.usage.prompt_tokens - 1
    assert await ask(TEXT, method) == (cold[TEXT, method], whole)
    # (c) a prompt of which it is a prefix, by the same method; dense begins with what (a) left, and nothing else
    assert await ask(longer, method) == (cold[longer, method], 0)
    scores, cached = await ask(longer, "dense")
    assert [[i for i, _ in token] for token in scores] == [[i for i, _ in token] for token in cold[longer, "dense"]]
    assert 0 < cached <= first.usage.prompt_tokens + 3
    await empty(process, gateway)


@pytest.mark.promise("R20")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [SPARSE, "prism:block=32,threshold=0.5", "recall:block=32,every=8,recall=0.7"])
async def test_whole_chunks_of_a_sparse_method_are_reused_and_answer_as_a_cold_run(method: str, pipeline: Any) -> None:
    process, gateway, client = pipeline
    config = process._parts.prefill.config
    process._parts.prefill.config = config.model_copy(update={"sparse_chunk_tokens": 96, "break_even": False})

    async def ask(prompt: str, *, cold: bool = False, prefill: str = method) -> tuple[list[Any], Any]:
        found = await client.complete(prompt, sampling=_sampling(logprobs=5), max_tokens=3, prefill=prefill, no_cache=cold)
        return [[(t.token_id, t.logprob) for t in token] for token in found.logprobs], found.usage

    await ask(TEXT)
    for question in ("And then?", "Who said so, and why?"):
        scores, usage = await ask(TEXT + question)
        assert usage.cached_tokens > 0 and usage.cached_tokens % 96 == 0
        assert usage.prompt_tokens - usage.cached_tokens < 2 * 96 + config.dense_tail_tokens
        fresh, cold = await ask(TEXT + question, cold=True)
        assert (scores, cold.cached_tokens) == (fresh, 0) and cold.prefill_density < 1
    assert (await ask(TEXT + "Where?", prefill="dense"))[1].cached_tokens == 0
    process._parts.prefill.config = config
    await empty(process, gateway)


def _sampling(**fields: Any) -> Any:
    from winnow.types import Sampling

    return Sampling(**fields)


async def test_internal_services_of_a_real_role_refuse_the_public_token(pipeline: Any) -> None:
    process, _, _ = pipeline
    async with grpc.aio.insecure_channel(process.info.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/winnow.v1.Worker/Load")(b"", metadata=(("authorization", f"Bearer {mint(SECRET)}"),))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
