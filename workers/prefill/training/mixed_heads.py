"""The decoder's forward pass in which every KV head mixes full and streaming attention, differentiable in the mix.

The decoder itself is for inference: it works in place and under inference mode. This one is plain and keeps everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.model.decoder import Decoder, LayerWeights
from winnow.workers.model.rope import RopeTable

_CHECKPOINT_TOKENS = 2048  # longer prompts compute each layer again for its gradient instead of keeping it

_ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}


class MixedHeads:
    """One prompt through a decoder's weights, which it reads and never changes.

    A KV head with mix a, and its group of query heads, outputs a * full + (1 - a) * streaming, where row i of streaming
    reads key j iff j < sink or i - j < recent.
    """

    def __init__(self, decoder: Decoder, sink: int, recent: int) -> None:
        self._decoder, self._spec = decoder, decoder.spec
        self._sink, self._recent = sink, recent
        self._tables = [RopeTable(rope, decoder.spec.max_context, decoder.dtype, decoder.device) for rope in decoder.spec.ropes]

    def hidden(self, tokens: Tensor, rows: slice, mix: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [T] int64. rows: which of them to return.
            mix: [L, Hkv] float32 in [0, 1]; None = all ones, and nothing is computed for streaming heads.

        Returns:
            [len(rows), hidden], model dtype.
        """
        decoder, spec, n = self._decoder, self._spec, len(tokens)
        tokens = tokens.to(decoder.device)
        positions = torch.arange(n, device=decoder.device)
        ropes = [tuple(x.squeeze(1) for x in table.rows(positions)) for table in self._tables]
        ahead = positions[:, None] - positions
        streams = (ahead >= 0) & ((positions < self._sink) | (ahead < self._recent))
        x = decoder.embed[tokens]
        if spec.embed_scale != 1.0:
            x = x * torch.tensor(spec.embed_scale, dtype=decoder.dtype)
        for i, weights in enumerate(decoder.layers):
            cos, sin = ropes[spec.layer_ropes[i]]
            own = None if mix is None else mix[i]
            arguments = (spec.layers[i], weights, x, cos, sin, ahead, streams, own)
            if n > _CHECKPOINT_TOKENS and torch.is_grad_enabled():
                x = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                x = self._layer(*arguments)
        return self._norm(x[rows], decoder.norm)

    def _layer(
        self, layer: LayerSpec, w: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, ahead: Tensor, streams: Tensor,
        mix: Tensor | None,
    ) -> Tensor:  # fmt: skip
        hq, hkv, d = layer.n_q_heads, layer.n_kv_heads, layer.head_size
        heads = F.linear(self._norm(x, w.attention_norm), w.qkv, w.qkv_bias).view(x.shape[0], -1, d)
        turned = heads[:, : hq + hkv]
        if w.qk_norm is not None:
            turned = self._norm(turned, w.qk_norm)
        turned = turned.transpose(0, 1)  # [Hq + Hkv, T, D]
        swapped = torch.cat((turned[..., d // 2 :], turned[..., : d // 2]), -1)
        turned = turned * cos + swapped * sin
        q, k, v = turned[:hq], turned[hq:], heads[:, hq + hkv :].transpose(0, 1)
        in_window = ahead < layer.window if layer.window else None
        out = _attend(layer, q, k, v, None if in_window is None else (ahead >= 0) & in_window)
        if mix is not None:
            part = _attend(layer, q, k, v, streams if in_window is None else streams & in_window)
            share = mix.to(out.dtype).repeat_interleave(hq // hkv)[:, None, None]
            out = share * out + (1 - share) * part
        mixed = F.linear(out.transpose(0, 1).reshape(x.shape[0], -1), w.out, w.out_bias)
        if w.post_attention_norm is not None:
            mixed = self._norm(mixed, w.post_attention_norm)
        x = x + mixed
        gate, up = F.linear(self._norm(x, w.mlp_norm), w.gate_up, w.gate_up_bias).chunk(2, -1)
        out = F.linear(_ACTIVATIONS[self._spec.activation](gate) * up, w.down, w.down_bias)
        return x + (out if w.post_mlp_norm is None else self._norm(out, w.post_mlp_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self._spec.norm_eps).rsqrt() * weight).to(x.dtype)


def _attend(layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [Hq, T, D] over k, v [Hkv, T, D] where mask [T, T] allows; None = causal."""
    group = layer.n_q_heads // layer.n_kv_heads
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)  # fused kernels with a mask know no groups
    if not layer.softcap:
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=layer.scale
        )[0]
    logits = torch.matmul(q.float() * layer.scale, k.float().transpose(-1, -2))
    logits = torch.tanh(logits / layer.softcap) * layer.softcap
    if mask is None:
        mask = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).tril()
    return torch.matmul(logits.masked_fill(~mask, -torch.inf).softmax(-1), v.float()).to(q.dtype)
