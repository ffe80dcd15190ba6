"""Prompts have the length asked for and hold what their answers say; scores are what a person would give."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest

from winnow.errors import InvalidRequest, UnknownName
from winnow.orchestration.evaluation.prompt import Prompt, depth_of, stem_ids
from winnow.orchestration.evaluation.task import share_found, tasks
from winnow.orchestration.evaluation.text import filler, sentences
from winnow.registry import parse_spec
from winnow.workers.model.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

SPECS = (
    "needle", "needle:distractors=2", "multi-key", "multi-value", "multi-query", "tracking", "tracking:chains=2,hops=1",
    "common-words:often=4,words=3,seldom=1", "frequent-words", "key-value", "questions", "questions:kind=default", "perplexity",
)  # fmt: skip
each_task = pytest.mark.parametrize("spec", SPECS)


def prompt_of(spec: str, tokenizer: Tokenizer, n: int = 1400, seed: int = 0, depth: float | None = None) -> Prompt:
    return tasks.create(*parse_spec(spec)).make(tokenizer, n, seed, depth)


def text_of(spec: str, tokenizer: Tokenizer, n: int = 1400, seed: int = 0) -> tuple[str, Prompt]:
    prompt = prompt_of(spec, tokenizer, n, seed)
    return tokenizer.decode(prompt.token_ids), prompt


def test_every_task_is_tried_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(tasks.names())


@each_task
@pytest.mark.parametrize("n", [1100, 1401, 4096])
def test_a_prompt_has_exactly_the_tokens_asked_for(spec: str, n: int, tokenizer: Tokenizer) -> None:
    for seed in range(3):
        prompt = prompt_of(spec, tokenizer, n, seed)
        assert len(prompt.token_ids) == n
        assert all(0 <= token < tokenizer.vocab_size for token in prompt.token_ids)
        assert (prompt.max_new_tokens > 0) == bool(prompt.answers) == (prompt.scored_tokens == 0)


@each_task
def test_a_seed_makes_the_same_prompt_again_and_another_seed_another(spec: str, tokenizer: Tokenizer) -> None:
    first = prompt_of(spec, tokenizer)
    assert prompt_of(spec, tokenizer) == first
    assert prompt_of(spec, tokenizer, seed=1).token_ids != first.token_ids


@each_task
def test_a_length_too_short_is_refused_with_the_one_that_would_do(spec: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=f"lengths: {spec.partition(':')[0]} needs at least") as refusal:
        prompt_of(spec, tokenizer, 1)
    (needed,) = re.findall(r"at least (\d+) tokens", str(refusal.value))
    assert len(prompt_of(spec, tokenizer, int(needed)).token_ids) == int(needed)
    with pytest.raises(InvalidRequest):
        prompt_of(spec, tokenizer, int(needed) - 1)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if tasks.get(spec.partition(":")[0]).has_depth])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.8, 1.0])
def test_evidence_lies_at_the_depth_asked_for(spec: str, depth: float, tokenizer: Tokenizer) -> None:
    n = 4096
    prompt = prompt_of(spec, tokenizer, n, seed=2, depth=depth)
    assert prompt.depth is not None
    evidence = tokenizer.decode(prompt.token_ids[int(prompt.depth * n) :])
    before = tokenizer.decode(prompt.token_ids[: int(prompt.depth * n)])
    assert prompt.answers[0] in evidence
    assert prompt.answers[0] not in before or "default" in spec  # a default of 1 or None stands in many entries
    assert prompt.depth == pytest.approx(depth, abs=0.16)  # head and question take their share of a short prompt


def test_depths_of_seeds_are_spread_evenly() -> None:
    for count, widest in ((5, 0.25), (10, 0.15), (50, 0.04)):
        edges = [0.0, *sorted(depth_of(seed) for seed in range(count)), 1.0]
        assert max(after - before for before, after in itertools.pairwise(edges)) < widest


def test_a_needle_prompt_ends_in_the_stem_of_its_answer(tokenizer: Tokenizer) -> None:
    text, prompt = text_of("needle", tokenizer)
    (city,) = re.findall(r"special magic number for (\w+) is: \d{7}\.", text)
    assert f"The special magic number for {city} is: {prompt.answers[0]}." in text
    assert text.rstrip().endswith(f"The special magic number for {city} is:")


def test_distractors_name_other_cities(tokenizer: Tokenizer) -> None:
    text, prompt = text_of("multi-key", tokenizer)
    planted = dict(re.findall(r"special magic number for (\w+) is: (\d{7})\.", text))
    asked = text.rstrip().removesuffix(" is:").rpartition(" ")[2]
    assert len(planted) == 4
    assert (planted[asked],) == prompt.answers


def test_multi_value_and_multi_query_plant_all_their_answers(tokenizer: Tokenizer) -> None:
    for spec, cities in (("multi-value", 1), ("multi-query", 3)):
        text, prompt = text_of(spec, tokenizer)
        planted = re.findall(r"special magic number for (\w+) is: (\d{7})\.", text)
        assert {number for _, number in planted} == set(prompt.answers)
        assert len({city for city, _ in planted}) == cities


def test_tracking_answers_are_the_names_the_value_reaches(tokenizer: Tokenizer) -> None:
    text, prompt = text_of("tracking:chains=2", tokenizer)
    (value,) = set(re.findall(r"assigned the value (\d+)", text))
    holds: set[str] = set()
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):  # in the order of the text, as a reader would
        if source == value or source in holds:
            holds.add(name)
    assert holds == set(prompt.answers)
    assert len(holds) == 4


def test_common_words_are_the_most_common(tokenizer: Tokenizer) -> None:
    text, prompt = text_of("common-words:often=6", tokenizer)
    listed = Counter(re.findall(r"\d+\. (\w+)", text.partition("numbered list of words")[2]))
    assert {word for word, _ in listed.most_common(5)} == set(prompt.answers)
    assert listed.most_common(6)[5][1] < listed.most_common(5)[4][1] == 6


@pytest.mark.parametrize(("params", "n"), [("", 3000), ("", 450), (":words=10", 8000), (":words=2,alpha=8", 2500)])
def test_frequent_words_are_the_most_frequent(params: str, n: int, tokenizer: Tokenizer) -> None:
    text, prompt = text_of(f"frequent-words{params}", tokenizer, n=n)
    body = text.partition("each coded word appears.")[2].partition("Question")[0]
    asked = len(prompt.answers)
    (*found, (_, next_count)) = [*Counter(body.split()).most_common(asked + 1), ("", 0)][: asked + 1]
    assert {word for word, _ in found} == set(prompt.answers)
    assert min(count for _, count in found) > next_count, "a tie has no answer"


def test_the_key_asked_for_stands_once_in_the_list_with_its_value(tokenizer: Tokenizer) -> None:
    text, prompt = text_of("key-value", tokenizer)
    pairs = re.findall(r"^([a-z]+-[a-z]+): (\d+)$", text, re.MULTILINE)
    asked = text.rstrip().removesuffix(":").rpartition("\n")[2]
    assert len(pairs) > 20
    assert [value for key, value in pairs if key == asked] == list(prompt.answers)


def test_a_default_asked_for_is_in_the_signature_in_the_text(tokenizer: Tokenizer) -> None:
    for seed in range(4):
        text, prompt = text_of("questions:kind=default", tokenizer, seed=seed)
        ((parameter, name),) = re.findall(r"What is the default of (\w+) in ([\w.]+)\?", text)
        signature = next(line for line in text.splitlines() if line.startswith(f"{name}("))
        assert re.search(rf"\b{parameter}={re.escape(prompt.answers[0])}[,)]", signature)


def test_filler_is_the_real_text_cut_at_a_token(tokenizer: Tokenizer) -> None:
    ids, borders = filler(tokenizer, 500, seed=3)
    source = sentences(3)
    pieces = [next(source) for _ in range(60)]
    assert tokenizer.decode(ids) == "".join(pieces)[: len(tokenizer.decode(ids))]
    starts, at = set(), 0
    for piece in pieces:
        starts.add(at)
        at += len(tokenizer.encode(piece))
    assert borders[0] == 0 and len(borders) > 3
    assert set(borders) <= starts


def test_the_stem_stops_where_answers_begin_to_differ(tokenizer: Tokenizer) -> None:
    digits = stem_ids(tokenizer, "It is:", ["1", "2"])
    assert tokenizer.decode(digits) == "It is: "  # a digit is a token of its own here, so the blank is the stem's
    words = stem_ids(tokenizer, "It is:", ["the end", "an end"])
    assert tokenizer.decode(words) == "It is:"  # " the" and " an" are tokens that bring their blank


def test_share_found_counts_whole_words_once() -> None:
    assert share_found(["123", "77"], "It is 123, not 777.") == 0.5
    assert share_found(["alpha"], "ALPHA.") == 1.0
    assert share_found(["alpha"], "alphabet") == 0.0
    assert share_found(["12"], "") == 0.0


def test_a_description_is_scored_by_the_words_it_shares_up_to_its_length() -> None:
    task, prompt = tasks.create("questions"), Prompt((), ("object b using Ascii85",))
    assert task.score('object b using Ascii85." And much more of it', prompt) == 1.0
    assert task.score("object of something else", prompt) == 0.25
    assert task.score("nothing", prompt) == 0.0


def test_a_default_is_right_only_at_the_start() -> None:
    task, prompt = tasks.create("questions", {"kind": "default"}), Prompt((), ("1",))
    assert [task.score(text, prompt) for text in ("1, sort=False)", " 1)", "10)", "False, x=1")] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("needle:distractors=99", "distractors"),
        ("multi-value:values=1", "values must be 2"),
        ("tracking:hops=0", "hops must be 1"),
        ("common-words:often=2,seldom=2", "seldom < often"),
        ("frequent-words:alpha=0", "alpha"),
        ("frequent-words:words=10,alpha=8", "fewer words or a smaller alpha"),
        ("key-value:digits=0", "digits must be 1"),
        ("questions:kind=why", "what or default"),
        ("perplexity:scored_tokens=0", "scored_tokens"),
        ("needle:depth=1", "no parameter 'depth'"),
    ],
)
def test_wrong_parameters_are_named(spec: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        tasks.create(*parse_spec(spec))


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean 'needle'"):
        tasks.create("needles")


def test_seeds_do_not_touch_the_global_generator() -> None:
    random.seed(1)
    before = random.getstate()
    next(sentences(0))
    assert random.getstate() == before
