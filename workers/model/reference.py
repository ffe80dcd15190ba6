"""The exact yardstick: dense attention over one sequence's preallocated cache, through torch's own SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.errors import ContextTooLong
from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.model.spec import ModelSpec


class DenseBackend:
    """Keeps K and V of one sequence and attends to all of it. Whole prompt = chunks = one token at a time.

    Attributes:
        k, v: one [Hkv, capacity, D] tensor per layer; the first `n_cached[layer]` rows are valid.
    """

    def __init__(self, spec: ModelSpec, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        shape = (spec.n_kv_heads, capacity, spec.head_size)
        self.capacity = capacity
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in spec.layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in spec.layers]
        self.n_cached = [0] * spec.n_layers

    def truncate(self, n_tokens: int) -> None:
        """Forget every token from the n_tokens-th on."""
        self.n_cached = [min(n, n_tokens) for n in self.n_cached]

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        """As `AttentionBackend.attend`; the T tokens follow those already cached.

        Raises:
            ContextTooLong: more tokens than `capacity`.
        """
        start = self.n_cached[layer.idx]
        end = start + k.shape[1]
        if end > self.capacity:
            raise ContextTooLong(f"backend: {end} tokens do not fit its capacity of {self.capacity}; make a larger one")
        self.k[layer.idx][:, start:end] = k
        self.v[layer.idx][:, start:end] = v
        self.n_cached[layer.idx] = end
        keys, values = self.k[layer.idx][None, :, :end], self.v[layer.idx][None, :, :end]
        return dense_attention(layer, q[None], keys, values)[0]


def dense_attention(layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Right-aligned causal attention, q [B, Hq, N, D], k and v [B, Hkv, M, D], M >= N -> [B, Hq, N, D] in q's dtype."""
    n, m = q.shape[2], k.shape[2]
    beyond = bool(layer.window) and m > layer.window  # some row has keys outside its window
    if layer.softcap:
        group = layer.n_q_heads // layer.n_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q.float() @ k.float().transpose(-1, -2)) * layer.scale
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
        scores = scores.masked_fill(~visible(n, m, layer.window, q.device), float("-inf"))
        return (scores.softmax(-1) @ v.float()).to(q.dtype)
    if n == 1 and beyond:
        k, v = k[:, :, m - layer.window :], v[:, :, m - layer.window :]
    if n == 1 or (n == m and not beyond):
        return F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, scale=layer.scale, enable_gqa=True)
    mask = visible(n, m, layer.window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=True)


def visible(n: int, m: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """[N, M] bool: row i may read key j iff j <= i + (M - N), and j > i + (M - N) - window where there is a window."""
    ahead = torch.arange(n, device=device)[:, None] + (m - n) - torch.arange(m, device=device)[None]
    return (ahead >= 0) & (ahead < window) if window else ahead >= 0
