"""A Generate request after all checks."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.services.gateway.router import Worker
from winnow.services.gateway.validation import Chosen
from winnow.types import Sampling


@dataclass(frozen=True)
class GenerateJob:
    """A checked request.

    Attributes:
        token_ids: the prompt.
        context_tokens: of these, the session's text; 0 = no session.
        prefer: the worker that holds the session's KV.
    """

    request_id: str
    tenant: str
    token_ids: list[int]
    sampling: Sampling
    prefill: Chosen
    decode: Chosen
    reducer: Chosen | None = None
    strict: bool = False
    no_cache: bool = False
    context_tokens: int = 0
    prefer: Worker | None = None
