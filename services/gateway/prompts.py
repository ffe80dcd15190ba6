"""Requests to token ids. A session's text and its questions meet at a fixed token border, so that the text's KV is reused."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from winnow.types import Message
from winnow.workers.model.tokenizer import Tokenizer

_BETWEEN = "\n\n"  # between a session's text and the question


@dataclass(frozen=True)
class ContextPrompt:
    """A session's text as tokens: what comes before every question, and the template's text after it."""

    token_ids: tuple[int, ...]
    tail: str


def prompt_ids(tokenizer: Tokenizer, prompt: str, messages: Sequence[Message], answer_prefix: str) -> list[int]:
    """Ids of a raw prompt, or of a chat with the beginning of its answer. CPU-bound: run it in a thread.

    Raises:
        InvalidRequest: the chat template refuses the messages.
    """
    if not messages:
        return tokenizer.encode_prompt(prompt)
    return [*tokenizer.encode_chat(messages), *(tokenizer.encode(answer_prefix) if answer_prefix else [])]


def context_prompt(tokenizer: Tokenizer, text: str) -> ContextPrompt:
    """The part of every question's prompt that holds the session's text.

    With a chat template the text opens the user's turn; the template is rendered around a mark and cut there. The cut is
    a token border: both sides are tokenised apart, so a question never changes the ids of the text before it.
    """
    if not tokenizer.has_chat_template:
        return ContextPrompt(tuple(tokenizer.encode_prompt(text + _BETWEEN)), "")
    mark = f"mark{secrets.token_hex(12)}"
    head, _, tail = tokenizer.chat([Message("user", mark)]).partition(mark)
    return ContextPrompt((*tokenizer.encode(head, special=True), *tokenizer.encode(text + _BETWEEN)), tail)


def question_ids(tokenizer: Tokenizer, context: ContextPrompt, question: str, answer_prefix: str) -> list[int]:
    """Ids that follow the context's: the question, the end of the user's turn, the beginning of the answer."""
    after = tokenizer.encode(context.tail, special=True) if context.tail else []
    return [*tokenizer.encode(question), *after, *(tokenizer.encode(answer_prefix) if answer_prefix else [])]
