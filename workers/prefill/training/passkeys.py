"""Prompts that can only be answered by reading far back: random words hidden in real text, asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from winnow.errors import InvalidRequest
from winnow.workers.model.tokenizer import Tokenizer
from winnow.workers.prefill.training import texts

# One word a letter, as radio operators spell: 26 that a small model can copy and cannot guess.
WORDS = (  # noqa: SIM905 - 26 lines otherwise
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike "
    "november oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()


@dataclass(frozen=True)
class Passkeys:
    """Tokens of text, question and answer; the answer's begin at index `answer`."""

    ids: list[int]
    answer: int


def passkey_prompts(
    tokenizer: Tokenizer, n_tokens: int, n_keys: int, n_words: int, seed: int, *, held_out: bool = False
) -> Iterator[Passkeys]:
    """Prompts of exactly n_tokens tokens, answer included, without end.

    `n_keys` passkeys of `n_words` words each stand at even depths from 0.05 to 0.95 of the text; the answer names all of them.

    Args:
        held_out: over text that is held out, see `texts.passages`.

    Raises:
        InvalidRequest: keys, question and answer leave less than half of the tokens to the text.
    """
    draw = random.Random(f"passkeys {seed} {held_out}")
    source = texts.passages(tokenizer, n_tokens, seed, held_out=held_out)
    while True:
        keys = [" ".join(draw.choices(WORDS, k=n_words)) for _ in range(n_keys)]
        planted = [tokenizer.encode(f"\n\nRemember that passkey number {i + 1} is: {key}.\n\n") for i, key in enumerate(keys)]
        question = tokenizer.encode("\n\nWhat are the passkeys?\n\n")
        answer = tokenizer.encode("".join(f"Passkey number {i + 1} is: {key}.\n" for i, key in enumerate(keys)))
        room = n_tokens - len(question) - len(answer) - sum(map(len, planted))
        if room < n_tokens // 2:
            raise InvalidRequest(
                f"calibrate duoattention: {n_keys} keys of {n_words} words leave {max(0, room)} of {n_tokens} tokens to the text "
                "they are hidden in, half are needed; give more tokens, fewer keys or fewer words"
            )
        text = next(source)[:room]
        ids: list[int] = []
        for i, key_ids in enumerate(planted):
            depth = 0.05 + 0.9 * (i / (n_keys - 1) if n_keys > 1 else 0.5)
            ids += text[len(ids) - sum(map(len, planted[:i])) : int(depth * room)] + key_ids
        ids += text[int((0.95 if n_keys > 1 else 0.5) * room) :] + question
        yield Passkeys(ids + answer, len(ids))
