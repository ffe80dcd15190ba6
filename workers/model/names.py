"""The tensors a model consists of: Hugging Face names (without their prefix) and shapes, from the spec alone."""

from __future__ import annotations

from winnow.workers.model.spec import ModelSpec


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model, e.g. "layers.0.self_attn.q_proj.weight" -> (Hq * D, hidden)."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    for i in range(spec.n_layers):
        shapes |= layer_shapes(spec, i)
    shapes["norm.weight"] = (spec.hidden_size,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_shapes(spec: ModelSpec, idx: int) -> dict[str, tuple[int, ...]]:
    """`weight_shapes` of one layer."""
    hidden, mlp = spec.hidden_size, spec.mlp_size
    q, kv = spec.n_q_heads * spec.head_size, spec.n_kv_heads * spec.head_size
    linear = {
        "self_attn.q_proj": (q, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q, spec.o_bias),
        "mlp.gate_proj": (mlp, hidden, spec.mlp_bias),
        "mlp.up_proj": (mlp, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, mlp, spec.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, bias) in linear.items():
        shapes[f"layers.{idx}.{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"layers.{idx}.{name}.bias"] = (rows,)
    norms = {"input_layernorm": hidden, mlp_norm_name(spec): hidden}
    if spec.post_norms:
        norms |= {"post_attention_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_size, "self_attn.k_norm": spec.head_size}
    return shapes | {f"layers.{idx}.{name}.weight": (size,) for name, size in norms.items()}


def mlp_norm_name(spec: ModelSpec) -> str:
    """The norm before the MLP: Llama-like models call it after the attention that precedes it, Gemma does not."""
    return "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
