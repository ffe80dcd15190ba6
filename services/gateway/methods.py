"""The method registries as the gateway uses them: choosing for a request, listing for people, versions for the handshake."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from winnow.config import WinnowConfig
from winnow.errors import InvalidRequest
from winnow.index.base import indexes
from winnow.proto.v1 import common_pb2, winnow_pb2
from winnow.registry import Capabilities, Registry
from winnow.services.gateway.validation import Chosen, Served, choose, unfit
from winnow.types import MethodChoice
from winnow.workers.decode.base import decode_methods
from winnow.workers.draft.base import draft_scorers
from winnow.workers.prefill.base import prefill_methods
from winnow.workers.ranking.base import rankers

SLOTS: dict[str, Registry[Any]] = {
    "prefill": prefill_methods,
    "decode": decode_methods,
    "draft": draft_scorers,
    "ranker": rankers,
    "index": indexes,
}


class Methods:
    """Chooses methods for one served model with the configured defaults."""

    def __init__(self, config: WinnowConfig, served: Served) -> None:
        self._config = config
        self._served = served

    def prefill(self, message: common_pb2.Method) -> Chosen:
        return choose("prefill", prefill_methods, message, self._config.prefill.method, self._served)

    def decode(self, message: common_pb2.Method) -> Chosen:
        return choose("decode", decode_methods, message, self._config.decode.method, self._served)

    def ranker(self, message: common_pb2.Method) -> Chosen:
        return choose("ranker", rankers, message, self._config.rank.method, self._served)

    def reducer(self, message: common_pb2.Method) -> Chosen | None:
        """None when the request names none: no prompt reducer runs by default."""
        if not message.name:
            if message.params:
                raise InvalidRequest("reducer.params: given without reducer.name; name the method they belong to")
            return None
        return choose("reducer", draft_scorers, message, "", self._served)

    def listing(self, slot: str) -> list[winnow_pb2.MethodInfo]:
        """Every method of a slot, of all for "". Raises InvalidRequest for an unknown slot."""
        if slot and slot not in SLOTS:
            raise InvalidRequest(f"slot must be empty or one of {', '.join(SLOTS)}, got {slot!r:.24}")
        return [self._info(name, entry) for name, registry in SLOTS.items() if slot in ("", name) for entry in registry]

    def _info(self, slot: str, entry: Any) -> winnow_pb2.MethodInfo:
        if entry.cls is None:
            return winnow_pb2.MethodInfo(slot=slot, name=entry.name, unavailable="its import failed")
        caps: Capabilities = entry.cls.caps
        return winnow_pb2.MethodInfo(
            slot=slot,
            name=entry.name,
            exact=caps.exact,
            chunked=caps.chunked,
            prefix_safe=caps.prefix_safe,
            families=sorted(caps.families),
            needs=sorted(caps.needs),
            fallback=caps.fallback,
            version=caps.version,
            notes=caps.notes,
            defaults=dict(_defaults(entry.cls)),
            unavailable=unfit(caps, self._served),
            training=caps.training,
        )


def exact_decode(name: str) -> Chosen:
    """The decode method `name` with its defaults, stepping in for another."""
    return Chosen(MethodChoice(name), decode_methods.create(name))


def versions() -> tuple[str, ...]:
    """ "name@version" of every method known here, sorted."""
    found = (e for registry in SLOTS.values() for e in registry if e.cls is not None)
    return tuple(sorted(f"{e.name}@{e.cls.caps.version}" for e in found))


def _defaults(cls: type[Any]) -> Iterator[tuple[str, str]]:
    if not dataclasses.is_dataclass(cls):
        return
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            yield field.name, "" if field.default is None else str(field.default)
