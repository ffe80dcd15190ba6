"""Tiny random models as real Hugging Face folders: the engine is tested on these, for every family, in milliseconds.

Their text means nothing; their shapes, conventions and files are those of the real ones.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from winnow.errors import UnknownName
from winnow.workers.model.detokenizer import byte_alphabet
from winnow.workers.model.names import weight_shapes
from winnow.workers.model.spec import FAMILIES, ModelSpec

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS = [
    "the",
    "in",
    "er",
    "on",
    "an",
    "re",
    "at",
    "en",
    "or",
    "is",
    "to",
    "it",
    "al",
    "es",
    "ar",
    "ou",
    "of",
    "le",
    "ing",
    "ed",
    "and",
    "ion",
]
VOCAB_SIZE = 320

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "sliding_window": 48},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "tie_word_embeddings": True},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "tie_word_embeddings": True},
    "gemma2": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "sliding_window": 48,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "sliding_window": 48,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}


def make_tiny_model(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of a family as a Hugging Face folder: float32 safetensors, config, tokenizer, chat template.

    2 layers, hidden 64, 4 query and 2 KV heads of 16, vocabulary 320 (256 bytes, 3 control tokens, 22 merged words and
    those they are merged from, padding), context 2048, sliding window 48 where the family has one.

    Args:
        folder: made if missing; files of the same names in it are replaced.
        seed: the same seed, family and overrides give the same bytes.
        overrides: config fields, e.g. num_hidden_layers=4.

    Returns:
        folder.

    Raises:
        UnknownName: no such family.
    """
    from transformers import CONFIG_MAPPING

    if family not in _OWN:
        raise UnknownName(f"unknown model family {family!r} (known: {', '.join(FAMILIES)})")
    settings = {**_BASE, **_OWN[family], **overrides}
    if family == "gemma3" and "layer_types" not in overrides:
        kinds = settings["layer_types"]
        settings["layer_types"] = [kinds[i % 2] for i in range(settings["num_hidden_layers"])]
    config = CONFIG_MAPPING["gemma3_text" if family == "gemma3" else family](**settings)
    spec = ModelSpec.from_config(config)
    weights = {}
    for name, shape in weight_shapes(spec).items():
        full = name if name == "lm_head.weight" else f"model.{name}"
        weights[full] = _random(full, shape, seed, spec)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [_ARCHITECTURES[family]]
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "pad_token_id": 0}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tiny_tokenizer(folder)
    return folder


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def _random(name: str, shape: tuple[int, ...], seed: int, spec: ModelSpec) -> torch.Tensor:
    """Values that keep activations of order one, so that attention is neither uniform nor one-hot."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 0.1 * noise + (0.0 if spec.norm_plus_one else 1.0)
    if name.endswith("bias"):
        return 0.2 * noise
    if "embed_tokens" in name:
        return noise * (spec.hidden_size**-0.5 if spec.tied else 1.0)  # tied: logits of order one, not mere echoes
    scale: float = (2.0 if "q_proj" in name or "k_proj" in name else 1.0) * shape[-1] ** -0.5
    return noise * scale


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with three control tokens and a chat template, in the files transformers reads."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for char in sorted(byte_alphabet(), key=byte_alphabet().__getitem__):
        vocab[char] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in ("Ġ" + word for word in _WORDS):
        for left, right in _merge_path(word):
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    assert len(vocab) <= VOCAB_SIZE
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _merge_path(word: str) -> list[tuple[str, str]]:
    """Merges that build a word from its first two characters on."""
    return [(word[:i], word[i]) for i in range(1, len(word))]
