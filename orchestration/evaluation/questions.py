"""Questions about real documentation, whose answers can be checked: the text is this Python's own docstrings.

Two kinds, from the same prompt of many documented functions: what a function does (its docstring's first sentence, scored by
share of words), and the default of a parameter in its signature (scored as right or wrong).
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.demo.documents import split_docstring
from winnow.orchestration.evaluation.prompt import MIN_FILLER_TOKENS, Prompt, depth_of
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.orchestration.evaluation.text import docstrings
from winnow.workers.model.tokenizer import Tokenizer

_DEFAULT = re.compile(r"(\w+)=(\d+|'\w+'|True|False)(?=[,)])")
_GIVEN_WORDS = 2  # of the sentence that is asked for
_MIN_ASKED_WORDS = 6  # of that sentence; shorter ones can be guessed
_MAX_WORDS = 60  # of a docstring; longer ones are cut so that a short prompt still holds several


@dataclass(frozen=True)
class Entry:
    """One documented thing: dotted name, signature, first sentence, the text as it stands in a prompt."""

    name: str
    signature: str
    says: str
    text: str


@functools.lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Documented classes and functions of the standard library with a first sentence of their own, by name."""
    found = []
    for name, signature, text in docstrings():
        split = split_docstring(text)
        if split is None:
            continue
        words = " ".join(split[1].split()[:_MAX_WORDS])
        found.append(Entry(name, signature, split[0], f"{name}{signature}\n{split[0]} {words}\n\n"))
    once = Counter(entry.says.lower() for entry in found)
    return tuple(entry for entry in found if once[entry.says.lower()] == 1)


def _fits(entry: Entry, kind: str) -> bool:
    """The entry can be asked about."""
    return _DEFAULT.search(entry.signature) is not None if kind == "default" else len(entry.says.split()) >= _MIN_ASKED_WORDS


@tasks.register("questions")
@dataclass(frozen=True)
class Questions(Task):
    """A question about one of many documented functions.

    Attributes:
        kind: "what" asks what a function does, "default" for the default of one of its parameters.
    """

    has_depth = True
    about = "a question about one entry of real documentation"
    kind: str = "what"

    def __post_init__(self) -> None:
        if self.kind not in ("what", "default"):
            raise InvalidRequest(f"{self.name}: kind must be what or default, got {self.kind!r:.20}")

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {self.kind} {seed}")
        depth = depth_of(seed) if depth is None else depth
        shuffled = draw.sample(entries(), len(entries()))
        asked = next(entry for entry in shuffled if _fits(entry, self.kind))
        if self.kind == "what":
            # the sentence's first words are in the stem: asked freely, a small model answers in words of its own
            first, answer = asked.says.split()[:_GIVEN_WORDS], " ".join(asked.says.split()[_GIVEN_WORDS:])
            question = f'Question: What does {asked.name} do, in the words of its documentation?\n\nAnswer: "{" ".join(first)}'
        else:
            parameter, answer = draw.choice(_DEFAULT.findall(asked.signature))
            question = f"Question: What is the default of {parameter} in {asked.name}?\n\nAnswer: {asked.name}(... {parameter}="
        tail = tokenizer.encode(f"\n\n{question}")
        opening = [*tokenizer.bos_ids, *tokenizer.encode("Documentation of Python's standard library:\n\n")]
        own = tokenizer.encode(asked.text)
        room = n_tokens - len(opening) - len(own) - len(tail)
        if room < MIN_FILLER_TOKENS:
            raise InvalidRequest(
                f"lengths: {self.name} needs at least {n_tokens - room + MIN_FILLER_TOKENS} tokens with this tokenizer for seed "
                f"{seed}, got {n_tokens}; ask for more"
            )
        text, borders = _other_entries(tokenizer, room, [entry for entry in shuffled if entry is not asked])
        at = min(borders, key=lambda border: abs(border - depth * room))
        ids = (*opening, *text[:at], *own, *text[at:], *tail)
        return Prompt(ids, (answer,), (len(opening) + at) / n_tokens, max_new_tokens=len(tokenizer.encode(answer)) + 2)

    def score(self, text: str, prompt: Prompt) -> float:
        """For "what", the share of the answer's words among as many words of the text; for "default", 1.0 if the text begins with
        the value, else 0.0."""
        (answer,) = prompt.answers
        if self.kind == "default":
            return float(re.match(rf"\s*{re.escape(answer)}(?!\w)", text) is not None)
        right = re.findall(r"\w+", answer.lower())
        said = re.findall(r"\w+", text.lower())[: len(right)]
        return (Counter(said) & Counter(right)).total() / len(right)


def _other_entries(tokenizer: Tokenizer, n_tokens: int, pool: list[Entry]) -> tuple[list[int], list[int]]:
    """n_tokens of documentation, over and over where there is not enough, and the places where an entry begins."""
    ids: list[int] = []
    borders: list[int] = []
    while len(ids) < n_tokens:
        entry = pool[len(borders) % len(pool)]
        borders.append(len(ids))
        ids += tokenizer.encode(entry.text)
    return ids[:n_tokens], borders
