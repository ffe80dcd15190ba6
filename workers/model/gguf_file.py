"""GGUF files: config, weights and tokenizer of a model in one file, as llama.cpp's converter wrote them.

What differs from Hugging Face's conventions is undone here: row order of q and k (llama only), Gemma's norms that already
hold the 1, and Llama 3's frequency factors that come as a tensor.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from winnow.errors import CorruptBlock, Unsupported
from winnow.workers.model.sources import FETCH_AGAIN
from winnow.workers.model.spec import FAMILIES, ModelSpec, RopeSpec
from winnow.workers.model.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")  # Mistral's files say llama
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_TOP = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_LAYER = re.compile(r"^layers\.(\d+)\.(.+)\.(weight|bias)$")


class GgufFile:
    """A GGUF file as a `WeightSource`, with its spec and tokenizer.

    Raises:
        CorruptBlock: not GGUF, truncated, or metadata missing.
        Unsupported: an architecture outside ARCHITECTURES.
    """

    norms_hold_one = True

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            reader = gguf.GGUFReader(str(path))
        except (ValueError, OSError, KeyError, IndexError, struct.error, OverflowError, UnicodeDecodeError) as error:
            reason = f"truncated or not a GGUF file ({type(error).__name__})"
            raise CorruptBlock(f"model: {path.name} is {reason}; {FETCH_AGAIN}") from None
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._arch = str(self._value("general.architecture"))
        if self._arch not in ARCHITECTURES:
            raise Unsupported(
                f"model: GGUF architecture {self._arch!r} is not supported (supported: {', '.join(ARCHITECTURES)}; "
                f"families: {', '.join(FAMILIES)})"
            )

    def spec(self) -> ModelSpec:
        """The model's spec; `norm_plus_one` stays what the family says, `norms_hold_one` tells the loader about the file."""
        return self._spec

    def hf_config(self) -> dict[str, Any]:
        """The content of a config.json that describes the same model; only for files without tensors of rope factors."""
        return {"model_type": self._kind, "architectures": [_CLASSES[self._arch]], **self._config()}

    @property
    def _kind(self) -> str:
        return "gemma3_text" if self._arch == "gemma3" else self._arch

    @cached_property
    def _spec(self) -> ModelSpec:
        from transformers import CONFIG_MAPPING

        spec = ModelSpec.from_config(CONFIG_MAPPING[self._kind](**self._config()))
        if "rope_freqs.weight" in self._tensors:
            factors = self._dequantize("rope_freqs.weight")
            table = spec.ropes[0]
            scaled = torch.tensor(table.inv_freq) / factors
            spec = dataclasses.replace(spec, ropes=(RopeSpec(tuple(scaled.tolist()), table.scaling), *spec.ropes[1:]))
        return spec

    def get(self, name: str) -> Tensor:
        """As `WeightSource.get`; float32, in Hugging Face's row order."""
        own = self._own_name(name)
        tensor = self._dequantize(own)
        if self._arch == "llama" and ".attn_q." in own:
            return _unpermute(tensor, self._spec.n_q_heads)
        if self._arch == "llama" and ".attn_k." in own:
            return _unpermute(tensor, self._spec.n_kv_heads)
        return tensor

    def tokenizer(self) -> Tokenizer:
        """Raises Unsupported: a tokenizer of a kind winnow cannot convert exactly."""
        from winnow.workers.model.gguf_tokenizer import convert

        return convert({key: self._value(key) for key in self._fields if key.startswith("tokenizer.")})

    def _own_name(self, name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        match = _LAYER.match(name)
        assert match is not None, name
        idx, part, kind = match.groups()
        if self._arch.startswith("gemma"):
            norms = {
                "post_attention_layernorm": "post_attention_norm",
                "pre_feedforward_layernorm": "ffn_norm",
                "post_feedforward_layernorm": "post_ffw_norm",
            }
        else:
            norms = {"post_attention_layernorm": "ffn_norm"}
        return f"blk.{idx}.{(_TENSORS | norms)[part]}.{kind}"

    def _dequantize(self, own: str) -> Tensor:
        tensor = self._tensors.get(own)
        if tensor is None:
            raise CorruptBlock(f"model: tensor {own} is missing from {self._name}; {FETCH_AGAIN}")
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError, KeyError) as error:
            kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
            raise Unsupported(
                f"model: tensor {own} of {self._name} is {kind}, which cannot be read ({type(error).__name__}); "
                "use a Q4_0 to Q8_0, K-quant, F16 or BF16 file"
            ) from None
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)  # a copy: the mapping is read-only

    def _config(self) -> dict[str, Any]:
        """Arguments of the family's Hugging Face config."""
        n_heads, hidden = int(self._of("attention.head_count")), int(self._of("embedding_length"))
        head_size = int(self._of("attention.key_length", 0)) or int(self._of("rope.dimension_count", 0)) or hidden // n_heads
        if int(self._of("rope.dimension_count", head_size)) != head_size:
            raise Unsupported(f"model: {self._name} rotates only part of each head, which is not supported")
        vocab = self._tensors.get("token_embd.weight")
        if vocab is None:
            raise CorruptBlock(f"model: tensor token_embd.weight is missing from {self._name}; {FETCH_AGAIN}")
        config: dict[str, Any] = {
            "hidden_size": hidden,
            "num_hidden_layers": int(self._of("block_count")),
            "intermediate_size": int(self._of("feed_forward_length")),
            "num_attention_heads": n_heads,
            "num_key_value_heads": int(self._of("attention.head_count_kv", n_heads)),
            "head_dim": head_size,
            "max_position_embeddings": int(self._of("context_length")),
            "rms_norm_eps": float(self._of("attention.layer_norm_rms_epsilon")),
            "vocab_size": int(vocab.shape[1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }
        rope = self._rope()
        if self._arch == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if self._arch.startswith("gemma"):
            config |= self._gemma(config, rope)
        else:
            config["rope_parameters"] = rope
        return config

    def _rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(self._of("rope.freq_base", 10_000.0))}
        kind = str(self._of("rope.scaling.type", "none"))
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": float(self._of("rope.scaling.factor"))}
        elif kind != "none":
            raise Unsupported(f"model: rope scaling {kind!r} of a GGUF file is not supported (supported: none, linear, yarn)")
        if kind == "yarn":
            rope["original_max_position_embeddings"] = int(self._of("rope.scaling.original_context_length"))
        return rope

    def _gemma(self, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
        """Gemma's constants that the file leaves to the reader, as llama.cpp fills them in: the 27B models scale
        queries by hidden / heads, all others by the head size; every 2nd (Gemma 2) or 6th (Gemma 3) layer is global."""
        largest = config["num_hidden_layers"] == (46 if self._arch == "gemma2" else 62)
        own: dict[str, Any] = {
            "sliding_window": int(self._of("attention.sliding_window")),
            "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"],
        }
        if self._arch == "gemma2":
            return own | {
                "rope_parameters": rope,
                "attn_logit_softcapping": float(self._of("attn_logit_softcapping", 50.0)),
                "final_logit_softcapping": float(self._of("final_logit_softcapping", 30.0)),
            }
        local = {"rope_type": "default", "rope_theta": float(self._of("rope.freq_base_swa", 10_000.0))}
        return own | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}

    def _of(self, key: str, default: Any = None) -> Any:
        """A value of this architecture, e.g. "block_count" -> llama.block_count."""
        return self._value(f"{self._arch}.{key}", default)

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        if field is None:
            if default is None:
                raise CorruptBlock(f"model: {key} is missing from {self._name}; {FETCH_AGAIN}")
            return default
        value = field.contents()
        if isinstance(value, list) and not key.startswith("tokenizer.") and len(set(value)) != 1:
            raise Unsupported(f"model: {key} differs between layers in {self._name}, which is not supported")
        return value[0] if isinstance(value, list) and not key.startswith("tokenizer.") else value


def _unpermute(rows: Tensor, n_heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows: it puts the two halves of each rotated pair side by side."""
    return rows.view(n_heads, rows.shape[0] // n_heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
