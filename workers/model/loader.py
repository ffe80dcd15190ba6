"""From a name to a model that runs: a folder, a .gguf file, a hub id or "default"."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from winnow.errors import CorruptBlock, InvalidRequest, UnknownName, Unsupported
from winnow.workers.model.build import Progress, build_decoder
from winnow.workers.model.decoder import Decoder
from winnow.workers.model.default_model import DEFAULT_NAME, ensure_default_model
from winnow.workers.model.fingerprint import fingerprint
from winnow.workers.model.gguf_file import GgufFile
from winnow.workers.model.packed import cpu_multiplies_bf16
from winnow.workers.model.sources import FETCH_AGAIN, SafetensorsSource, WeightSource, safetensors_files
from winnow.workers.model.spec import FAMILIES, ModelSpec
from winnow.workers.model.tokenizer import Tokenizer, tokenizer_files

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: what clients call it, derived from the source.
        fingerprint: hex digest of config, weights, tokenizer and number of layers; the same as `load_tokenizer`'s
            unless layers were cut.
        dtype_name: "fp32", "fp16" or "bf16".
    """

    name: str
    spec: ModelSpec
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    dtype_name: str


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    n_layers: int | None = None,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """Load a model for inference. Its device becomes the calling thread's; other threads that run it call `make_current`.

    Args:
        source: a Hugging Face folder (safetensors, one file or sharded), a .gguf file, a hub id such as
            "HuggingFaceTB/SmolLM2-135M-Instruct", or "default".
        dtype: fp32, fp16, bf16; auto = what `auto_dtype` says.
        device: cpu, cuda, cuda:N; auto = cuda where there is one.
        n_layers: keep only the first layers (self-draft); None = all.
        on_progress: called with (stage, done, total); stages are those of `ensure_default_model` and "load".

    Raises:
        UnknownName: no such folder, file or hub id, or a file of the model is missing.
        CorruptBlock: a file is truncated or broken, a tensor is missing or of the wrong shape.
        Unsupported: an architecture, rope type, quantisation or tokenizer that winnow does not know; the hub cannot be reached.
        InvalidRequest: unknown dtype, a device this machine lacks, n_layers out of range.
    """
    target = _device(device)
    make_current(target)
    dtype_name = resolve_dtype(dtype, device)
    files = _find(source, on_progress)
    full = files.spec()
    spec = full if n_layers is None else full.cut(n_layers)
    decoder = build_decoder(spec, files.weights(), DTYPES[dtype_name], target, on_progress)
    return LoadedModel(
        name=files.name,
        spec=spec,
        decoder=decoder,
        tokenizer=files.tokenizer(),
        fingerprint=files.fingerprint(spec.n_layers),
        dtype_name=dtype_name,
    )


def make_current(device: torch.device) -> None:
    """Make it the calling thread's CUDA device: Triton launches kernels on that one, wherever their tensors lie."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)


def load_tokenizer(source: str) -> tuple[Tokenizer, ModelSpec, str]:
    """Tokenizer, spec and fingerprint of a model without loading its weights; they are read once for the fingerprint.

    Raises:
        as `load_model`, except for what only the weights can show.
    """
    files = _find(source, None)
    spec = files.spec()
    return files.tokenizer(), spec, files.fingerprint(spec.n_layers)


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype that `load_model(dtype=..., device=...)` uses on this machine: "fp32", "fp16" or "bf16".

    Raises:
        InvalidRequest: unknown dtype, or a device this machine lacks.
    """
    if dtype == "auto":
        return auto_dtype(_device(device))
    if dtype not in DTYPES:
        raise InvalidRequest(f"--dtype (model.dtype): must be auto, fp32, fp16 or bf16, got {dtype!r:.40}")
    return dtype


def auto_dtype(device: torch.device) -> str:
    """bf16 on a CUDA device and on a CPU that multiplies bf16 itself, fp32 on any other CPU."""
    return "bf16" if device.type == "cuda" or cpu_multiplies_bf16() else "fp32"


def model_name(source: str) -> str:
    """What clients call the model of a source."""
    if source == "default":
        return DEFAULT_NAME
    if _is_hub_id(source):
        return source
    path = Path(source).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


class _Files(Protocol):
    """The files of one model and what is read from them."""

    name: str

    def spec(self) -> ModelSpec: ...

    def weights(self) -> WeightSource: ...

    def tokenizer(self) -> Tokenizer: ...

    def fingerprint(self, n_layers: int) -> str: ...


def _find(source: str, on_progress: Progress | None) -> _Files:
    name = model_name(source)
    if source == "default":
        return _Folder(name, ensure_default_model(on_progress))
    path = Path(source)
    if path.is_dir():
        return _Folder(name, path)
    if path.is_file() and path.suffix == ".gguf":
        return _Gguf(name, path)
    if path.is_file():
        raise Unsupported(f"model source: {path.name} is neither a folder nor a .gguf file")
    if _is_hub_id(source):
        return _Folder(name, _download(source))
    raise UnknownName(
        f"model source: no folder or file {path.name!r} (known: default, a Hugging Face folder, a .gguf file, a hub id org/name)"
    )


class _Folder:
    """A Hugging Face folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._config = _read_json(folder / "config.json")
        if self._config is None:
            raise UnknownName("model: the folder has no config.json; give the folder that transformers' save_pretrained wrote")

    def spec(self) -> ModelSpec:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING

        config = dict(self._config or {})
        kind = config.pop("model_type", None)
        if kind not in FAMILIES and kind != "gemma3_text":
            raise Unsupported(f"model: architecture {kind!r} is not supported (supported: {', '.join(FAMILIES)})")
        try:
            parsed = CONFIG_MAPPING[kind].from_dict(config)
        except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise CorruptBlock(f"model: config.json is not a {kind} config ({type(error).__name__}); {FETCH_AGAIN}") from None
        return ModelSpec.from_config(parsed)

    def weights(self) -> WeightSource:
        return SafetensorsSource(safetensors_files(self._folder))

    def tokenizer(self) -> Tokenizer:
        generation = _read_json(self._folder / "generation_config.json") or {}
        config = self._config or {}
        text = config.get("text_config") or {}
        eos = _ids(generation.get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id"))))
        return Tokenizer.from_folder(self._folder, eos)

    def fingerprint(self, n_layers: int) -> str:
        return fingerprint(self._config or {}, safetensors_files(self._folder), tokenizer_files(self._folder), n_layers)


class _Gguf:
    """A GGUF file: config, weights and tokenizer in one."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self._path = file
        self._file = GgufFile(file)

    def spec(self) -> ModelSpec:
        return self._file.spec()

    def weights(self) -> WeightSource:
        return self._file

    def tokenizer(self) -> Tokenizer:
        return self._file.tokenizer()

    def fingerprint(self, n_layers: int) -> str:
        return fingerprint({}, [self._path], [], n_layers)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"--device (model.device): must be auto, cpu, cuda or cuda:N, got {name!r:.40}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InvalidRequest(f"--device (model.device): no {name} here, this machine has {count} CUDA devices; use cpu or auto")
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"--device (model.device): must be auto, cpu, cuda or cuda:N, got {name!r:.40}")
    return device


def _read_json(file: Path) -> dict[str, Any] | None:
    """A file's object; None where there is no file."""
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CorruptBlock(f"model: {file.name} is not a JSON object; {FETCH_AGAIN}")
    return value


def _ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.match(source)) and not source.endswith(".gguf") and not Path(source).exists()


def _download(hub_id: str) -> Path:
    """The files of a hub model, from the local cache where they are already."""
    import huggingface_hub
    from huggingface_hub import errors

    way_out = "download it elsewhere and give its folder, or use the model 'default'"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError:
        raise UnknownName(f"model {hub_id}: its makers ask for consent; give it and set HF_TOKEN, or {way_out}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UnknownName(f"model {hub_id}: the hub has no such model; check the name, or {way_out}") from None
    except (OSError, ValueError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise Unsupported(
            f"model {hub_id}: the hub cannot be reached ({type(error).__name__}) and no local copy exists; {way_out}"
        ) from None
