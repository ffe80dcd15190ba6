"""`winnow config`: what is in force, and who says so."""

from __future__ import annotations

from typing import Annotated

import typer

from winnow.cli.exits import reported
from winnow.cli.options import AsJson, ConfigFile, Settings
from winnow.cli.screen import print_json, stdout, table
from winnow.cli.settings import env_name, explain, flags_from

app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at the configuration."""


@app.command()
def show(
    config: ConfigFile = None,
    settings: Settings = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from the default.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print every setting with its value, where the value comes from, and what it means. Secrets are masked.

    Order of strength: default < TOML file < WINNOW_* variables < flags.
    """
    with reported(as_json=as_json):
        rows = [row for row in explain(config, flags_from({}, settings)) if not changed or row.origin != "default"]
        if as_json:
            print_json([{"name": r.name, "value": r.value, "origin": r.origin, "env": env_name(r.name)} for r in rows])
            return
        shown = table("", "setting", "value", "from", "meaning")
        for row in rows:
            style = "" if row.origin == "default" else "bold"
            shown.add_row(f"[{style}]{row.name}[/]" if style else row.name, repr(row.value), row.origin, row.help)
        stdout.print(shown)
