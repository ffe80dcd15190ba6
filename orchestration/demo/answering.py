"""The second half of the demo: questions about a long text, with dense attention and with sparse prefill plus KV retrieval."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from winnow.client import Client
from winnow.types import Message, Sampling, Usage

PATHS = {"dense": ("dense", "dense"), "sparse": ("recall", "retrieval-attention")}


@dataclass(frozen=True)
class Question:
    """What is asked about the text. `stem` begins the answer; `expected` is part of a right one ("" = nobody says);
    `max_tokens` ends it."""

    title: str
    text: str
    stem: str = ""
    expected: str = ""
    max_tokens: int = 48


@dataclass(frozen=True)
class Answer:
    """One answer on one path, with what it cost and read.

    Attributes:
        ttft_s: wall seconds until the first token reached the client.
        tokens_per_s: of the tokens after the first.
        right: whether `expected` is in it; None where nothing is expected.
    """

    question: str
    path: str
    text: str
    ttft_s: float
    tokens_per_s: float
    right: bool | None
    usage: Usage


def ask(
    client: Client,
    text: str,
    question: Question,
    path: str,
    *,
    on_stage: Callable[[str, int, int], None],
    on_text: Callable[[str], None],
) -> Answer:
    """Ask `question` about `text` on "dense" or "sparse". The text comes first, so that its prefix is the same every time."""
    prefill, decode = PATHS[path]
    message = Message("user", f"{text}\n\n{question.text}")
    started = time.perf_counter()
    first_s = 0.0
    pieces: list[str] = []
    usage = Usage()
    chunks = client.generate(
        messages=[message],
        answer_prefix=question.stem,
        prefill=prefill,
        decode=decode,
        sampling=Sampling(max_tokens=question.max_tokens),
    )
    for chunk in chunks:
        if chunk.stage:
            on_stage(chunk.stage, chunk.done, chunk.total)
        if chunk.token_ids and not first_s:
            first_s = time.perf_counter() - started
        if chunk.text:
            pieces.append(chunk.text)
            on_text(chunk.text)
        usage = chunk.usage or usage
    answer = "".join(pieces).strip()
    speed = (usage.completion_tokens - 1) / usage.decode_s if usage.completion_tokens > 1 and usage.decode_s > 0 else 0.0
    right = question.expected in answer if question.expected else None
    return Answer(question.title, path, answer, first_s, speed, right, usage)


def agreement(one: str, other: str) -> float:
    """Words that both answers have in the same order, over the words they have on average: 1.0 = the same words."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (one, other))
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
