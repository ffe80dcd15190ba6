"""Plug-in registries: a name, a class, and what it can do as data.

A registry is filled by decorators in the plug-ins' own files and by entry points of other packages. A plug-in whose
import fails stays listed with its reason; it is refused by name when asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from winnow.errors import InvalidRequest, UnknownName

T = TypeVar("T")


@dataclass(frozen=True)
class Capabilities:
    """What a plug-in can do. What the model decides is checked at admission, so that nothing unsupported reaches a worker.

    Attributes:
        heads: head layouts it accepts: "mha", "gqa".
        dtypes: KV dtypes it accepts: "fp32", "fp16", "bf16".
        families: model families it accepts; empty means all.
        sliding_window: accepts models with layers of limited window.
        softcap: accepts models with attention logit soft-capping.
        chunked: a prompt processed in chunks has the result of one processed whole.
        prefix_safe: row i's result depends on no token behind its own tile. A prefill method without this or without `chunked`
            is served in chunks all the same: each is then a plan of its own, and KV is reused by whole chunks.
        tensor_parallel: heads may be split over devices.
        exact: equals dense attention up to rounding.
        fallback: the method used in its place where it cannot run, for a prefill method in the layers that it leaves out ("" =
            none).
        needs: other roles it cannot work without, e.g. {"retrieval"}.
        training: what a model must have had for it: "" = nothing, "calibration" = `winnow calibrate <name>` once, which a worker
            looks for when it binds the method (a parameter may take its place, notes say which), "model" = it was trained with
            this pattern, else quality drops.
        version: raised when results change; parts with different versions refuse each other (R17).
        notes: one line for people, shown by `winnow methods`.
    """

    heads: frozenset[str] = frozenset({"mha", "gqa"})
    dtypes: frozenset[str] = frozenset({"fp32", "fp16", "bf16"})
    families: frozenset[str] = frozenset()
    sliding_window: bool = True
    softcap: bool = True
    chunked: bool = True
    prefix_safe: bool = True
    tensor_parallel: bool = False
    exact: bool = False
    fallback: str = ""
    needs: frozenset[str] = frozenset()
    training: str = ""
    version: int = 1
    notes: str = ""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered plug-in: `cls` is None when its import failed, and `broken` then says why."""

    name: str
    cls: type[T] | None
    broken: str = ""


@dataclass
class Registry(Generic[T]):
    """Names of one kind of plug-in.

    Args:
        kind: what a user calls it, e.g. "prefill method"; used in messages.
        entry_points: the entry-point group other packages may use.
        modules: modules imported on first use; each registers its plug-in with `register`.
    """

    kind: str
    entry_points: str
    modules: tuple[str, ...] = ()
    _entries: dict[str, Entry[T]] = field(default_factory=dict)
    _loaded: bool = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that registers the class under `name`. A name taken by another class is a ValueError."""

        def add(cls: type[T]) -> type[T]:
            known = self._entries.get(name)
            if known is not None and known.cls is not None and known.cls.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, cls)
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                name = module.rsplit(".", 1)[-1].replace("_", "-")
                self._entries.setdefault(name, Entry(name, None, broken=str(error)))
        for point in importlib.metadata.entry_points(group=self.entry_points):
            try:
                point.load()
            except Exception as error:  # a foreign package may fail in any way; it stays listed with its reason
                self._entries.setdefault(point.name, Entry(point.name, None, broken=f"{type(error).__name__}: {error}"))

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def names(self) -> list[str]:
        """Names that can be used, sorted."""
        return [e.name for e in self if e.cls is not None]

    def get(self, name: str) -> type[T]:
        """The class registered as `name`.

        Raises:
            UnknownName: no such name (the message lists the known ones), or its import failed (the reason is given).
        """
        self._load()
        entry = self._entries.get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UnknownName(f"unknown {self.kind} {name!r}{hint} (known: {', '.join(self.names())})")
        if entry.cls is None:
            raise UnknownName(f"{self.kind} {name!r} is installed but cannot be imported: {entry.broken}")
        return entry.cls

    def create(self, name: str, params: dict[str, Any] | None = None) -> T:
        """An instance of plug-in `name`, a frozen dataclass, with `params` as its fields.

        Raises:
            UnknownName: no such plug-in.
            InvalidRequest: a parameter that it does not have, or of another type, or refused by its own checks.
        """
        cls = self.get(name)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        kept: dict[str, Any] = {}
        for key, value in (params or {}).items():
            if key not in fields:
                raise InvalidRequest(f"{self.kind} {name}: no parameter {key!r} (it has: {', '.join(fields) or 'none'})")
            kept[key] = _coerce(f"{self.kind} {name}: {key}", value, fields[key].default)
        return cls(**kept)


def _coerce(label: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`. Parameters arrive as strings from the command line and as text on the wire."""
    if default is None or default is dataclasses.MISSING:
        return value
    try:
        if isinstance(default, bool):
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(default, int):
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if isinstance(default, float):
            number = float(value)
            if number != number or number in (float("inf"), float("-inf")):
                raise ValueError
            return number
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InvalidRequest(f"{label} must be {kind_of(default)}, got {value!r:.40}") from None
    return value


def kind_of(default: object) -> str:
    """What a parameter with this default takes, in words: a bool, an int or a float."""
    return "true or false" if isinstance(default, bool) else "a whole number" if isinstance(default, int) else "a finite number"


def modules_in(package: str) -> tuple[str, ...]:
    """Names of the modules of a package: a plug-in is registered by lying in its folder."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(f"{package}.{module.name}" for module in pkgutil.iter_modules(path)))


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Split a method given as text, `name` or `name:key=value,key=value`, into name and parameters.

    Raises:
        InvalidRequest: a parameter without "=".
    """
    name, _, rest = text.partition(":")
    params: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, eq, value = item.partition("=")
        if not eq or not key:
            raise InvalidRequest(f"method {name!r}: expected key=value after ':', got {item!r}")
        params[key.strip()] = value.strip()
    return name.strip(), params
