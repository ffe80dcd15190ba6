"""Counting words: which of them come most often, in a list of words or in made-up text.

Source: the aggregation tasks of RULER (arXiv 2404.06654), rebuilt with words of this Python's language reference. Small models
answer them poorly; what they are good for is agreement with dense attention, since the evidence lies everywhere.
"""

from __future__ import annotations

import functools
import math
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.prompt import MIN_FILLER_TOKENS, Prompt, stem_ids
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.orchestration.evaluation.text import filler, topics
from winnow.workers.model.tokenizer import Tokenizer

_TOKENS_A_WORD = 6  # with its number, roughly


@functools.lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Lower-case words of five to nine letters that the language reference uses, by name."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{5,9}\b", " ".join(topics())))))


@tasks.register("common-words")
@dataclass(frozen=True)
class CommonWords(Task):
    """A shuffled list in which a few words come often and all others seldom; the frequent ones are asked for.

    Attributes:
        words: frequent words, all asked for.
        often, seldom: times each of them, and each other word, stands in the list.
    """

    about = "the words that come most often in a long list"
    words: int = 5
    often: int = 16
    seldom: int = 2

    def __post_init__(self) -> None:
        if not 2 <= self.words <= 20 or not 1 <= self.seldom < self.often <= 1000:
            raise InvalidRequest(
                f"{self.name}: needs 2 <= words <= 20 and 1 <= seldom < often <= 1000, "
                f"got words={self.words}, often={self.often}, seldom={self.seldom}"
            )

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        pool = draw.sample(vocabulary(), len(vocabulary()))
        asked, others = pool[: self.words], pool[self.words :]
        head = "Below is a numbered list of words. Memorize the words that appear most often."
        question = f"Question: What are the {self.words} most common words in the list above?"
        stem = f"Answer: The {self.words} words that appear most often in the list are: 1."
        tail = stem_ids(tokenizer, f"\n\n{question}\n\n{stem}", pool[:50])

        # a prompt longer than all words make at these counts gets the same list with every count multiplied
        times = max(1, n_tokens // (_TOKENS_A_WORD * self.seldom * len(others)))

        def body(size: int) -> list[str]:
            drawn = asked * (self.often * times) + others[:size] * (self.seldom * times)
            random.Random(f"{self.name} {seed} {size}").shuffle(drawn)
            return [f"{number}. {word}" for number, word in enumerate(drawn, start=1)]

        ids = _fit(self.name, tokenizer, n_tokens, seed, head, tail, body, len(others))
        return Prompt(ids, tuple(asked), max_new_tokens=self.words * 6, stop=("\n\n",))


_MOST_WORDS = 1 << 16  # in a list that anything can be asked about


@tasks.register("frequent-words")
@dataclass(frozen=True)
class FrequentWords(Task):
    """Text of made-up words whose frequencies fall off as a power of their rank; the first few are asked for.

    Attributes:
        words: how many are asked for.
        alpha: word of rank r comes as often as r ** -alpha says.
    """

    about = "the most frequent words of a text in made-up words"
    words: int = 3
    alpha: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.words <= 10 or not 1.0 <= self.alpha <= 8.0:
            raise InvalidRequest(
                f"{self.name}: needs 1 <= words <= 10 and 1 <= alpha <= 8, got words={self.words}, alpha={self.alpha}"
            )
        if self._smallest() > _MOST_WORDS:
            raise InvalidRequest(
                f"{self.name}: with alpha={self.alpha} it takes {self._smallest()} words until {self.words} of them lead; "
                "ask for fewer words or a smaller alpha"
            )

    def _shares(self) -> list[float]:
        return [(rank + 1) ** -self.alpha for rank in range(26)]

    def _smallest(self) -> int:
        """Words of a list from which on the last one asked for comes more often than the next."""
        shares = self._shares()
        return math.ceil(sum(shares) / (shares[self.words - 1] - shares[self.words]))

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        initials = draw.sample(string.ascii_lowercase, k=26)
        pool = [initial + "".join(draw.choices(string.ascii_lowercase, k=5)) for initial in initials]
        head = "Read the following coded text and track how often each coded word appears."
        question = f"Question: What are the {self.words} most frequent words in the coded text above?"
        tail = stem_ids(tokenizer, f"\n\n{question}\n\nAnswer: The {self.words} most frequent words are:", pool)

        shares = self._shares()

        def body(size: int) -> list[str]:
            scale = size / sum(shares)
            drawn = [word for word, share in zip(pool, shares, strict=True) for _ in range(round(share * scale))]
            random.Random(f"{self.name} {seed} {size}").shuffle(drawn)
            return drawn

        ids = _fit(self.name, tokenizer, n_tokens, seed, head, tail, body, n_tokens, self._smallest())
        return Prompt(ids, tuple(pool[: self.words]), max_new_tokens=self.words * 8, stop=("\n\n",))


def _fit(
    task: str, tokenizer: Tokenizer, n_tokens: int, seed: int, head: str, tail: Sequence[int], body: Callable[[int], list[str]],
    largest: int, smallest: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """Exactly n_tokens: real text to make up the length, head, the longest list of words that fits, tail.

    Args:
        body: body(size) is a list of words that grows with size, smallest <= size <= largest.
    """

    def encoded(size: int) -> list[int]:
        return tokenizer.encode(" " + " ".join(body(size)))

    opening = tokenizer.encode(f"\n\n{head}\n\n")
    room = n_tokens - len(tokenizer.bos_ids) - len(opening) - len(tail)
    if (least := len(encoded(smallest))) + MIN_FILLER_TOKENS > room:
        needed = n_tokens - room + least + MIN_FILLER_TOKENS
        raise InvalidRequest(f"lengths: {task} needs at least {needed} tokens with this tokenizer, got {n_tokens}; ask for more")
    low, high = smallest, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encoded(middle)) + MIN_FILLER_TOKENS <= room else (low, middle - 1)
    listed = encoded(low)
    text, _ = filler(tokenizer, room - len(listed), seed)
    return (*tokenizer.bos_ids, *text, *opening, *listed, *tail)
