"""Key-value retrieval: a long list of pairs, one key of which is asked for.

Source: "Lost in the Middle" (arXiv 2307.03172), section 3, with pairs of words as keys and numbers as values: a small model
confuses the UUIDs of the original.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.prompt import MIN_FILLER_TOKENS, Prompt, depth_of, stem_ids
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.orchestration.evaluation.text import filler
from winnow.orchestration.evaluation.words import vocabulary
from winnow.workers.model.tokenizer import Tokenizer


@tasks.register("key-value")
@dataclass(frozen=True)
class KeyValue(Task):
    """The value of one key out of a list that fills the prompt.

    Attributes:
        digits: of a value.
    """

    has_depth = True
    about = "the value of one key out of a prompt full of pairs"
    digits: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 32:
            raise InvalidRequest(f"{self.name}: digits must be 1 to 32, got {self.digits}")

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        depth = depth_of(seed) if depth is None else depth
        key, value = self._pair(draw, set())
        opening = tokenizer.encode("\n\nA list of keys and their values:\n\n")
        asked = tokenizer.encode(f"{key}: {value}\n")
        digits = [str(digit) for digit in range(1, 10)]
        tail = stem_ids(tokenizer, f"\nThe value of one key of the list again:\n\n{key}:", digits)
        room = n_tokens - len(tokenizer.bos_ids) - len(opening) - len(asked) - len(tail)
        if room < MIN_FILLER_TOKENS:
            needed = n_tokens - room + MIN_FILLER_TOKENS
            raise InvalidRequest(
                f"lengths: {self.name} needs at least {needed} tokens with this tokenizer, got {n_tokens}; ask for more"
            )
        seen = {key}
        before: list[int] = []
        after: list[int] = []
        while True:
            line = tokenizer.encode("{}: {}\n".format(*self._pair(draw, seen)))
            if len(before) + len(after) + len(line) > room:
                break
            side = before if (len(before) + len(after)) < depth * room else after
            side += line
        text, _ = filler(tokenizer, room - len(before) - len(after), seed)
        ids = (*tokenizer.bos_ids, *text, *opening, *before, *asked, *after, *tail)
        begun = (len(tokenizer.bos_ids) + len(text) + len(opening) + len(before)) / n_tokens
        return Prompt(ids, (value,), begun, max_new_tokens=self.digits + 4)

    def _pair(self, draw: random.Random, seen: set[str]) -> tuple[str, str]:
        while (key := "-".join(draw.choices(vocabulary(), k=2))) in seen:
            pass
        seen.add(key)
        return key, str(draw.randrange(10 ** (self.digits - 1), 10**self.digits))
