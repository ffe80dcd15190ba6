"""Writes a Hugging Face folder as GGUF the way llama.cpp's converter does, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

PARTS = {
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
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def permute(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    return rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def own_name(name: str, arch: str) -> str:
    top = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    short = name.removeprefix("model.")
    if short == "lm_head.weight":
        return "output.weight"
    if short in top:
        return top[short]
    _, idx, rest = short.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    norms = GEMMA_NORMS if arch.startswith("gemma") else {"post_attention_layernorm": "ffn_norm"}
    return f"blk.{idx}.{(PARTS | norms)[part]}.{kind}"


def write_gguf(
    folder: Path,
    target: Path,
    *,
    arch: str = "",
    pre: str = "gpt-2",
    quantize: gguf.GGMLQuantizationType | None = None,
    drop: tuple[str, ...] = (),
    extra_tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write `target` from the safetensors, config and tokenizer of `folder`.

    Args:
        arch: GGUF architecture; "" = the config's own.
        quantize: type of all matrices; None = float32.
        drop: tensor names (GGUF) to leave out.
        extra: further metadata, key -> str, int or float.
    """
    config = json.loads((folder / "config.json").read_bytes())
    arch = arch or config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(str(target), arch)
    rope = config["rope_parameters"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"] if "rope_theta" in rope else rope["full_attention"]["rope_theta"])
    if arch.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    write_tokenizer(writer, folder, pre)
    for key, value in (extra or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = own_name(name, arch)
        if own in drop:
            continue
        if arch == "llama" and ".attn_q." in own:
            tensor = permute(tensor, config["num_attention_heads"])
        if arch == "llama" and ".attn_k." in own:
            tensor = permute(tensor, config["num_key_value_heads"])
        if arch.startswith("gemma") and "norm" in own:
            tensor = tensor + 1
        data = tensor.float().numpy()
        if quantize is not None and data.ndim == 2:
            writer.add_tensor(own, gguf.quantize(data, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(own, np.ascontiguousarray(data))
    for own, values in (extra_tensors or {}).items():
        writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    state = json.loads((folder / "tokenizer.json").read_bytes())
    vocab: dict[str, int] = state["model"]["vocab"]
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
