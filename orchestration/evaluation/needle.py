"""Needles: sentences with a number, hidden in real text, and questions about them.

Source: "Needle in a haystack" (Kamradt 2023) and the retrieval tasks of RULER (arXiv 2404.06654), rebuilt: another text, city
names as keys, and a prompt that ends in the stem of its answer, without which a small model repeats the question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.prompt import Prompt, assemble, depth_of, stem_ids
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.workers.model.tokenizer import Tokenizer

CITIES = (
    "Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito", "Madrid", "Cairo", "Tokyo", "Dublin", "Athens", "Vienna", "Warsaw",
    "Jakarta", "Havana", "Bogota", "Ottawa", "Prague", "Delhi", "Seoul", "Berlin", "Paris", "London", "Boston",
)  # fmt: skip
HEAD = "Some special magic numbers are hidden in the following text. Memorize them: you will be asked about them afterwards."
_DIGITS = 7


def _fact(city: str, number: str) -> str:
    return f"The special magic number for {city} is: {number}."


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))


def _stem(tokenizer: Tokenizer, question: str, stem: str) -> list[int]:
    return stem_ids(tokenizer, f"\n\n{question}\n\n{stem}", [str(digit) for digit in range(1, 10)])


def _in_range(task: str, name: str, value: int, low: int) -> None:
    if not low <= value <= len(CITIES):
        raise InvalidRequest(f"{task}: {name} must be {low} to {len(CITIES)}, got {value}")


@tasks.register("needle")
@dataclass(frozen=True)
class Needle(Task):
    """One number in the text, and its city asked for.

    Attributes:
        distractors: sentences of the same form about other cities.
    """

    has_depth = True
    about = "one planted number, asked for"
    distractors: int = 0

    def __post_init__(self) -> None:
        _in_range(self.name, "distractors + 1", self.distractors + 1, 1)

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        cities = draw.sample(CITIES, self.distractors + 1)
        numbers = [_number(draw) for _ in cities]
        depths = [depth_of(seed) if depth is None else depth, *(draw.random() for _ in cities[1:])]
        inserts = [(at, _fact(city, number)) for at, city, number in zip(depths, cities, numbers, strict=True)]
        stem = f"The special magic number for {cities[0]} is:"
        tail = _stem(tokenizer, f"What is the special magic number for {cities[0]}?", stem)
        ids, begun = assemble(tokenizer, n_tokens, seed, task=self.name, head=HEAD, inserts=inserts, tail=tail)
        return Prompt(ids, (numbers[0],), begun[0], max_new_tokens=_DIGITS + 5)


@tasks.register("multi-key")
@dataclass(frozen=True)
class MultiKey(Needle):
    """One number asked for among several of the same form: attention must tell the keys apart."""

    about = "one of several planted numbers, asked for by its city"
    distractors: int = 3


@tasks.register("multi-value")
@dataclass(frozen=True)
class MultiValue(Task):
    """Several numbers of one city, all asked for. The score is the share that is named."""

    about = "all numbers planted under one city"
    values: int = 3

    def __post_init__(self) -> None:
        _in_range(self.name, "values", self.values, 2)

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        city = draw.choice(CITIES)
        numbers = [_number(draw) for _ in range(self.values)]
        inserts = [(draw.random(), _fact(city, number)) for number in numbers]
        stem = f"The {self.values} special magic numbers for {city} are:"
        tail = _stem(tokenizer, f"What are all the special magic numbers for {city}?", stem)
        ids, _ = assemble(tokenizer, n_tokens, seed, task=self.name, head=HEAD, inserts=inserts, tail=tail)
        return Prompt(ids, tuple(numbers), max_new_tokens=self.values * (_DIGITS + 4), stop=("\n\n",))  # often a list of lines


@tasks.register("multi-query")
@dataclass(frozen=True)
class MultiQuery(Task):
    """Numbers of several cities, all asked for. The score is the share that is named."""

    about = "the numbers planted under several cities, all asked for"
    queries: int = 3

    def __post_init__(self) -> None:
        _in_range(self.name, "queries", self.queries, 2)

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        cities = draw.sample(CITIES, self.queries)
        numbers = [_number(draw) for _ in cities]
        inserts = [(draw.random(), _fact(city, number)) for city, number in zip(cities, numbers, strict=True)]
        asked = f"{', '.join(cities[:-1])} and {cities[-1]}"
        tail = _stem(
            tokenizer, f"What are the special magic numbers for {asked}?", f"The special magic number for {cities[0]} is:"
        )
        ids, _ = assemble(tokenizer, n_tokens, seed, task=self.name, head=HEAD, inserts=inserts, tail=tail)
        return Prompt(ids, tuple(numbers), max_new_tokens=self.queries * 20, stop=())
