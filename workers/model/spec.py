"""A model's shape and conventions, read once from its Hugging Face config; the decoder and the loaders look nowhere else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from winnow.errors import InvalidRequest, Unsupported
from winnow.workers.attention.backend import LayerSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
_FAMILY_OF = {**{name: name for name in FAMILIES}, "gemma3_text": "gemma3"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeSpec:
    """One rotary table: angle of pair j at position p is p * inv_freq[j]; cos and sin are multiplied by `scaling`.

    Attributes:
        inv_freq: D/2 values, each exactly representable in float32.
        scaling: 1 except for yarn.
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """Everything the decoder needs to know about a model.

    Attributes:
        family: one of FAMILIES.
        n_q_heads, n_kv_heads, head_size: Hq, Hkv, D; the same in every layer.
        max_context: tokens, prompt and answer together.
        layers: attention parameters of each layer.
        ropes: rotary tables; layer_ropes[i] is the index of layer i's.
        norm_eps, norm_plus_one: RMSNorm multiplies by weight, or by 1 + weight in float32 (Gemma).
        post_norms: a second norm after attention and after the MLP, before the residual (Gemma).
        qk_norm: RMSNorm over D of every q and k head before RoPE (Qwen3, Gemma 3).
        qkv_bias, o_bias, mlp_bias: linear layers with a bias.
        activation: "silu", "gelu_tanh" or "gelu".
        embed_scale: factor on token embeddings.
        final_softcap: logits become c * tanh(logits / c); 0 = none.
        tied: the output projection is the embedding matrix.
    """

    family: str
    n_layers: int
    hidden_size: int
    mlp_size: int
    n_q_heads: int
    n_kv_heads: int
    head_size: int
    vocab_size: int
    max_context: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    layer_ropes: tuple[int, ...]
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    final_softcap: float = 0.0
    tied: bool = False

    @property
    def windowed(self) -> bool:
        """Some layer reads a limited window."""
        return any(layer.window for layer in self.layers)

    @property
    def softcapped(self) -> bool:
        """Some layer caps its attention logits."""
        return any(layer.softcap for layer in self.layers)

    def cut(self, n_layers: int) -> ModelSpec:
        """The same model with only its first `n_layers` layers (self-draft).

        Raises:
            InvalidRequest: n_layers outside [1, self.n_layers].
        """
        if not 1 <= n_layers <= self.n_layers:
            raise InvalidRequest(f"n_layers must be in [1, {self.n_layers}], got {n_layers}")
        return dataclasses.replace(
            self, n_layers=n_layers, layers=self.layers[:n_layers], layer_ropes=self.layer_ropes[:n_layers]
        )

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelSpec:
        """Read a Hugging Face config (transformers 5: rope lives in `rope_parameters`). Mutates nothing.

        Raises:
            Unsupported: an architecture outside FAMILIES, weights quantised in a way of their own, bidirectional attention,
                a rope type that depends on the length of the prompt, or an unknown activation.
        """
        if getattr(config, "quantization_config", None):
            raise Unsupported("model: its config has quantization_config; use an unquantised safetensors folder or a GGUF file")
        kind = config.model_type
        if kind == "gemma3":
            config = config.get_text_config()
        family = _FAMILY_OF.get(kind)
        if family is None:
            raise Unsupported(f"model: architecture {kind!r} is not supported (supported: {', '.join(FAMILIES)})")
        if getattr(config, "use_bidirectional_attention", False):
            raise Unsupported("model: bidirectional attention is an encoder's; pick a causal model")
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
        if activation not in _ACTIVATIONS:
            raise Unsupported(f"model: activation {activation!r} is not supported (supported: {', '.join(_ACTIVATIONS)})")

        n_layers, n_q_heads = config.num_hidden_layers, config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // n_q_heads
        gemma = family.startswith("gemma")
        scale = (config.query_pre_attn_scalar if gemma else head_size) ** -0.5
        # Gemma 3's config keeps the field, but its attention does not use it
        softcap = (getattr(config, "attn_logit_softcapping", None) or 0.0) if family == "gemma2" else 0.0
        kinds = _layer_kinds(config, family)
        layers = tuple(
            LayerSpec(
                idx=i,
                n_q_heads=n_q_heads,
                n_kv_heads=config.num_key_value_heads,
                head_size=head_size,
                scale=scale,
                softcap=softcap,
                window=config.sliding_window if kinds[i] == "sliding_attention" else 0,
            )
            for i in range(n_layers)
        )
        ropes, layer_ropes = _ropes(config, kinds, head_size)
        return cls(
            family=family,
            n_layers=n_layers,
            hidden_size=config.hidden_size,
            mlp_size=config.intermediate_size,
            n_q_heads=n_q_heads,
            n_kv_heads=config.num_key_value_heads,
            head_size=head_size,
            vocab_size=config.vocab_size,
            max_context=config.max_position_embeddings,
            layers=layers,
            ropes=ropes,
            layer_ropes=layer_ropes,
            norm_eps=config.rms_norm_eps,
            norm_plus_one=gemma,
            post_norms=gemma,
            qk_norm=family in ("qwen3", "gemma3"),
            qkv_bias=family == "qwen2" or bool(getattr(config, "attention_bias", False)),
            o_bias=family != "qwen2" and bool(getattr(config, "attention_bias", False)),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            activation=_ACTIVATIONS[activation],
            embed_scale=config.hidden_size**0.5 if gemma else 1.0,
            final_softcap=(getattr(config, "final_logit_softcapping", None) or 0.0) if gemma else 0.0,
            tied=bool(config.tie_word_embeddings),
        )


def _layer_kinds(config: PretrainedConfig, family: str) -> tuple[str, ...]:
    n_layers: int = config.num_hidden_layers
    if family == "llama" or not getattr(config, "sliding_window", None):
        return ("full_attention",) * n_layers
    if family == "mistral":  # one window for all layers, whatever layer_types says, as in transformers
        return ("sliding_attention",) * n_layers
    kinds = tuple(config.layer_types)
    odd = set(kinds) - {"full_attention", "sliding_attention"}
    if odd or len(kinds) != n_layers:
        raise Unsupported(f"model: layer_types of {n_layers} layers with {sorted(odd) or len(kinds)} is not supported")
    return kinds


def _ropes(config: PretrainedConfig, kinds: tuple[str, ...], head_size: int) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    """Tables and each layer's index into them. Scaled tables come from transformers' own functions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    params: dict[str, Any] = config.rope_parameters
    per_kind = "rope_theta" not in params
    names = sorted(set(kinds)) if per_kind else [""]
    ropes = []
    for name in names:
        own = params[name] if per_kind else params
        rope_type = own.get("rope_type", "default")
        if rope_type not in _STATIC_ROPE:
            raise Unsupported(f"model: rope type {rope_type!r} is not supported (supported: {', '.join(_STATIC_ROPE)})")
        if own.get("partial_rotary_factor", 1.0) != 1.0:
            raise Unsupported("model: partial_rotary_factor other than 1 is not supported")
        if rope_type == "default":
            exponents = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
            inv_freq, scaling = 1.0 / (own["rope_theta"] ** exponents), 1.0
        else:
            extra = {"layer_type": name} if per_kind else {}
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), **extra)
        ropes.append(RopeSpec(tuple(inv_freq.tolist()), float(scaling)))
    return tuple(ropes), tuple(names.index(kind) if per_kind else 0 for kind in kinds)
