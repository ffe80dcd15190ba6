"""Which processes a deployment has: one seat per role and number, e.g. "prefill-0", and the threads each may use."""

from __future__ import annotations

import os
from dataclasses import dataclass

from winnow.config import ClusterConfig, WinnowConfig

ROLES = ("prefill", "retrieval", "draft", "decode")
_WITH_MODEL = ("prefill", "draft", "decode")  # these ask Ray for GPUs


@dataclass(frozen=True)
class Seat:
    """A place for one process; it keeps its name when the process in it is replaced."""

    worker_id: str
    roles: tuple[str, ...]
    n_gpus: float = 0.0


def seats_of(config: ClusterConfig) -> list[Seat]:
    """One seat per role process, prefill first (it has the most to load)."""
    counts = {"prefill": config.prefill, "decode": config.decode, "draft": config.draft, "retrieval": config.retrieval}
    return [
        Seat(f"{role}-{i}", (role,), config.gpus_per_worker if role in _WITH_MODEL else 0.0)
        for role, count in counts.items()
        for i in range(count)
    ]


def single_seat(config: ClusterConfig) -> Seat:
    """One seat with every role that the configuration has at least once."""
    counts = {"prefill": config.prefill, "retrieval": config.retrieval, "draft": config.draft, "decode": config.decode}
    return Seat("all-0", tuple(role for role in ROLES if counts[role] > 0))


def thread_environment(config: WinnowConfig) -> dict[str, str]:
    """Environment of a process that computes: waiting OpenMP threads sleep instead of spinning against their neighbours.

    Measured on 2 cores with another process busy: 2 spinning threads are 6 times slower than 1.
    """
    n_threads = config.model.threads or int(os.environ.get("OMP_NUM_THREADS") or _n_cores())
    return {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(n_threads), "TOKENIZERS_PARALLELISM": "false"}


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
