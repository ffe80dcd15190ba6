"""Perplexity on real text: how well the model predicts a piece of a long text that it has read."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.prompt import Prompt
from winnow.orchestration.evaluation.task import Task, tasks
from winnow.orchestration.evaluation.text import filler
from winnow.workers.model.tokenizer import Tokenizer


@tasks.register("perplexity")
@dataclass(frozen=True)
class Perplexity(Task):
    """Likelihood of the last tokens of a text given all before them, of those that a prefill method planned: the dense end of a
    served prompt is left out, which would tell nothing of the method. The score is 1 / perplexity: the geometric mean of the
    probabilities the tokens were given.

    Attributes:
        scored_tokens: how many tokens count; half of a shorter prompt.
    """

    version = 2

    generates = False
    about = "perplexity of the last planned tokens of a real text; its score is 1 / perplexity"
    scored_tokens: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.scored_tokens <= 1 << 20:
            raise InvalidRequest(f"{self.name}: scored_tokens must be 1 to {1 << 20}, got {self.scored_tokens}")

    def make(self, tokenizer: Tokenizer, n_tokens: int, seed: int, depth: float | None = None) -> Prompt:
        if n_tokens < 2:
            raise InvalidRequest(f"lengths: {self.name} needs at least 2 tokens, got {n_tokens}; ask for more")
        text, _ = filler(tokenizer, n_tokens - len(tokenizer.bos_ids), seed)
        return Prompt((*tokenizer.bos_ids, *text), scored_tokens=min(self.scored_tokens, n_tokens // 2))
