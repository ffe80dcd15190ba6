"""A prompt of an exact number of tokens, put together from token ids.

Parts are encoded one by one and joined as ids, so that the length is exact whatever the tokenizer merges; a text encoded in
one go may differ from it by a token at each joint. The filler alone is cut to what is left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.orchestration.evaluation.text import filler
from winnow.workers.model.tokenizer import Tokenizer

MIN_FILLER_TOKENS = 32  # less text than this around the evidence asks nothing of anybody's attention


@dataclass(frozen=True)
class Prompt:
    """What a task asks a model.

    Attributes:
        token_ids: the prompt; its length is what was asked for, exactly.
        answers: what a right answer contains; how they count is the task's `score`.
        depth: where the evidence begins as a share of the prompt, 0 to 1; None where it is all over the prompt.
        max_new_tokens: tokens to generate; 0 = nothing is generated, the prompt itself is scored.
        stop: the answer ends before the first of these.
        scored_tokens: for likelihood tasks: how many of the last tokens are predicted and counted.
    """

    token_ids: tuple[int, ...]
    answers: tuple[str, ...] = ()
    depth: float | None = None
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ("\n",)
    scored_tokens: int = 0


def depth_of(seed: int) -> float:
    """A depth for a seed in (0, 1): any number of seeds from 0 on is spread evenly (the golden-ratio sequence)."""
    return (0.5 + seed * 0.6180339887498949) % 1.0


def stem_ids(tokenizer: Tokenizer, stem: str, examples: Sequence[str]) -> list[int]:
    """The tokens with which a prompt ends so that the answer's own tokens follow.

    A blank between stem and answer belongs to the answer's first token in some tokenizers and is one of its own in others:
    what all examples of an answer share is the stem's.

    Args:
        stem: the words before the answer, without a blank at the end.
        examples: possible answers, two or more that begin differently.
    """
    encoded = [tokenizer.encode(f"{stem} {example}") for example in examples]
    shared = 0
    while all(len(ids) > shared + 1 for ids in encoded) and len({ids[shared] for ids in encoded}) == 1:
        shared += 1
    return encoded[0][:shared]


def assemble(
    tokenizer: Tokenizer,
    n_tokens: int,
    seed: int,
    *,
    task: str,
    head: str,
    inserts: Sequence[tuple[float, str]],
    tail: Sequence[int],
) -> tuple[tuple[int, ...], list[float]]:
    """Head, real text with the inserts in it, tail: exactly n_tokens tokens.

    Args:
        task: its name, for the error.
        inserts: (depth as a share of the text, what to put there as a paragraph of its own); each goes to the nearest place
            where a sentence begins.
        tail: the question with the stem of its answer, as ids.

    Returns:
        The ids, and where each insert begins as a share of the prompt.

    Raises:
        InvalidRequest: n_tokens leaves less than MIN_FILLER_TOKENS for the text.
    """
    before = [*tokenizer.bos_ids, *tokenizer.encode(head + "\n\n")]
    pieces = [(depth, tokenizer.encode(f"\n\n{text}\n\n"), i) for i, (depth, text) in enumerate(inserts)]
    fixed = len(before) + sum(len(ids) for _, ids, _ in pieces) + len(tail)
    room = n_tokens - fixed
    if room < MIN_FILLER_TOKENS:
        raise InvalidRequest(
            f"lengths: {task} needs at least {fixed + MIN_FILLER_TOKENS} tokens with this tokenizer, got {n_tokens}; ask for more"
        )
    text, borders = filler(tokenizer, room, seed)
    places = sorted((min(borders, key=lambda b: abs(b - depth * room)), i, ids) for depth, ids, i in pieces)
    ids, begun, at = list(before), [0.0] * len(pieces), 0
    for place, i, piece in places:
        ids += text[at:place]
        begun[i] = len(ids) / n_tokens
        ids += piece
        at = place
    ids += [*text[at:], *tail]
    assert len(ids) == n_tokens
    return tuple(ids), begun
