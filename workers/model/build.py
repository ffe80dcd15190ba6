"""Puts a `Decoder` together from a spec and a weight source, tensor by tensor, so that no second copy is ever held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from winnow.errors import CorruptBlock
from winnow.workers.model.decoder import Decoder, LayerWeights
from winnow.workers.model.names import mlp_norm_name, weight_shapes
from winnow.workers.model.sources import WeightSource
from winnow.workers.model.spec import ModelSpec

Progress = Callable[[str, int, int], None]  # (stage, done, total)


def build_decoder(
    spec: ModelSpec, source: WeightSource, dtype: torch.dtype, device: torch.device, on_progress: Progress | None = None
) -> Decoder:
    """Copy every weight to `device` in `dtype`, fusing q, k, v and gate, up.

    Raises:
        CorruptBlock: a tensor is missing, unreadable or of another shape than the config says; the message names it.
    """
    builder = _Builder(spec, source, dtype, device)
    layers = []
    for idx in range(spec.n_layers):
        layers.append(builder.layer(idx))
        if on_progress is not None:
            on_progress("load", idx + 1, spec.n_layers)
    embed = builder.matrix("embed_tokens.weight")
    head = embed if spec.tied else builder.matrix("lm_head.weight")
    return Decoder(spec, embed, layers, builder.norm("norm.weight"), head)


class _Builder:
    def __init__(self, spec: ModelSpec, source: WeightSource, dtype: torch.dtype, device: torch.device) -> None:
        self._spec, self._source, self._dtype, self._device = spec, source, dtype, device
        self._shapes = weight_shapes(spec)

    def layer(self, idx: int) -> LayerWeights:
        spec, at = self._spec, f"layers.{idx}."
        qkv = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        gate_up = [f"{at}mlp.{name}_proj" for name in ("gate", "up")]
        return LayerWeights(
            attention_norm=self.norm(f"{at}input_layernorm.weight"),
            qkv=self.matrix(*(f"{name}.weight" for name in qkv)),
            qkv_bias=self.matrix(*(f"{name}.bias" for name in qkv)) if spec.qkv_bias else None,
            out=self.matrix(f"{at}self_attn.o_proj.weight"),
            out_bias=self.matrix(f"{at}self_attn.o_proj.bias") if spec.o_bias else None,
            mlp_norm=self.norm(f"{at}{mlp_norm_name(spec)}.weight"),
            gate_up=self.matrix(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=self.matrix(*(f"{name}.bias" for name in gate_up)) if spec.mlp_bias else None,
            down=self.matrix(f"{at}mlp.down_proj.weight"),
            down_bias=self.matrix(f"{at}mlp.down_proj.bias") if spec.mlp_bias else None,
            qk_norm=self._head_norms(at) if spec.qk_norm else None,
            post_attention_norm=self.norm(f"{at}post_attention_layernorm.weight") if spec.post_norms else None,
            post_mlp_norm=self.norm(f"{at}post_feedforward_layernorm.weight") if spec.post_norms else None,
        )

    def matrix(self, *names: str) -> Tensor:
        """The named tensors under one another, in memory of their own."""
        n_rows = sum(self._shapes[name][0] for name in names)
        out = torch.empty((n_rows, *self._shapes[names[0]][1:]), dtype=self._dtype, device=self._device)
        row = 0
        for name in names:
            tensor = self._get(name)
            out[row : row + tensor.shape[0]].copy_(tensor)
            row += tensor.shape[0]
        return out

    def norm(self, name: str) -> Tensor:
        """A norm's weight as it is applied: Gemma's is 1 + weight, kept in float32."""
        weight = self._get(name)
        if not self._spec.norm_plus_one:
            return weight.to(self._device, self._dtype, copy=True)
        return (weight.float() + (0.0 if self._source.norms_hold_one else 1.0)).to(self._device)

    def _head_norms(self, at: str) -> Tensor:
        q, k = self.norm(f"{at}self_attn.q_norm.weight"), self.norm(f"{at}self_attn.k_norm.weight")
        return torch.cat((q.expand(self._spec.n_q_heads, -1), k.expand(self._spec.n_kv_heads, -1)))

    def _get(self, name: str) -> Tensor:
        tensor = self._source.get(name)
        if tuple(tensor.shape) != self._shapes[name]:
            raise CorruptBlock(
                f"model: tensor {name} has shape {tuple(tensor.shape)}, its config says {self._shapes[name]}; "
                "weights and config do not belong together"
            )
        return tensor
