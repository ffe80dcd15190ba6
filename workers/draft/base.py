"""The prompt-reducer plug-in point: a draft model says which prompt tokens the target model needs to see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from winnow.registry import Capabilities, Registry, modules_in
from winnow.workers.model.loader import LoadedModel


@dataclass(frozen=True)
class DraftContext:
    """draft: weights and tokenizer of the draft model (the same tokenizer as the target's); callbacks as in RankContext."""

    draft: LoadedModel
    on_progress: Callable[[int, int], None] = lambda done, total: None
    check_cancelled: Callable[[], None] = lambda: None


class PromptReducer(ABC):
    """Subclasses are frozen dataclasses whose fields are parameters."""

    name: ClassVar[str] = ""
    caps: ClassVar[Capabilities]

    @abstractmethod
    def keep(self, token_ids: Tensor, ctx: DraftContext) -> Tensor:
        """Indices into token_ids [n] (int64) to keep: int64, strictly ascending, the last token always among them."""


draft_scorers: Registry[PromptReducer] = Registry(
    kind="draft scorer",
    entry_points="winnow.draft_scorers",
    modules=modules_in("winnow.workers.draft.scorers"),
)
