"""What the roles may ask of the metadata store. Everything in it is a hint: any entry may be missing or stale.

Implemented over Redis in `winnow.orchestration.metadata`; services get an object of this protocol and never see Redis.
"""

from __future__ import annotations

from typing import Protocol

from winnow.types import WorkerInfo


class MetadataStore(Protocol):
    """Registry of workers, holders of prefixes, leases with fencing tokens, epochs.

    Every method may raise `MetadataUnavailable`; callers go on with what they know (promise R11).
    """

    async def next_epoch(self, worker_id: str) -> int:
        """A number larger than any this worker had before, also after the store lost its data (it starts from the clock)."""
        ...

    async def register(self, info: WorkerInfo, ttl_s: float) -> None:
        """Announce or refresh a worker; it disappears ttl_s after the last call. An older epoch never replaces a newer."""
        ...

    async def unregister(self, worker_id: str, epoch: int) -> None: ...

    async def workers(self) -> list[WorkerInfo]:
        """Workers announced and not expired, any order."""
        ...

    async def add_holder(self, prefix: str, worker_id: str, epoch: int, n_tokens: int, ttl_s: float) -> None:
        """Say that a worker holds the KV of the prefix with this chained hash."""
        ...

    async def holders(self, prefixes: list[str]) -> dict[str, dict[str, int]]:
        """For each known prefix hash: worker_id -> epoch."""
        ...

    async def acquire_lease(self, name: str, holder: str, ttl_s: float) -> int | None:
        """A fencing token larger than any granted for `name` before, or None while another holder's lease lives."""
        ...

    async def renew_lease(self, name: str, holder: str, token: int, ttl_s: float) -> bool:
        """False when the lease is not held under this token any more."""
        ...

    async def release_lease(self, name: str, holder: str, token: int) -> bool: ...

    async def ping(self) -> bool:
        """True while the store answers; never raises."""
        ...

    async def close(self) -> None: ...


class MetadataUnavailable(Exception):
    """The store does not answer in time. Not a WinnowError: callers must handle it, a user never sees it."""
