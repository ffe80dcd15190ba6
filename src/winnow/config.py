"""Configuration: one frozen model per part, loaded once in `main` from TOML < `WINNOW_*` < flags.

Library code takes the object of its part and reads no environment. `WINNOW_HOME` alone is read directly (`home`), because
it says where everything else lies. Nested fields are spelled with two underscores: `WINNOW_GATEWAY__PORT=7070`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from winnow.errors import ConfigError


def home() -> Path:
    """Folder of caches and run state: `WINNOW_HOME`, else `~/.cache/winnow`."""
    return Path(os.environ.get("WINNOW_HOME") or Path.home() / ".cache" / "winnow")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(_Part):
    """Which model, and how it is held."""

    source: str = Field("default", description="default (SmolLM2-135M-Instruct), a folder, a .gguf file, or a hub id")
    name: str = Field("", description="Name clients use; empty = derived from the source")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto = bf16 where the processor computes in it, else fp32"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto = cuda where there is one")
    threads: int = Field(0, ge=0, description="Torch and FAISS threads of a worker; 0 = all cores this process may use")


class GatewayConfig(_Part):
    """The public door."""

    host: str = Field("127.0.0.1", description="Address to bind; other than loopback needs TLS and auth")
    port: int = Field(7070, ge=0, le=65535, description="0 = any free port")
    max_inflight: int = Field(16, ge=1, description="Requests worked on at once")
    max_queue: int = Field(32, ge=0, description="Requests waiting; one more gets RESOURCE_EXHAUSTED")
    max_message_bytes: int = Field(16 << 20, ge=1024, description="Largest message in either direction")
    default_deadline_s: float = Field(300.0, gt=0, description="Deadline of a call that brings none")
    max_deadline_s: float = Field(3600.0, gt=0, description="Longer deadlines are cut to this")
    hop_margin_s: float = Field(0.05, ge=0, description="Taken off the remaining time at each hop")
    drain_grace_s: float = Field(20.0, ge=0, description="Time for running requests after SIGTERM")
    max_stream_buffer: int = Field(256, ge=1, description="Events held for a reader that is slow")
    tls_cert: str = Field("", description="PEM file; with tls_key turns TLS on")
    tls_key: str = Field("", description="PEM file")
    tls_client_ca: str = Field("", description="PEM file; demands client certificates signed by it")


class AuthConfig(_Part):
    """Bearer tokens (JWT, HS256)."""

    enabled: bool = Field(True, description="Off only on loopback")
    secret: str = Field(
        "", repr=False, description="Signing secret, 32 characters or more; empty = made at start-up, kept in the run folder"
    )


class PrefillConfig(_Part):
    """Prefill role."""

    method: str = Field("dense", description="Default method, name or name:key=value,...")
    chunk_tokens: int = Field(2048, ge=0, description="Tokens of a chunk; 0 = the whole prompt at once")
    sparse_chunk_tokens: int = Field(
        0, ge=0, description="Tokens that a sparse method plans at a time and whose KV is reused; 0 = 4096 on a CPU, else 16384"
    )
    dense_tail_tokens: int = Field(
        128, ge=0, description="Last tokens of a prompt that stay dense under a sparse method: the question is there"
    )
    max_waiting: int = Field(64, ge=1, description="Jobs queued in one worker")
    break_even: bool = Field(
        True, description="Run a layer dense where its method is predicted to take longer; false = always the method"
    )
    recall_rows: int = Field(
        8, ge=0, le=4096, description="Most rows of a layer and pass on which a sparse prefill's recall is measured; 0 = not"
    )


class DecodeConfig(_Part):
    """Decode role."""

    method: str = Field("dense", description="Default method")
    max_batch: int = Field(16, ge=1, description="Sequences decoded together")
    max_waiting: int = Field(64, ge=1, description="Sequences queued in one worker")


class RankConfig(_Part):
    """Ranking."""

    method: str = Field("likelihood", description="Default ranker")


class DraftConfig(_Part):
    """Draft role."""

    source: str = Field("self", description="self = the served model cut after `layers`; else as model.source")
    layers: int = Field(0, ge=0, description="Layers of the self-draft; 0 = half of the model's")


class KVConfig(_Part):
    """KV segments and the prefix cache of one worker."""

    budget_bytes: int = Field(2 << 30, ge=1 << 20, description="Bytes of KV one worker may hold")
    dir: str = Field("", description="Folder for segment files; empty = /dev/shm where there is room, else the temporary folder")
    block_tokens: int = Field(64, ge=1, description="Granularity of prefix hashes")
    lease_s: float = Field(30.0, gt=0, description="A holder that does not renew loses its segment after this")
    transport: Literal["auto", "map", "stream"] = Field("auto", description="auto = map on one host, stream between hosts")


class MetadataConfig(_Part):
    """Redis or the embedded server."""

    redis_url: str = Field("", description="redis://, rediss:// or unix://; empty = start the embedded server")
    timeout_s: float = Field(0.5, gt=0, description="Longest wait for one answer")
    worker_ttl_s: float = Field(5.0, gt=0, description="A worker not heard of for this long is gone")


class ClusterConfig(_Part):
    """Placement by Ray."""

    address: str = Field("", description="Address of a running Ray cluster; empty = start one on this machine")
    prefill: int = Field(1, ge=1, description="Prefill workers")
    decode: int = Field(1, ge=1, description="Decode workers")
    retrieval: int = Field(1, ge=0, description="Retrieval workers")
    draft: int = Field(1, ge=0, description="Draft workers")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs each prefill, decode and draft worker asks Ray for")


class TelemetryConfig(_Part):
    """Logs, metrics, traces."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    metrics: bool = Field(True, description="Serve Prometheus metrics on a loopback port of each process")
    metrics_port: int = Field(0, ge=0, le=65535, description="Of the gateway; 0 = any free port; workers always take a free one")
    otlp_endpoint: str = Field("", description="OpenTelemetry collector, host:port; empty = tracing off")


class WinnowConfig(BaseSettings):
    """Everything. Load it with `load_config`."""

    model_config = SettingsConfigDict(
        env_prefix="WINNOW_", env_nested_delimiter="__", frozen=True, extra="forbid", protected_namespaces=()
    )

    model: ModelConfig = ModelConfig()
    gateway: GatewayConfig = GatewayConfig()
    auth: AuthConfig = AuthConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    rank: RankConfig = RankConfig()
    draft: DraftConfig = DraftConfig()
    kv: KVConfig = KVConfig()
    metadata: MetadataConfig = MetadataConfig()
    cluster: ClusterConfig = ClusterConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags win over the environment, the environment over the file."""
        path = _toml_path.get("path")
        file = [TomlConfigSettingsSource(settings_cls, path)] if path else []
        return (init_settings, env_settings, *file)


_toml_path: dict[str, Path] = {}  # pydantic-settings builds its sources from the class, so the file's path is passed aside


def load_config(file: Path | None = None, flags: dict[str, Any] | None = None) -> WinnowConfig:
    """Load the configuration once, in `main`.

    Args:
        file: TOML file; None = `winnow.toml` in WINNOW_HOME if it exists.
        flags: nested dictionary of command-line values.

    Raises:
        ConfigError: a wrong value or an unknown key; the message names it and what is accepted.
    """
    if file is not None and not file.is_file():
        raise ConfigError("--config: no such file")
    default = home() / "winnow.toml"
    path = file or (default if default.is_file() else None)
    if path is not None:
        _toml_path["path"] = path
    try:
        return WinnowConfig(**(flags or {}))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors())) from None
    finally:
        _toml_path.pop("path", None)


def _explain(error: Any) -> str:
    names = [str(part) for part in error["loc"]]
    where = ".".join(names)
    if error["type"] == "extra_forbidden":
        part: Any = WinnowConfig
        for name in names[:-1]:
            part = part.model_fields[name].annotation
        close = difflib.get_close_matches(names[-1], part.model_fields, n=1)
        return f"unknown setting {where}" + (
            f"; did you mean {close[0]}?" if close else f" (known: {', '.join(part.model_fields)})"
        )
    return f"{where}: {error['msg'].lower()}"
