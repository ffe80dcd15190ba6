"""Real text to train on, from what a machine with Python has: language topics, docstrings, packages' descriptions.

Nothing of it ships with winnow, and which text there is depends on the machine: about a million tokens where winnow and its
dependencies are installed. One document in eight is held out, by a digest of its content.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from winnow.workers.model.tokenizer import Tokenizer

ABOUT = "language topics and docstrings of Python's standard library, descriptions of installed packages"
_LEAST_CHARS = 400
_HELD_OUT_ONE_IN = 8
_WITH_DOCSTRING = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.lru_cache(maxsize=1)
def documents() -> tuple[str, ...]:
    """All texts, in an order of their own that does not depend on the file system."""
    from pydoc_data.topics import topics

    found = [*topics.values(), *_docstrings(), *_descriptions()]
    return tuple(sorted({text.strip() for text in found if len(text.strip()) >= _LEAST_CHARS}, key=_digest))


def passages(tokenizer: Tokenizer, n_tokens: int, seed: int, *, held_out: bool = False) -> Iterator[list[int]]:
    """Stretches of exactly n_tokens tokens without end: the documents in an order drawn from `seed`, one after the other.

    Args:
        held_out: from the documents that no other call sees.
    """
    mine = [text for text in documents() if (_digest(text) % _HELD_OUT_ONE_IN == 0) == held_out]
    ids: list[int] = []
    draw = random.Random(seed)
    while True:
        draw.shuffle(mine)
        for text in mine:
            ids += tokenizer.encode(text + "\n\n")
            while len(ids) >= n_tokens:
                yield ids[:n_tokens]
                ids = ids[n_tokens:]


def _docstrings() -> Iterator[str]:
    """One text for each module of the standard library: its docstrings, read without importing it."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        outer = [node for node in tree.body if isinstance(node, _WITH_DOCSTRING)]
        inner = [node for parent in outer if isinstance(parent, ast.ClassDef) for node in parent.body]
        nodes = (tree, *outer, *(node for node in inner if isinstance(node, _WITH_DOCSTRING)))
        yield "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def _descriptions() -> Iterator[str]:
    for package in importlib.metadata.distributions():
        metadata: Any = package.metadata  # an email message, which its type does not say
        yield str(metadata.get("Description") or metadata.get_payload() or "")


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(errors="replace"))
