"""Real text for prompts, from what every machine with Python has: its language topics, then the standard library's docstrings.

About 110 thousand tokens of topics and 70 thousand of docstrings; a longer prompt begins again at the first. Nothing of it
ships with winnow. Which text a Python brings depends on its version, so results compare within one machine.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import random
import re
import warnings
from collections.abc import Iterator
from types import ModuleType

from winnow.orchestration.demo.documents import MODULES
from winnow.workers.model.tokenizer import Tokenizer

_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z\"*(])")
_CODE = re.compile(r">>>|::=|^ {4,}\S|^[*=~^\"-]{4,}$", re.MULTILINE)  # code and headings: line breaks mean something


@functools.lru_cache(maxsize=1)
def topics() -> tuple[str, ...]:
    """The language reference of this Python, one text a topic, by name."""
    from pydoc_data.topics import topics as found

    return tuple(_plain(found[name]) for name in sorted(found))


@functools.lru_cache(maxsize=1)
def docstrings() -> tuple[tuple[str, str, str], ...]:
    """(dotted name, signature or "", docstring) of the public classes and functions of the standard library, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # looking at a name is not using it
        found = [item for name in MODULES for item in _items_of(importlib.import_module(name))]
    return tuple({item[2]: item for item in reversed(found)}.values())[::-1]  # a text under two names once, under its first


def _items_of(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    for name in sorted(name for name in dir(module) if not name.startswith("_")):
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing)) or getattr(thing, "__module__", "") != module.__name__:
            continue
        text = _plain(inspect.getdoc(thing) or "")
        if len(text.split()) < 8:
            continue
        try:
            signature = str(inspect.signature(thing))
        except (ValueError, TypeError):
            signature = ""
        yield f"{module.__name__}.{name}", signature if " at 0x" not in signature else "", text


def _plain(text: str) -> str:
    """ASCII, so that a cut between two tokens never falls inside a character."""
    for odd, even in (("\u2013", "-"), ("\u2014", "-"), ("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"')):
        text = text.replace(odd, even)
    return text.encode("ascii", "ignore").decode().strip()


def sentences(seed: int) -> Iterator[str]:
    """Pieces of text without end: topics in an order drawn from `seed`, then docstrings, then all of it again.

    Joined, the pieces are the text. Each begins where a sentence, a block of code or a paragraph begins.
    """
    draw = random.Random(f"text {seed}")
    parts = [list(topics()), [text for _, _, text in docstrings()]]
    for part in parts:
        draw.shuffle(part)
    for text in itertools.cycle(itertools.chain(*parts)):
        for paragraph in text.split("\n\n"):
            if not paragraph.strip():
                continue
            if _CODE.search(paragraph):
                yield paragraph + "\n\n"
                continue
            first, *rest = _SENTENCE.split(" ".join(paragraph.split()))
            yield from (first, *(" " + sentence for sentence in rest), "\n\n")


def filler(tokenizer: Tokenizer, n_tokens: int, seed: int) -> tuple[list[int], list[int]]:
    """Real text of exactly n_tokens tokens, and the places where something may be put in.

    Returns:
        The ids, and the ascending indices into them at which a sentence or paragraph begins; 0 is the first.
    """
    ids: list[int] = []
    borders: list[int] = []
    source = sentences(seed)
    while len(ids) < n_tokens:
        piece = next(source)
        if piece.strip():
            borders.append(len(ids))
        ids += tokenizer.encode(piece)
    return ids[:n_tokens], borders or [0]
