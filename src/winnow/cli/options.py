"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file (default: winnow.toml in WINNOW_HOME, if there).")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PART.FIELD=VALUE", help="Any setting of `winnow config show`; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of text.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Gateway, host:port (default: WINNOW_ADDRESS, else the pipeline running here).", show_default=False
    ),
]
Token = Annotated[
    str | None, typer.Option("--token", help="Bearer token (default: WINNOW_TOKEN, else the running one's).", show_default=False)
]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="PEM file; turns TLS on and names who signed the gateway's certificate.", show_default=False),
]
TimeoutS = Annotated[float | None, typer.Option("--timeout", help="Seconds until the request is given up.", show_default=False)]
