"""Prefill, retrieval, decode, ranking and scoring over real gRPC give what transformers and the dense path give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from winnow.proto.v1 import common_pb2, internal_pb2, internal_pb2_grpc

from .conftest import PROMPT, SINGLE, SPLIT, Deployment, nothing, with_kv

pytestmark = pytest.mark.slow

N_NEW = 24


@pytest.fixture(scope="session")
def greedy(model_dir: Path) -> list[int]:
    """What transformers generates after PROMPT."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(N_NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("shape", [SPLIT, SINGLE], ids=["split", "single"])
@pytest.mark.parametrize("transport", ["auto", "map", "stream"])
async def test_every_transport_gives_the_greedy_text_of_transformers(
    deployment: Deployment, greedy: list[int], shape: dict[str, tuple[str, ...]], transport: str
) -> None:
    await deployment.start(shape, with_kv(deployment.config, transport=transport))
    result = await deployment.prefill()
    assert (result.cached_tokens, result.density) == (0, 1.0)

    tokens, last = await deployment.decode(result.segment, n=N_NEW)

    assert tokens == greedy
    assert (last.finish_reason, last.fallback_used, last.keys_read_share) == ("length", "", 1.0)
    await deployment.release(result.segment)
    assert await deployment.idle() == nothing()


@pytest.mark.parametrize("shape", [SPLIT, SINGLE], ids=["split", "single"])
@pytest.mark.parametrize("index", ["flat", "hnsw32"])
async def test_retrieval_over_all_keys_equals_dense(
    deployment: Deployment, greedy: list[int], shape: dict[str, tuple[str, ...]], index: str
) -> None:
    await deployment.start(shape)
    result = await deployment.prefill(query_sample=8)
    index_id = await deployment.open_index(result.segment, index)

    tokens, last = await deployment.decode(result.segment, n=N_NEW, **deployment.retrieval_fields(index_id))

    assert (tokens, last.fallback_used) == (greedy, "")
    await deployment.close_index(index_id)
    await deployment.release(result.segment)
    assert await deployment.idle() == nothing()


async def test_a_few_keys_are_read_when_few_are_asked_for(deployment: Deployment) -> None:
    await deployment.start(SPLIT)
    result = await deployment.prefill()
    index_id = await deployment.open_index(result.segment)

    _, last = await deployment.decode(result.segment, **deployment.retrieval_fields(index_id, top_k="8"))

    assert 0.1 < last.keys_read_share < 0.5  # 4 + 16 + 8 and the generated ones, of 150 to 173
    assert last.fallback_used == ""


async def test_a_second_prompt_with_the_same_prefix_comes_from_the_cache(deployment: Deployment, greedy: list[int]) -> None:
    await deployment.start(SPLIT)
    first = await deployment.prefill()
    tokens, _ = await deployment.decode(first.segment, n=N_NEW)
    await deployment.release(first.segment, (PROMPT[-1], *tokens[:-1]))

    whole = [*PROMPT, *tokens]
    second = await deployment.prefill(whole)

    assert second.cached_tokens == len(whole) - 1
    again = await deployment.prefill()
    assert (await deployment.decode(again.segment, n=N_NEW))[0] == greedy


async def test_a_decode_that_is_tried_again_starts_behind_the_sealed_tokens(deployment: Deployment, greedy: list[int]) -> None:
    await deployment.start(SPLIT)
    result = await deployment.prefill()

    once, _ = await deployment.decode(result.segment, n=5)
    again, _ = await deployment.decode(result.segment, n=N_NEW)

    assert (once, again) == (greedy[:5], greedy)


async def test_logprobs_and_end_of_text_travel(deployment: Deployment, greedy: list[int]) -> None:
    await deployment.start(SPLIT)
    result = await deployment.prefill()
    stub = deployment.stub(internal_pb2_grpc.DecodeStub, "decode")
    stop_at = greedy[6]
    request = internal_pb2.DecodeRequest(
        request_id="r", segment=result.segment, owner_address=deployment.address("prefill"), last_token_id=PROMPT[-1],
        sampling=common_pb2.Sampling(max_tokens=N_NEW, logprobs=3), eos_token_ids=[stop_at],
    )  # fmt: skip

    events = [e async for e in stub.Decode(request, **deployment.links.options())]

    tokens = [t for e in events for t in e.token_ids]
    logprobs = [p for e in events for p in e.logprobs]
    assert tokens == greedy[: greedy.index(stop_at)]
    assert events[-1].finish_reason == "eos"
    assert [p.token_ids[0] for p in logprobs] == tokens
    assert all(len(p.token_ids) >= 3 and max(p.logprobs) <= 0 for p in logprobs)


async def test_ranking_returns_every_document_once(deployment: Deployment) -> None:
    await deployment.start({"prefill": ("prefill",)})
    documents = [common_pb2.Document(doc_id=f"d{i}", text=text) for i, text in enumerate(["a cat", "", "a dog and a cat"])]
    stub = deployment.stub(internal_pb2_grpc.PrefillStub, "prefill")
    request = internal_pb2.RankTask(request_id="r", query="which cat?", documents=documents)

    events = [e async for e in stub.Rank(request, **deployment.links.options())]

    assert sorted(i.doc_id for i in events[-1].ranking.items) == ["d0", "d1", "d2"]
    assert [i.rank for i in events[-1].ranking.items] == [1, 2, 3]
    assert (await deployment.idle())["leases"] == 0


async def test_the_draft_keeps_an_ascending_choice_that_ends_with_the_last_token(deployment: Deployment) -> None:
    await deployment.start({"draft": ("draft",)})
    stub = deployment.stub(internal_pb2_grpc.DraftStub, "draft")
    params = {"capacity": "60", "window": "8", "sink": "4", "pool": "3"}
    request = internal_pb2.ScoreRequest(request_id="r", token_ids=PROMPT, scorer=common_pb2.Method(name="specpc", params=params))

    events = [e async for e in stub.Score(request, **deployment.links.options())]

    kept = list(events[-1].result.kept)
    assert kept == sorted(set(kept))
    assert 8 <= len(kept) <= 60
    assert kept[-1] == len(PROMPT) - 1


def test_one_process_holds_the_weights_once(config: object) -> None:
    from winnow.services.weights import load_weights

    weights = load_weights(config, ("prefill", "decode", "draft"))  # type: ignore[arg-type]

    model, draft = weights.require_model(), weights.require_draft()
    assert draft.spec.n_layers == 1
    assert draft.decoder.layers[0].qkv.data_ptr() == model.decoder.layers[0].qkv.data_ptr()
    assert draft.decoder.embed.data_ptr() == model.decoder.embed.data_ptr()
