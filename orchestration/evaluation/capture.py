"""Real q, k and v of chosen layers of a real model on a real text, in one safetensors file: what kernels and indexes are
measured on instead of noise.

Tensors, in the model's dtype: `layer{i}.q` and `.raw_q` [Hq, N, D], `.k`, `.raw_k` and `.v` [Hkv, N, D]; q and k are post-RoPE,
raw_q and raw_k pre-RoPE (after q/k norm). `token_ids` [N] int64. The header holds the rest as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from winnow.errors import ContextTooLong, CorruptBlock, InvalidRequest, UnknownName
from winnow.index.segment import KVSegment, SegmentLayout
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.model.loader import LoadedModel
from winnow.workers.prefill.backend import PrefillBackend, Tally

_FORMAT = "1"
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class CapturedLayer:
    """One layer. q and raw_q [Hq, N, D]; k, raw_k and v [Hkv, N, D]; raw_q and raw_k are None where they were left out."""

    spec: LayerSpec
    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor | None = None
    raw_k: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Capture:
    """A loaded file: layers by index, the text's token ids [N], and what it was made of (model, fingerprint, dtype, text)."""

    layers: Mapping[int, CapturedLayer]
    token_ids: Tensor
    made: Mapping[str, str]


@dataclass
class _Keeping(PrefillBackend):
    """Dense prefill that keeps copies of what chosen layers are given."""

    def __post_init__(self) -> None:
        self.wanted: frozenset[int] = frozenset()
        self.with_raw = True
        self.kept: dict[str, Tensor] = {}

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        if layer.idx in self.wanted:
            found = {"q": q, "k": k, "v": v, **({"raw_q": raw.q, "raw_k": raw.k} if self.with_raw else {})}
            for name, tensor in found.items():
                self.kept[f"layer{layer.idx}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        return super().attend(layer, q, k, v, raw)


def parse_layers(text: str, n_layers: int) -> list[int]:
    """ "all", or indices and ranges such as "0,4,10-12", ascending; negative ones count from the end.

    Raises:
        InvalidRequest: not such a list, a range that ends below its start, or a layer the model does not have.
    """
    if text.strip() == "all":
        return list(range(n_layers))
    found: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().rpartition("-") if not item.strip().startswith("-") else (item, "", "")
        try:
            low, high = (int(first), int(last)) if dash else (int(item), int(item))
        except ValueError:
            raise InvalidRequest(f"--layers: expected all, or a list like 0,4,10-12, got {text!r:.40}") from None
        if high < low:
            raise InvalidRequest(f"--layers: the range {item.strip()!r:.40} ends below its start; write {high}-{low}")
        found |= {layer + n_layers if layer < 0 else layer for layer in range(low, high + 1)}
    wrong = [layer for layer in found if not 0 <= layer < n_layers]
    if wrong or not found:
        raise InvalidRequest(f"--layers: the model has layers 0 to {n_layers - 1}, got {text!r:.40}")
    return sorted(found)


def capture_bytes(model: LoadedModel, n_tokens: int, n_layers: int, with_raw: bool) -> int:
    """Size of the tensors of a capture."""
    spec = model.spec
    heads = (spec.n_q_heads + spec.n_kv_heads) * (2 if with_raw else 1) + spec.n_kv_heads
    return n_layers * heads * n_tokens * spec.head_size * model.decoder.dtype.itemsize


@torch.inference_mode()
def capture(
    model: LoadedModel,
    token_ids: Sequence[int],
    layers: Sequence[int],
    path: Path,
    *,
    text: str,
    with_raw: bool = True,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Prefill densely and keep what the chosen layers are given. The file is written whole or not at all.

    Args:
        layers: indices, ascending.
        path: replaced if it is there.
        text: what the tokens are, for the file's header.
        with_raw: keep q and k before RoPE too.
        on_progress: (layers done, layers to run); layers above the last chosen one are not run.

    Raises:
        ContextTooLong: more tokens than the model takes. InvalidRequest: no tokens, or the file cannot be written there.
    """
    spec, n = model.spec, len(token_ids)
    if n > spec.max_context:
        raise ContextTooLong(f"--length: the model takes {spec.max_context} tokens, got {n}; ask for less")
    if n < 1 or not layers:
        raise InvalidRequest("--length and --layers: at least one token and one layer are needed")
    _check_room(path, capture_bytes(model, n, len(layers), with_raw))
    stop = max(layers) + 1
    segment = KVSegment.create(
        SegmentLayout(stop, spec.n_kv_heads, spec.head_size, model.dtype_name), n, device=model.decoder.device
    )
    backend = _Keeping(segment, 0, None, Tally())
    backend.wanted, backend.with_raw = frozenset(layers), with_raw
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    for layer in model.decoder.iter_forward(tokens, torch.arange(n), backend, n_layers=stop):
        on_progress(layer + 1, stop)
    made = {
        "format": _FORMAT, "model": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype_name, "text": text,
        "layers": json.dumps([asdict(spec.layers[idx]) for idx in layers]),
    }  # fmt: skip
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({**backend.kept, "token_ids": tokens}, partial, metadata=made)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(f"--out: the file cannot be written there ({type(error).__name__}); choose another place") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _check_room(path: Path, size_bytes: int) -> None:
    """Said before the model runs."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidRequest("--out: must be a file in a folder that is there and can be written; make it, or choose another")
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise InvalidRequest(
            f"--out: the capture takes {size_bytes >> 20} MiB, the folder has {free >> 20} MiB free; choose fewer --layers, a "
            "shorter --length, or --no-raw"
        )


def load_capture(path: Path, *, device: str | torch.device = "cpu", layers: Sequence[int] | None = None) -> Capture:
    """Read a file that `capture` wrote.

    Args:
        device: where the layers' tensors go.
        layers: only these; None = all of the file.

    Raises:
        UnknownName: no such file, or a layer that it does not hold (the message lists those it does).
        CorruptBlock: damaged, or not a capture of this format.
    """
    if not path.is_file():
        raise UnknownName("capture: no such file; make one with `winnow capture`")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            made = dict(file.metadata() or {})
            if made.get("format") != _FORMAT or "layers" not in made:
                raise CorruptBlock("capture: the file is not a capture of this version; make it again with `winnow capture`")
            names = set(file.keys())
            specs = {spec["idx"]: LayerSpec(**spec) for spec in json.loads(made["layers"])}
            wanted = list(specs) if layers is None else list(layers)
            if missing := [idx for idx in wanted if idx not in specs]:
                raise UnknownName(f"capture: no layer {missing[0]} in the file (it holds: {', '.join(map(str, specs))})")
            found = {
                idx: CapturedLayer(
                    specs[idx],
                    **{part: file.get_tensor(f"layer{idx}.{part}") for part in ("q", "k", "v", "raw_q", "raw_k")
                       if f"layer{idx}.{part}" in names},
                )
                for idx in wanted
            }  # fmt: skip
            token_ids = file.get_tensor("token_ids").cpu()
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptBlock(
            f"capture: the file is damaged ({type(error).__name__}); make it again with `winnow capture`"
        ) from None
    return Capture(found, token_ids, made)
