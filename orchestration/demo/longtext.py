"""A real long text on every machine: Python's own language topics (`pydoc_data.topics`), with one planted fact."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

CITIES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito")


@dataclass(frozen=True)
class LongText:
    """A text with a fact planted in the middle of it.

    Attributes:
        text: whole paragraphs.
        tokens: of `text`, as the model counts.
        city, number: the planted fact, "The special magic number for {city} is: {number}."
    """

    text: str
    tokens: int
    city: str
    number: str

    @property
    def needle(self) -> str:
        return f"The special magic number for {self.city} is: {self.number}."

    @property
    def stem(self) -> str:
        """How an answer about the fact begins; small models need it. The blank ends it: digits are single tokens."""
        return f"The special magic number for {self.city} is: "


def long_text(n_tokens: int, count_tokens: Callable[[str], int], first: tuple[str, ...] = ("with", "try", "lambda")) -> LongText:
    """At least n_tokens tokens of language topics: `first`, then the others by name, cut at a paragraph.

    The fact stands half-way. City and number come from a fixed seed, so that two runs ask the same.
    """
    from pydoc_data.topics import topics

    names = [name for name in first if name in topics] + [name for name in sorted(topics) if name not in first]
    draw = random.Random(2026)
    city, number = draw.choice(CITIES), str(draw.randrange(1000000, 9999999))
    fact = f"The special magic number for {city} is: {number}."
    paragraphs: list[str] = []
    tokens = count_tokens(fact)
    for name in names:
        for paragraph in topics[name].strip().split("\n\n"):
            if tokens >= n_tokens:
                break
            paragraphs.append(paragraph)
            tokens += count_tokens(paragraph + "\n\n")
    paragraphs.insert(len(paragraphs) // 2, fact)
    text = "\n\n".join(paragraphs)
    return LongText(text, count_tokens(text), city, number)
