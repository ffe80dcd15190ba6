"""What a process of certain roles must load: one copy of the served model, a draft, or only the shape of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from winnow.config import WinnowConfig
from winnow.errors import ConfigError, WinnowError
from winnow.index.layout import SegmentLayout
from winnow.index.spec import set_threads
from winnow.services.warmup import weights_digest
from winnow.workers.model.decoder import Decoder
from winnow.workers.model.loader import LoadedModel, load_model, load_tokenizer, resolve_dtype
from winnow.workers.model.spec import ModelSpec
from winnow.workers.model.tokenizer import Tokenizer

_PROBE = "The quick brown fox: 1234 jumps über 'lazy' dogs\n\tand (again) — naïve."


@dataclass(frozen=True)
class Weights:
    """What was loaded.

    Attributes:
        spec, fingerprint, layout: of the served model, whether its weights are here or not.
        digest: of `model`'s weights as they were loaded.
        threads: for searches and index builds.
    """

    spec: ModelSpec
    fingerprint: str
    layout: SegmentLayout
    model: LoadedModel | None
    draft: LoadedModel | None
    digest: str
    threads: int

    def require_model(self) -> LoadedModel:
        if self.model is None:
            raise WinnowError("this process was started without a role that loads the model")
        return self.model

    def require_draft(self) -> LoadedModel:
        if self.draft is None:
            raise WinnowError("this process was started without the draft role")
        return self.draft


def load_weights(config: WinnowConfig, roles: tuple[str, ...]) -> Weights:
    """Load what the roles need. Sets the process's thread counts.

    Raises:
        as `load_model`; ConfigError: the draft does not fit the served model.
    """
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    threads = config.model.threads or torch.get_num_threads()
    set_threads(1)  # searches of one query do not gain from more, and builds run in threads of their own
    model: LoadedModel | None = None
    if {"prefill", "decode"} & set(roles):
        model = load_model(config.model.source, dtype=config.model.dtype, device=config.model.device)
        spec, fingerprint, tokenizer, dtype = model.spec, model.fingerprint, model.tokenizer, model.dtype_name
    else:
        tokenizer, spec, fingerprint = load_tokenizer(config.model.source)
        dtype = resolve_dtype(config.model.dtype, config.model.device)
    draft = _load_draft(config, model, spec, tokenizer) if "draft" in roles else None
    layout = SegmentLayout(spec.n_layers, spec.n_kv_heads, spec.head_size, dtype)
    return Weights(spec, fingerprint, layout, model, draft, weights_digest(model.decoder) if model else "", threads)


def _load_draft(config: WinnowConfig, model: LoadedModel | None, spec: ModelSpec, tokenizer: Tokenizer) -> LoadedModel:
    if config.draft.source == "self":
        n_layers = config.draft.layers or max(1, spec.n_layers // 2)
        if not 1 <= n_layers <= spec.n_layers:
            raise ConfigError(f"draft.layers: must be in [0, {spec.n_layers}] for this model, got {n_layers}; 0 = half")
        if model is not None:
            return _cut(model, n_layers)
        return load_model(config.model.source, dtype=config.model.dtype, device=config.model.device, n_layers=n_layers)
    draft = load_model(
        config.draft.source, dtype=config.model.dtype, device=config.model.device, n_layers=config.draft.layers or None
    )
    if draft.tokenizer.encode(_PROBE) != tokenizer.encode(_PROBE):
        raise ConfigError("draft.source: its tokenizer differs from the served model's; pick one of the same family, or self")
    return draft


def _cut(model: LoadedModel, n_layers: int) -> LoadedModel:
    """The first layers of a model that is loaded already, sharing its tensors."""
    whole = model.decoder
    decoder = Decoder(whole.spec.cut(n_layers), whole.embed, whole.layers[:n_layers], whole.norm, whole.head)
    return dataclasses.replace(model, spec=decoder.spec, decoder=decoder, fingerprint=f"{model.fingerprint}-{n_layers}")
