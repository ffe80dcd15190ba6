"""One deployment per Redis database: worker names such as "prefill-0" would collide otherwise."""

from __future__ import annotations

import asyncio
import os
import socket

from winnow import telemetry
from winnow.config import home
from winnow.errors import Conflict
from winnow.metadata import MetadataStore, MetadataUnavailable

NAME = "deployment"
TTL_S = 15.0


class DeploymentLease:
    """Held by a supervisor while it runs. The same home takes it again at once; another one waits until it runs out."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._holder = f"{socket.gethostname()}:{os.getuid()}:{home().resolve()}"
        self._token = 0
        self._log = telemetry.get_logger("supervisor")

    async def take(self) -> None:
        """Take the lease.

        Raises:
            Conflict: another deployment uses this Redis database.
        """
        token = await self._store.acquire_lease(NAME, self._holder, TTL_S)
        if token is None:
            raise Conflict(
                "metadata.redis_url: another winnow deployment uses this Redis database; give each its own database number "
                f"(redis://host/1), or stop the other one (a killed one lets go after {TTL_S:g} s)"
            )
        self._token = token

    async def keep(self) -> None:
        """Renew until cancelled. Redis may be away or have lost everything: the lease is then taken again when it is back."""
        while True:
            await asyncio.sleep(TTL_S / 5)
            try:
                if not await self._store.renew_lease(NAME, self._holder, self._token, TTL_S):
                    await self.take()
                    self._log.warning("deployment lease was lost and taken again")
            except MetadataUnavailable:
                self._log.warning("deployment lease not renewed: the metadata store is away")
            except Conflict as error:
                self._log.error("two deployments share one Redis database", reason=str(error))

    async def give_back(self) -> None:
        """Let go, so that another deployment need not wait. Does nothing when the lease was never taken."""
        if not self._token:
            return
        try:
            await self._store.release_lease(NAME, self._holder, self._token)
        except MetadataUnavailable:
            self._log.warning("deployment lease not given back: the metadata store is away; it runs out by itself")
