"""From a command's options to a client."""

from __future__ import annotations

from pathlib import Path

from winnow.client import Client
from winnow.client_calls import Endpoint
from winnow.errors import ConfigError, WorkerLost


def endpoint(address: str | None, token: str | None) -> Endpoint:
    """Where to connect, and as whom.

    Raises:
        WorkerLost: no address was given and no pipeline runs here: to a user of the command that is "nothing answers".
    """
    try:
        return Endpoint.find(address, token)
    except ConfigError as error:
        raise WorkerLost(str(error)) from None


def connect(address: str | None, token: str | None, tls_ca: Path | None = None) -> Client:
    """A client for these options. Raises as `endpoint`, and ConfigError for a certificate file that cannot be read."""
    found = endpoint(address, token)
    return Client(found.address, found.token, tls_ca=tls_ca)
