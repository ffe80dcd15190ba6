"""The task plug-in point: a task makes prompts with a known answer and scores what a model says to them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from winnow.orchestration.evaluation.prompt import Prompt
from winnow.registry import Registry
from winnow.workers.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task(ABC):
    """Makes prompts of any length from a seed. Subclasses are frozen dataclasses whose fields are parameters.

    Attributes:
        has_depth: the evidence lies at one place, which `make` takes as a parameter; such tasks make heat maps.
        generates: the model's continuation is scored; otherwise the prompt's own likelihood is.
        about: one line for people.
        version: raised when the same seed makes another prompt or is scored in another way.
    """

    name: ClassVar[str] = ""
    has_depth: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    about: ClassVar[str] = ""
    version: ClassVar[int] = 1

    @abstractmethod
    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        """A prompt of exactly n_tokens tokens.

        Args:
            depth: where the evidence shall begin, 0 to 1; None = drawn from the seed. Met to the nearest sentence. Tasks
                without `has_depth` take no notice.

        Raises:
            InvalidRequest: too few tokens for what the task has to say; the message names how many it needs.

        The same arguments make the same prompt on the same Python version. Mutates nothing.
        """

    def score(self, text: str, prompt: Prompt) -> float:
        """Share of the answers that stand in the text as whole words, 0 to 1."""
        return share_found(prompt.answers, text)


tasks: Registry[Task] = Registry(
    kind="task",
    entry_points="winnow.evaluation_tasks",
    modules=tuple(
        f"winnow.orchestration.evaluation.{name}" for name in ("needle", "tracking", "words", "pairs", "questions", "likelihood")
    ),
)


def share_found(answers: Sequence[str], text: str) -> float:
    """Share of `answers` that occur in the text on word borders, whatever their case."""
    found = [bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)) for answer in answers]
    return sum(found) / len(found)
