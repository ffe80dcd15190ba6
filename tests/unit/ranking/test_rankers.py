"""Rankers against plain computations, and what every ranking promises (R26)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from winnow.config import KVConfig
from winnow.errors import Cancelled, ContextTooLong, InvalidRequest
from winnow.index.layout import SegmentLayout
from winnow.index.store import SegmentStore
from winnow.types import Document
from winnow.workers.model.loader import LoadedModel, load_model
from winnow.workers.model.reference import DenseBackend
from winnow.workers.model.tiny import make_tiny_model
from winnow.workers.ranking.base import RankContext, Ranker, rankers
from winnow.workers.ranking.icr import InContextRanker
from winnow.workers.ranking.likelihood import QueryLikelihood

TEXTS = [
    "Return the square root of x.",
    "Open a file and return a stream.",
    "Sort the list in place.",
    "",
    "Sort the list in place.",
    "A much longer document. " * 20,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("tiny"))), dtype="fp32", device="cpu")


@pytest.fixture
def ctx(model: LoadedModel, tmp_path: object) -> Iterator[RankContext]:
    spec = model.spec
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, "fp32")
    store = SegmentStore(layout, model.fingerprint, KVConfig(dir=str(tmp_path)), owner="rank-test", epoch=1, host_id="here")
    yield RankContext(model, store)
    store.check()
    assert store.stats().leases == 0
    store.close()


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def test_likelihood_equals_a_plain_forward_pass(ctx: RankContext) -> None:
    ranker, query = QueryLikelihood(), "sort a list"
    found = ranker.scores(query, documents(TEXTS), ctx)
    encode = ctx.model.tokenizer.encode
    for text, (score, was_cut) in zip(TEXTS, found, strict=True):
        prefix, ids = encode(text) + encode(ranker.bridge), encode(" " + query)
        tokens = torch.tensor(prefix + ids)
        backend = DenseBackend(ctx.model.spec, tokens.numel(), ctx.model.decoder.dtype, ctx.model.decoder.device)
        hidden = ctx.model.decoder.forward(tokens, torch.arange(tokens.numel()), backend)
        logprobs = ctx.model.decoder.logits(hidden).log_softmax(-1)
        expected = logprobs[len(prefix) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).mean().item()
        assert score == pytest.approx(expected, abs=1e-5)
        assert not was_cut


@pytest.mark.parametrize("name", rankers.names())
def test_a_second_query_reuses_the_documents(name: str, ctx: RankContext) -> None:
    ranker = rankers.create(name)
    docs = documents(TEXTS)
    first = ranker.rank("sort a list", docs, ctx)
    forwarded: list[int] = []
    forward = ctx.model.decoder.forward

    def counting(tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        forwarded.append(tokens.numel())
        return forward(tokens, *args, **kwargs)  # type: ignore[arg-type]

    ctx.model.decoder.forward = counting  # type: ignore[method-assign, assignment]
    try:
        again = ranker.rank("sort a list", docs, ctx)
    finally:
        ctx.model.decoder.forward = forward  # type: ignore[method-assign]
    assert [i.doc_id for i in again.items] == [i.doc_id for i in first.items]
    assert [i.score for i in again.items] == pytest.approx([i.score for i in first.items], abs=1e-5)
    document_tokens = sum(len(ctx.model.tokenizer.encode(t)) for t in TEXTS)
    assert sum(forwarded) < document_tokens  # the query's tokens only, none of the documents'


@pytest.mark.promise("R26")
@pytest.mark.parametrize("name", rankers.names())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=8), query=st.text(min_size=1, max_size=30))
def test_every_document_once_best_first_ties_in_order(name: str, texts: list[str], query: str, ctx: RankContext) -> None:
    ranking = rankers.create(name).rank(query, documents(texts), ctx)
    assert sorted(i.doc_id for i in ranking.items) == sorted(f"d{i}" for i in range(len(texts)))
    assert [i.rank for i in ranking.items] == list(range(1, len(texts) + 1))
    keys = [(-i.score, int(i.doc_id[1:])) for i in ranking.items]
    assert all(k[0] == k[0] for k in keys)
    assert keys == sorted(keys)


@pytest.mark.promise("R26")
def test_likelihood_does_not_depend_on_batch_mates(ctx: RankContext) -> None:
    ranker = QueryLikelihood(wave_documents=5)
    alone = [ranker.scores("sort a list", [d], ctx)[0][0] for d in documents(TEXTS)]
    for size in (2, 6, 64):
        many = (documents(TEXTS) * 11)[:size]
        together = [score for score, _ in ranker.scores("sort a list", many, ctx)]
        assert together == pytest.approx((alone * 11)[:size], abs=1e-5)


@pytest.mark.promise("R26")
def test_cut_documents_are_flagged_and_the_frame_is_kept(ctx: RankContext) -> None:
    long = "word " * ctx.model.spec.max_context
    for name in rankers.names():
        found = rankers.create(name).scores("sort a list", documents(["short", long]), ctx)
        assert [was_cut for _, was_cut in found] == [False, True]
        assert all(score == score for score, _ in found)
    limited = QueryLikelihood(max_document_tokens=4)
    cut_here = ctx.model.tokenizer.decode(ctx.model.tokenizer.encode("abcdefgh")[:4])
    (score, flag), (same, unflagged) = limited.scores("q", documents(["abcdefgh", cut_here]), ctx)
    assert (flag, unflagged) == (True, False)
    assert score == pytest.approx(same, abs=1e-5)


def test_icr_with_one_layer_equals_a_hand_computation(ctx: RankContext) -> None:
    """Layer 0 sees plain embeddings, so its attention can be written down: one softmax over frame, documents and question."""
    ranker = InContextRanker(first=0.0, last=0.5)
    model, encode = ctx.model, ctx.model.tokenizer.encode
    texts, query = TEXTS[:3], "sort a list"
    found = [score for score, _ in ranker.scores(query, documents(texts), ctx)]

    def layer0(tokens: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []

        class Tap:
            def attend(self, layer: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, raw: object) -> torch.Tensor:
                kept.extend([q, k])
                return torch.zeros_like(q)

        model.decoder.forward(torch.tensor(tokens), torch.arange(start, start + len(tokens)), Tap(), n_layers=1)
        return kept[0], kept[1]

    frame, docs = encode(ranker.instruction), [encode(t) for t in texts]
    scale = model.spec.layers[0].scale
    group = model.spec.n_q_heads // model.spec.n_kv_heads

    def attention(asked: list[int]) -> torch.Tensor:
        question = encode(ranker.question)
        q, own = layer0(question + asked, len(frame) + max(map(len, docs)))
        keys = torch.cat([layer0(frame, 0)[1], *(layer0(d, len(frame))[1] for d in docs), own], 1).repeat_interleave(group, 0)
        logits = q @ keys.transpose(-1, -2) * scale
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), float("-inf"))
        first = len(frame)
        return logits.softmax(-1)[:, -len(asked) :, first : first + sum(map(len, docs))].mean(1).sum(0)

    calibrated = attention(encode(" " + query)) - attention(encode(ranker.empty_query))
    for score, part in zip(found, calibrated.split([len(d) for d in docs]), strict=True):
        kept = part[part >= part.mean() - 2 * part.std(correction=0)]
        assert score == pytest.approx(kept.sum().item(), abs=1e-5)


def test_icr_moves_with_its_documents(ctx: RankContext) -> None:
    docs = documents(TEXTS[:4])
    forward = {d.doc_id: s for d, (s, _) in zip(docs, InContextRanker().scores("sort", docs, ctx), strict=True)}
    turned = list(reversed(docs))
    backward = {d.doc_id: s for d, (s, _) in zip(turned, InContextRanker().scores("sort", turned, ctx), strict=True)}
    assert backward == pytest.approx(forward, abs=1e-5)


@pytest.mark.parametrize("name", rankers.names())
def test_a_cancelled_ranking_leaves_no_lease(name: str, ctx: RankContext) -> None:
    def check() -> None:
        raise Cancelled("given up")

    with pytest.raises(Cancelled):
        rankers.create(name).rank("sort", documents(TEXTS), RankContext(ctx.model, ctx.store, check_cancelled=check))


@pytest.mark.promise("R13")
@pytest.mark.parametrize("name", rankers.names())
@pytest.mark.parametrize("ends", [True, False])
def test_a_ranking_longer_than_a_lease_keeps_its_documents_and_lets_them_go(name: str, ends: bool, ctx: RankContext) -> None:
    """Some documents come out of the cache, others are read, and each forward pass takes longer than a lease."""
    now = [0.0]
    ctx.store._clock = lambda: now[0]
    docs = documents(TEXTS)
    expected = rankers.create(name).rank("sort", docs[:3], ctx)

    def check() -> None:
        now[0] += 2 * ctx.store.config.lease_s
        ctx.store.sweep()
        if not ends:
            raise Cancelled("given up")

    slow = RankContext(ctx.model, ctx.store, check_cancelled=check)
    if not ends:
        with pytest.raises(Cancelled):
            rankers.create(name).rank("sort", docs, slow)
        return
    assert len(rankers.create(name).rank("sort", docs, slow).items) == len(docs)
    again = rankers.create(name).rank("sort", docs[:3], slow)
    assert [(item.doc_id, pytest.approx(item.score, abs=1e-5)) for item in expected.items] == [
        (item.doc_id, item.score) for item in again.items
    ]


@pytest.mark.parametrize("name", rankers.names())
def test_a_query_as_long_as_the_context_is_refused(name: str, ctx: RankContext) -> None:
    with pytest.raises(ContextTooLong, match="query"):
        rankers.create(name).rank("word " * ctx.model.spec.max_context, documents(["a"]), ctx)


@pytest.mark.parametrize(
    "make",
    [
        lambda: QueryLikelihood(max_document_tokens=-1),
        lambda: QueryLikelihood(bridge=""),
        lambda: InContextRanker(first=0.7, last=0.7),
        lambda: InContextRanker(first=float("nan")),
    ],
)
def test_bad_parameters_are_refused(make: object) -> None:
    with pytest.raises(InvalidRequest):
        make()  # type: ignore[operator]


def test_rankers_are_the_registered_ones() -> None:
    assert {"icr", "likelihood"} <= set(rankers.names())
    assert all(issubclass(rankers.get(n), Ranker) for n in rankers.names())
