"""One compact decoder for the Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3 families: plain tensors, inference only.

It works on packed tokens and does not know sequences, caches or batches: a layer computes q, k, v and hands them to an
`AttentionBackend`. Weights of q, k, v and of gate, up are fused, so that a decode step is few operations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.errors import InvalidRequest
from winnow.workers.attention.backend import AttentionBackend, RawQK
from winnow.workers.model.fused import fused
from winnow.workers.model.graphs import SIZES, GraphedSteps
from winnow.workers.model.packed import FEW_ROWS, PackedWeights
from winnow.workers.model.rope import RopeTable, rotate
from winnow.workers.model.spec import ModelSpec

MLP_SLICE_TOKENS = 16_384  # 128K tokens at once would need 7.5 GiB for gate and up of an 8B Llama


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """[T, 2 mlp], gate then up -> activation(gate) * up, [T, mlp]."""

    @fused
    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return activation(gate).mul_(up)

    return gated


_GATES = {
    "silu": _gated(F.silu),
    "gelu_tanh": _gated(lambda x: F.gelu(x, approximate="tanh")),
    "gelu": _gated(F.gelu),
}


@dataclass
class LayerWeights:
    """Tensors of one layer, model dtype; norms of Gemma are float32 and already hold 1 + weight.

    Attributes:
        qkv: [(Hq + 2 Hkv) D, hidden]: q heads, then k heads, then v heads; qkv_bias: [(Hq + 2 Hkv) D].
        out: [hidden, Hq D]; gate_up: [2 mlp, hidden]; down: [hidden, mlp].
        qk_norm: [Hq + Hkv, D], the q norm's weight in the first Hq rows and the k norm's in the rest.
        post_attention_norm, post_mlp_norm: [hidden], Gemma only.
    """

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    qk_norm: Tensor | None = None
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None


Ropes = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share.

    Attributes:
        positions: [T] int64.
        ropes: for each of the spec's rotary tables, cos and signed sin rows [T, 1, D].
        backend: where q, k and v go.
    """

    positions: Tensor
    ropes: Ropes
    backend: AttentionBackend


@dataclass(frozen=True)
class Heads:
    """What a layer hands to its backend: q and raw_q [Hq, T, D], k, v and raw_k [Hkv, T, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor


# A token mixer: (layer index, normed hidden states [T, hidden], step) -> [T, hidden], before the residual is added.
TokenMixer = Callable[[int, Tensor, Step], Tensor]


class Decoder:
    """A decoder-only transformer.

    Attributes:
        spec: shapes and conventions.
        dtype, device: of weights and hidden states.
        mixers: one token mixer per layer; replace an entry to give that layer another one. The default,
            `softmax_attention`, may be called from a replacement.
    """

    def __init__(self, spec: ModelSpec, embed: Tensor, layers: list[LayerWeights], norm: Tensor, head: Tensor) -> None:
        """
        Args:
            spec: describes exactly `len(layers)` layers.
            embed, head: [vocab, hidden]; the same tensor where tied.
            norm: [hidden], final norm.
        """
        assert spec.n_layers == len(layers)
        self.spec = spec
        self.dtype = embed.dtype
        self.device = embed.device
        self.embed = embed
        self.layers = layers
        self.norm = norm
        self.head = head
        self._default_mixer: TokenMixer = self.softmax_attention
        self.mixers: list[TokenMixer] = [self._default_mixer] * spec.n_layers
        self._ropes = [RopeTable(rope, spec.max_context, self.dtype, self.device) for rope in spec.ropes]
        # the factor is rounded to the model's dtype first, as in transformers
        self._embed_scale = torch.tensor(spec.embed_scale, dtype=self.dtype, device=self.device)
        self._gate = _GATES[spec.activation]
        self._n_rotated = spec.n_q_heads + spec.n_kv_heads
        self._graphs = GraphedSteps(self) if self.device.type == "cuda" else None
        self._packed: PackedWeights | None = None

    def prepare_decoding(self) -> None:
        """Make passes of few rows quick. On a CPU this keeps the weights a second time; elsewhere it does nothing."""
        if self._packed is None and PackedWeights.fits(self.head):
            matrices = (m for w in self.layers for m in (w.qkv, w.out, w.gate_up, w.down))
            self._packed = PackedWeights((*matrices, self.head))

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, backend: AttentionBackend, *, n_layers: int | None = None) -> Tensor:
        """Run packed tokens through the layers.

        Args:
            tokens, positions: [T] int64, on any device.
            backend: stores K/V and attends; its state is mutated.
            n_layers: stop after this many layers; None = all.

        Returns:
            [T, hidden], model dtype; after the final norm when all layers ran.

        Raises:
            InvalidRequest: n_layers outside [0, spec.n_layers].
            ContextTooLong: a position outside the model's context (checked on the CPU).
        """
        stop = self._stop(n_layers)
        if self._graphs is not None and 0 < len(tokens) <= SIZES[-1] and stop == self.spec.n_layers and self._plain:
            hidden = self._graphs.try_forward(tokens, positions, backend)
            if hidden is not None:
                return hidden
        x, ropes = self.begin(tokens, positions)
        step = Step(positions.to(self.device), ropes, backend)
        for idx in range(stop):
            self._layer(idx, x, step)
        return self.final_norm(x) if stop == self.spec.n_layers else x

    @torch.inference_mode()
    def iter_forward(
        self, tokens: Tensor, positions: Tensor, backend: AttentionBackend, *, n_layers: int | None = None
    ) -> Generator[int, None, Tensor]:
        """`forward` as a generator: yields the index of each finished layer, so that a scheduler may put other work
        between layers or give the pass up (close the generator). Returns what `forward` returns; raises what it raises."""
        stop = self._stop(n_layers)
        x, ropes = self.begin(tokens, positions)
        step = Step(positions.to(self.device), ropes, backend)
        for idx in range(stop):
            self._layer(idx, x, step)
            yield idx
        return self.final_norm(x) if stop == self.spec.n_layers else x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: hidden [n, hidden] after the final norm -> [n, vocab] float32, final softcap applied."""
        scores = self._linear(hidden, self.head).float()
        cap = self.spec.final_softcap
        return scores.div_(cap).tanh_().mul_(cap) if cap else scores

    def softmax_attention(self, idx: int, x: Tensor, step: Step) -> Tensor:
        """The default token mixer: grouped-query softmax attention through the step's backend."""
        heads = self.project(idx, x, step.ropes)
        layer, raw = self.spec.layers[idx], RawQK(heads.raw_q, heads.raw_k)
        mixed = step.backend.attend(layer, heads.q, heads.k, heads.v, raw)
        return self.project_out(idx, mixed.transpose(0, 1).reshape(x.shape[0], -1))

    # The pieces of a pass, for `forward` and for the graphs that replay it. All run under inference mode.

    def begin(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Ropes]:
        """Embeddings [T, hidden], a new tensor, and the rotary rows of each table."""
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        x = self.embed[tokens]
        if self.spec.embed_scale != 1.0:
            x *= self._embed_scale
        return x, tuple(rope.rows(positions) for rope in self._ropes)

    def norm_before_attention(self, idx: int, x: Tensor) -> Tensor:
        """The normed hidden states a layer's token mixer works on."""
        return rms_norm(x, self.layers[idx].attention_norm, self.spec.norm_eps)

    def project(self, idx: int, x: Tensor, ropes: Ropes) -> Heads:
        """q, k and v of normed hidden states [T, hidden], before and after RoPE; views of three tensors."""
        spec, w = self.spec, self.layers[idx]
        heads = self._linear(x, w.qkv, w.qkv_bias).view(x.shape[0], -1, spec.head_size)  # [T, Hq + 2 Hkv, D]
        raw = heads[:, : self._n_rotated]
        if w.qk_norm is not None:
            raw = rms_norm(raw, w.qk_norm, spec.norm_eps)
        turned = rotate(raw, *ropes[spec.layer_ropes[idx]]).transpose(0, 1)  # [Hq + Hkv, T, D]
        raw, v = raw.transpose(0, 1), heads[:, self._n_rotated :].transpose(0, 1)
        split = spec.n_q_heads
        return Heads(turned[:split], turned[split:], v, raw[:split], raw[split:])

    def project_out(self, idx: int, mixed: Tensor) -> Tensor:
        """Attention's output [T, Hq * D] -> [T, hidden]."""
        w = self.layers[idx]
        return self._linear(mixed, w.out, w.out_bias)

    def finish_layer(self, idx: int, x: Tensor, mixed: Tensor) -> None:
        """Add the token mixer's output and the MLP to x [T, hidden], in place."""
        w = self.layers[idx]
        if w.post_attention_norm is not None:
            mixed = rms_norm(mixed, w.post_attention_norm, self.spec.norm_eps)
        x += mixed
        for start in range(0, x.shape[0], MLP_SLICE_TOKENS):
            part = x[start : start + MLP_SLICE_TOKENS]
            part += self._mlp(w, part)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last layer; a new tensor."""
        return rms_norm(x, self.norm, self.spec.norm_eps)

    @property
    def _plain(self) -> bool:
        """Every layer has the default token mixer."""
        return all(mixer == self._default_mixer for mixer in self.mixers)

    def _stop(self, n_layers: int | None) -> int:
        if n_layers is None:
            return self.spec.n_layers
        if not 0 <= n_layers <= self.spec.n_layers:
            raise InvalidRequest(f"n_layers must be in [0, {self.spec.n_layers}], got {n_layers}")
        return n_layers

    def _layer(self, idx: int, x: Tensor, step: Step) -> None:
        self.finish_layer(idx, x, self.mixers[idx](idx, self.norm_before_attention(idx, x), step))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, n] -> x weight^T + bias, [T, m]."""
        if self._packed is not None and x.shape[0] <= FEW_ROWS:
            return self._packed.linear(x, weight, bias)
        return F.linear(x, weight, bias)

    def _mlp(self, w: LayerWeights, x: Tensor) -> Tensor:
        eps = self.spec.norm_eps
        gate_up = self._linear(rms_norm(x, w.mlp_norm, eps), w.gate_up, w.gate_up_bias)
        out = self._linear(self._gate(gate_up), w.down, w.down_bias)
        return out if w.post_mlp_norm is None else rms_norm(out, w.post_mlp_norm, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded to x's dtype once.

    Args:
        x: [..., n], any float dtype.
        weight: [n] or [H, n]; float32 (Gemma) or x's dtype.

    torch has one fused kernel for it on CUDA. Its CPU version is a chain of ten operations, five times slower than this one
    for a bf16 prompt and noticeable in a decode step.
    """
    if x.is_cuda and weight.dim() == 1 and weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, scale).mul_(weight).to(x.dtype)
