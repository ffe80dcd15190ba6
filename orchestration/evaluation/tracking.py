"""Variable tracking: which names hold a value after a chain of assignments strewn over the text.

Source: the multi-hop task of RULER (arXiv 2404.06654), rebuilt with another text.
"""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.prompt import Prompt, assemble, stem_ids
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.workers.model.tokenizer import Tokenizer

_NAME_LETTERS = 5


@tasks.register("tracking")
@dataclass(frozen=True)
class Tracking(Task):
    """A number is given to a variable and handed on from variable to variable; all that hold it are asked for.

    Attributes:
        hops: times the value is handed on; hops + 1 names are right.
        chains: chains in the text, each with its own value; one is asked about.
    """

    about = "all variables that hold a value handed on along a chain of assignments"
    hops: int = 3
    chains: int = 1

    def __post_init__(self) -> None:
        for name, value in (("hops", self.hops), ("chains", self.chains)):
            if not 1 <= value <= 16:
                raise InvalidRequest(f"{self.name}: {name} must be 1 to 16, got {value}")

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        draw = random.Random(f"{self.name} {seed}")
        length = self.hops + 1
        names = _names(draw, length * self.chains)
        values = draw.sample(range(10_000, 100_000), self.chains)
        inserts: list[tuple[float, str]] = []
        for chain, value in enumerate(values):
            own = names[chain * length : (chain + 1) * length]
            lines = [f"VAR {own[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(own))]
            inserts += zip(sorted(draw.random() for _ in lines), lines, strict=True)  # in order: no value before it is given
        head = "Memorize and track the chains of variable assignments hidden in the following text."
        question = f"Question: Find all variables that are assigned the value {values[0]} in the text above."
        stem = f"Answer: {length} variables are assigned the value {values[0]}, they are: VAR"
        tail = stem_ids(tokenizer, f"\n\n{question}\n\n{stem}", names)
        ids, _ = assemble(tokenizer, n_tokens, seed, task=self.name, head=head, inserts=inserts, tail=tail)
        return Prompt(ids, tuple(names[:length]), max_new_tokens=length * (_NAME_LETTERS + 5))


def _names(draw: random.Random, count: int) -> list[str]:
    """Distinct names of capital letters, the first two with different initials (see `stem_ids`)."""
    initials = draw.sample(string.ascii_uppercase, k=len(string.ascii_uppercase))
    names: dict[str, None] = {}
    while len(names) < count:
        rest = "".join(draw.choices(string.ascii_uppercase, k=_NAME_LETTERS - 1))
        names[initials[len(names) % len(initials)] + rest] = None
    return list(names)
