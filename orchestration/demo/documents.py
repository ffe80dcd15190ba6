"""Real documents on every machine: docstrings of the standard library, read from the running interpreter.

A docstring's first sentence says what the thing does, the rest explains it. So the rest is a document, and the first
sentence is a query whose right answer is known: the "known-item" test. Nobody tuned these texts for retrieval.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import random
import re
import warnings
from dataclasses import dataclass
from types import ModuleType

from winnow.types import Document

# Importable everywhere without side effects (no tkinter, no idlelib, nothing that opens a window or starts a thread).
MODULES = (
    "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "cmd", "codecs", "collections", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "email.message", "enum", "fileinput",
    "fnmatch", "fractions", "functools", "getpass", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac", "html",
    "http.client", "http.cookies", "imaplib", "inspect", "ipaddress", "itertools", "json", "linecache", "locale", "logging",
    "mailbox", "math", "mimetypes", "operator", "os", "pathlib", "pickle", "pkgutil", "platform", "plistlib", "pprint",
    "queue", "random", "re", "sched", "secrets", "selectors", "shelve", "shutil", "signal", "smtplib", "socket", "sqlite3",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback",
    "types", "typing", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom",
    "xml.etree.ElementTree", "zipfile", "zoneinfo",
)  # fmt: skip
QUESTIONS = (  # in words of our own, and the docstring each one means; written before the first ranking was seen
    ("keep the results of earlier calls so that a slow function runs only once", "functools.lru_cache"),
    ("suggest the word that somebody meant when they misspelled it", "difflib.get_close_matches"),
    ("fit a long paragraph into lines of a given width", "textwrap.wrap"),
)
MIN_QUERY_WORDS = 3
MIN_WORDS = 15
MAX_WORDS = 120  # what one docstring may add to the work of the demo; longer ones are cut at a word, here, before ranking
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)|->")  # C docstrings may begin with their own signature: no query anybody would type
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(*\[])|\n\s*\n")


@dataclass(frozen=True)
class KnownItem:
    """A document and the query it is the answer to."""

    query: str
    document: Document


def known_items(n: int) -> list[KnownItem]:
    """At most n items, the same ones for the same Python: those of `QUESTIONS`, then evenly from all modules.

    Duplicate queries and duplicate documents are left out, so that exactly one document is right.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # looking at a name is not using it
        by_module = [_items_of(importlib.import_module(name)) for name in MODULES]
    shuffle = random.Random(0).shuffle  # by name, neighbours are variants of each other (dump, dumps)
    for items in by_module:
        shuffle(items)
    meant = {doc_id for _, doc_id in QUESTIONS}
    first = [item for items in by_module for item in items if item.document.doc_id in meant]
    turns = [item for turn in itertools.zip_longest(*by_module) for item in turn if item is not None]
    kept: list[KnownItem] = []
    seen: set[str] = set()
    for item in (*first, *turns):
        query, text = item.query.lower(), item.document.text.lower()
        if len(kept) < n and query not in seen and text not in seen:
            seen.update((query, text))
            kept.append(item)
    return kept


def _items_of(module: ModuleType) -> list[KnownItem]:
    names = sorted(name for name in dir(module) if not name.startswith("_"))
    found = []
    for name in names:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing)) or getattr(thing, "__module__", "") != module.__name__:
            continue
        split = split_docstring(inspect.getdoc(thing) or "")
        if split is not None:
            found.append(KnownItem(split[0], Document(f"{module.__name__}.{name}", split[1])))
    return found


def split_docstring(text: str) -> tuple[str, str] | None:
    """(first sentence, the rest), both on one line; None when either is too short to mean something."""
    parts = _SENTENCE_END.split(text.strip(), maxsplit=1)
    if len(parts) < 2:
        return None
    query = " ".join(parts[0].split())
    words = parts[1].split()
    if len(query.split()) < MIN_QUERY_WORDS or len(words) < MIN_WORDS or _SIGNATURE.search(query):
        return None
    return query, " ".join(words[:MAX_WORDS])
