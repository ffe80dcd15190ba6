"""`winnow token`: bearer tokens for the gateway."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from winnow.cli.exits import reported
from winnow.cli.options import AsJson, ConfigFile
from winnow.cli.screen import print_json
from winnow.config import load_config
from winnow.errors import InvalidRequest

app = typer.Typer(help="Make access tokens.", no_args_is_help=True)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.callback()
def _group() -> None:
    """Make access tokens."""


def seconds(text: str) -> float:
    """Seconds of a span like 90s, 15m, 12h or 30d; a bare number counts seconds.

    Raises:
        InvalidRequest: anything else, or nothing at all.
    """
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise InvalidRequest(f"--ttl: expected a span like 90s, 15m, 12h or 30d, got {text!r:.40}")
    return int(match[1]) * _UNITS[match[2] or "s"]


@app.command()
def create(
    scope: Annotated[list[str] | None, typer.Option("--scope", help="generate, rank, read or admin; may be repeated.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose requests and caches these are.")] = "default",
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 15m, 12h, 30d.")] = "1d",
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print a token signed with this configuration's secret, for WINNOW_TOKEN or --token (default scopes: generate, rank, read).

    Run it where the gateway runs, or anywhere with the same auth.secret (WINNOW_AUTH__SECRET).
    """
    from winnow.services.common.auth import PUBLIC_SCOPES, mint, resolve_secret

    with reported(as_json=as_json):
        scopes = scope or list(PUBLIC_SCOPES)
        known = (*PUBLIC_SCOPES, "admin")
        for name in scopes:
            if name not in known:
                raise InvalidRequest(f"--scope: unknown scope {name!r:.40} (known: {', '.join(known)})")
        if not tenant or len(tenant) > 64:
            raise InvalidRequest(f"--tenant: 1 to 64 characters, got {len(tenant)}")
        ttl_s = seconds(ttl)
        secret = resolve_secret(load_config(config).auth)
        if not secret:
            raise InvalidRequest("auth.enabled is off: no token is needed")
        token = mint(secret, scopes=scopes, tenant=tenant, ttl_s=ttl_s)
        if as_json:
            print_json({"token": token, "scopes": scopes, "tenant": tenant, "ttl_s": ttl_s})
        else:
            typer.echo(token)
