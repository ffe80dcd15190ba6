"""Token ids back to text, a few at a time: only whole characters come out, each id is looked at once."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 bytes stand for themselves, the other 68 are moved to U+0100 and up, in order (GPT-2's encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in set(printable))
    return {**table, **{chr(0x100 + i): byte for i, byte in enumerate(moved)}}


class TokenBytes:
    """What each token id adds to the text, as bytes; computed on first use and kept.

    Two vocabulary styles are known: byte-level ("Ġhello") and SentencePiece ("▁hello", "<0xE2>"). They are told apart by
    the decoder of the tokenizer's own file. Special tokens and ids outside the vocabulary add nothing.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._alphabet = byte_alphabet() if '"ByteLevel"' in decoder else None
        self.strips_first_space = self._alphabet is None and ('"Strip"' in decoder or '"Metaspace"' in decoder)
        self._skip = {idx for idx, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        piece = self._known.get(token_id)
        if piece is None:
            piece = self._known[token_id] = self._bytes(token_id)
        return piece

    def _bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._skip or token_id < 0 else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            if all(char in self._alphabet for char in token):
                return bytes(self._alphabet[char] for char in token)
            return token.encode()
        match = _BYTE_TOKEN.match(token)
        return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text, amortised O(1) per id.

    `push` returns the characters that are complete; bytes of an unfinished character wait for the next push, and `flush`
    turns what never got finished into U+FFFD. All texts together equal `Tokenizer.decode` of all ids. Bytes that can
    never become a character come out as U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: HasTokenBytes) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = self._token_bytes.strips_first_space

    def push(self, ids: Sequence[int]) -> str:
        """Text that became complete with these ids; "" while a character is unfinished."""
        return self._decoder.decode(self._strip(b"".join(map(self._token_bytes, ids))))

    def flush(self) -> str:
        """U+FFFD for the bytes still waiting, else "". The object is then ready for a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = self._token_bytes.strips_first_space
        return rest

    def _strip(self, data: bytes) -> bytes:
        """SentencePiece puts one space before the text; it is not part of it."""
        if self._at_start and data:
            self._at_start = False
            return data.removeprefix(b" ")
        return data


class HasTokenBytes:
    """What the detokenizer needs of a tokenizer."""

    token_bytes: TokenBytes
