from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from winnow.types import Sampling
from winnow.workers.decode.sampling import CANDIDATES, draw, keep_mask, new_generator

V = 5000

CASES = [
    Sampling(temperature=0.7, top_k=7),
    Sampling(temperature=1.3, top_p=0.4),
    Sampling(temperature=1.0, top_p=0.999),  # reaches past the candidates
    Sampling(temperature=0.9, min_p=0.05),
    Sampling(temperature=2.0, min_p=1e-5),
    Sampling(temperature=1.0, top_k=40, top_p=0.8, min_p=0.02),
    Sampling(temperature=1.0, top_k=3000, top_p=0.95),
    Sampling(temperature=0.5, top_k=1),
    Sampling(temperature=1.0, top_p=1e-6),
]


def logits_of(seed: int, rows: int = 1, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


def expected_support(logits: torch.Tensor, s: Sampling) -> set[int]:
    scores = TemperatureLogitsWarper(s.temperature)(None, logits.double())  # its float32 sums lose the border of top_p near 1
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(None, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(None, scores)
    if s.min_p:
        scores = MinPLogitsWarper(s.min_p)(None, scores)
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("sampling", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_filters_leave_the_tokens_that_transformers_leaves(sampling: Sampling, seed: int) -> None:
    logits = logits_of(seed)
    ordered, order = (logits.double() / sampling.temperature).sort(descending=True)
    keep = keep_mask(ordered, ordered.logsumexp(-1), [sampling])
    assert set(order[keep].tolist()) == expected_support(logits, sampling)


@pytest.mark.parametrize("sampling", CASES)
def test_draws_stay_in_the_support_and_follow_its_probabilities(sampling: Sampling) -> None:
    logits = logits_of(3)
    support = expected_support(logits, sampling)
    generator = new_generator(Sampling(seed=1))
    n = 400
    drawn = [draw(logits, [sampling], [generator])[0].token_id for _ in range(n)]
    assert set(drawn) <= support
    top = int(logits.argmax())
    scores = logits[0] / sampling.temperature
    p = float(torch.softmax(scores[sorted(support)], 0)[sorted(support).index(top)])
    assert abs(drawn.count(top) / n - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-9


def test_plain_sampling_follows_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    generator = new_generator(Sampling(seed=5))
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[draw(logits, [Sampling(temperature=1.0)], [generator])[0].token_id] += 1
    assert torch.allclose(counts / 2000, torch.softmax(logits[0], 0), atol=0.04)
    assert counts[3] == 0


def test_a_draw_does_not_depend_on_batch_mates() -> None:
    everyone = [*CASES, Sampling(temperature=1.0), Sampling()]
    logits = logits_of(4, len(everyone))
    together = [new_generator(Sampling(seed=i)) for i in range(len(everyone))]
    alone = [new_generator(Sampling(seed=i)) for i in range(len(everyone))]
    for _ in range(20):
        batch = [d.token_id for d in draw(logits, everyone, together)]
        single = [draw(logits[i : i + 1], [s], [alone[i]])[0].token_id for i, s in enumerate(everyone)]
        assert batch == single


def test_ties_go_the_same_way_whether_or_not_the_whole_row_is_sorted() -> None:
    logits = logits_of(6).round()  # a few hundred tokens share each score
    assert CANDIDATES < V
    narrow, wide = Sampling(temperature=1.0, top_k=30), Sampling(temperature=1.0, top_p=0.999)
    alone, mixed = new_generator(Sampling(seed=9)), [new_generator(Sampling(seed=9)), new_generator(Sampling(seed=1))]
    for _ in range(20):
        expected = draw(logits, [narrow], [alone])[0].token_id
        assert draw(logits.expand(2, V), [narrow, wide], mixed)[0].token_id == expected


def test_greedy_takes_the_most_likely_and_draws_nothing() -> None:
    logits = logits_of(7, 2)
    generators = [new_generator(Sampling(seed=0)) for _ in range(2)]
    before = generators[0].get_state()
    drawn = draw(logits, [Sampling(), Sampling(top_k=5)], generators)
    assert [d.token_id for d in drawn] == logits.argmax(-1).tolist()
    assert torch.equal(before, generators[0].get_state())


def test_logprobs_are_of_the_unmodified_distribution_with_the_chosen_token_first() -> None:
    logits = logits_of(8, 3)
    sampling = [Sampling(temperature=5.0, top_k=50, seed=3, logprobs=4), Sampling(logprobs=2), Sampling()]
    drawn = draw(logits, sampling, [new_generator(s) for s in sampling])
    normal = torch.log_softmax(logits, -1)
    for b, (d, s) in enumerate(zip(drawn, sampling, strict=True)):
        if not s.logprobs:
            assert d.logprobs == ()
            continue
        top = normal[b].topk(s.logprobs)
        assert [i for i, _ in d.logprobs] == [d.token_id, *top.indices.tolist()]
        assert [p for _, p in d.logprobs] == pytest.approx([float(normal[b, d.token_id]), *top.values.tolist()])


def test_scores_that_are_not_finite_are_reported_for_their_row_only() -> None:
    logits = logits_of(9, 3)
    logits[1, 17] = torch.nan
    drawn = draw(logits, [Sampling()] * 3, [new_generator(Sampling())] * 3)
    assert [d.is_finite for d in drawn] == [True, False, True]


def test_no_seed_gives_other_draws_each_time() -> None:
    assert new_generator(Sampling()).initial_seed() != new_generator(Sampling()).initial_seed()
