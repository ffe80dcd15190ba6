"""All roles in the supervisor's own process: no Ray, one copy of the weights, the same RoleProcess and gateway code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from winnow.config import WinnowConfig
from winnow.metadata import MetadataStore
from winnow.orchestration import control
from winnow.orchestration.seats import single_seat


class SingleHost:
    """The roles as part of this process. Same interface as `placer.RayHost`."""

    mode = "single"

    def __init__(self, config: WinnowConfig, metadata: MetadataStore) -> None:
        self._config = config
        self._metadata = metadata
        self._process: Any = None

    async def start(self, report: Callable[[str], None]) -> list[control.Message]:
        """Load and register; returns the one worker. Raises what the role process raises."""
        seat = single_seat(self._config.cluster)
        report(f"starting the roles in one process: {', '.join(seat.roles)}")
        role_process = await asyncio.to_thread(_role_process_class)  # imports torch: seconds
        self._process = role_process(seat.worker_id, seat.roles, self._config, self._metadata)
        info = await self._process.start()
        return [{"worker_id": info.worker_id, "epoch": info.epoch, "pid": info.pid, "address": info.address}]

    async def watch(self) -> None:
        """Nothing to replace: if the process dies, everything does. Ends only by cancellation."""
        await asyncio.get_running_loop().create_future()

    async def stop(self, grace_s: float) -> None:
        """Drain within `grace_s`, then free everything."""
        if self._process is None:
            return
        if grace_s > 0:
            await self._process.drain(grace_s)
        await self._process.stop()
        self._process = None


def _role_process_class() -> Any:
    from winnow.services.roles import RoleProcess

    return RoleProcess
