"""From command-line options to configuration, and back to "where does this value come from?"."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from winnow.config import WinnowConfig, home, load_config
from winnow.errors import ConfigError

SECRETS = {"auth.secret"}
MASK = "********"


def flags_from(options: Mapping[str, Any], settings: Iterable[str] | None = None) -> dict[str, Any]:
    """Nested flags for `load_config`.

    Args:
        options: dotted setting name -> value; None values were not given and are left out.
        settings: texts "part.field=value" of `--set`; they win over `options`.

    Raises:
        ConfigError: a text of `settings` that is not part.field=value.
    """
    flags: dict[str, Any] = {}
    pairs = [(name, value) for name, value in options.items() if value is not None]
    for text in settings or ():
        name, equals, value = text.partition("=")
        if not equals or name.count(".") != 1:
            raise ConfigError(f"--set: expected part.field=value, for example kv.budget_bytes=1073741824, got {name!r}")
        pairs.append((name.strip(), value.strip()))
    for name, value in pairs:
        part, _, field = name.partition(".")
        flags.setdefault(part, {})[field] = value
    return flags


@dataclass(frozen=True)
class Setting:
    """One setting as it is in force: its dotted name, its value (secrets masked) and who set it."""

    name: str
    value: Any
    origin: str
    help: str


def env_name(name: str) -> str:
    """The environment variable of a dotted setting name: gateway.port -> WINNOW_GATEWAY__PORT."""
    return "WINNOW_" + name.upper().replace(".", "__")


def fields() -> list[tuple[str, Any, str]]:
    """(dotted name, default, description) of every setting, in the order of the configuration."""
    found = []
    for part, info in WinnowConfig.model_fields.items():
        model = info.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        for field, leaf in model.model_fields.items():
            found.append((f"{part}.{field}", leaf.default, leaf.description or ""))
    return found


def explain(file: Path | None, flags: dict[str, Any]) -> list[Setting]:
    """Every setting in force with its origin: "flag", "env NAME", "file" or "default".

    Raises:
        ConfigError: as `load_config`.
    """
    config = load_config(file, flags)
    path = file or (home() / "winnow.toml")
    written: dict[str, Any] = tomllib.loads(path.read_text()) if path.is_file() else {}
    environment = {key.upper() for key in os.environ}
    rows = []
    for name, _, description in fields():
        part, _, field = name.partition(".")
        value = getattr(getattr(config, part), field)
        if field in flags.get(part, {}):
            origin = "flag"
        elif env_name(name) in environment:
            origin = f"env {env_name(name)}"
        elif f"WINNOW_{part.upper()}" in environment and field in os.environ[f"WINNOW_{part.upper()}"]:
            origin = f"env WINNOW_{part.upper()}"
        elif field in written.get(part, {}):
            origin = f"file {path.name}"
        else:
            origin = "default"
        rows.append(Setting(name, masked(name, value), origin, description))
    return rows


def masked(name: str, value: Any) -> Any:
    """The value with secrets covered: whole secrets, and user and password inside URLs."""
    if name in SECRETS:
        return MASK if value else ""
    if isinstance(value, str) and "://" in value:
        from winnow.orchestration.metadata import masked as masked_url

        return masked_url(value)
    return value
