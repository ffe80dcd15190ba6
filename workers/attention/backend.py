"""Where a decoder layer hands its attention over: the one seam between models and methods.

The decoder works on packed tokens [T, hidden] and does not know what the tokens belong to: one prompt's chunk, one token
each of many sequences, or the suffixes of many documents. A backend knows. It stores the new K/V where they belong and
returns the attention output. Prefill, decode, ranking and scoring are four backends over the same decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """What a backend must know about one attention layer.

    Attributes:
        idx: layer index from 0.
        n_q_heads, n_kv_heads: Hq and Hkv; query head h reads KV head h // (Hq // Hkv).
        head_size: D of q, k and v.
        scale: factor on q.k before the softmax.
        softcap: logits become softcap * tanh(logits / softcap); 0 = none (Gemma 2).
        window: a query at position p reads keys at positions > p - window only; 0 = all (Mistral, Gemma 2 and 3).
    """

    idx: int
    n_q_heads: int
    n_kv_heads: int
    head_size: int
    scale: float
    softcap: float = 0.0
    window: int = 0


@dataclass(frozen=True)
class RawQK:
    """q and k of the same tokens after q/k norm and before RoPE: [Hq, T, D] and [Hkv, T, D], for methods that need them."""

    q: Tensor
    k: Tensor


class AttentionBackend(Protocol):
    """Computes attention for the packed tokens of one forward pass, layer by layer in order."""

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """Store k and v of the T packed tokens, attend, return the output.

        Args:
            layer: which layer, and its attention parameters.
            q: [Hq, T, D], post-RoPE, model dtype. May be a strided view.
            k, v: [Hkv, T, D], k post-RoPE. May be strided views; a backend that keeps them copies them.
            raw: pre-RoPE q and k.

        Returns:
            [Hq, T, D], model dtype, any strides.
        """
        ...
