"""How widely each head spreads its attention: by what retrieval heads are picked where nobody learns which they are."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec, RawQK
from winnow.workers.attention.executor import attend_plan
from winnow.workers.model.decoder import Decoder


class _Watching:
    """Dense attention over a prompt in one pass, which notes the entropies on its way."""

    def __init__(self, rows: slice) -> None:
        self._rows = rows
        self.entropies: list[Tensor] = []  # [Hkv] float32, a layer each

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, raw: RawQK) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device)
        ahead = positions[self._rows, None] - positions
        read = (ahead >= 0) & (ahead < layer.window) if layer.window else ahead >= 0
        queries = q[:, self._rows].float().unflatten(0, (layer.n_kv_heads, -1))  # [Hkv, G, rows, D]
        logits = queries @ k.float().transpose(1, 2)[:, None] * layer.scale
        if layer.softcap:
            logits = torch.tanh(logits / layer.softcap) * layer.softcap
        shares = logits.masked_fill(~read, -torch.inf).softmax(-1)
        self.entropies.append(torch.special.entr(shares).sum(-1).mean((1, 2)))
        return attend_plan(None, q[None], k[None], v[None], scale=layer.scale, softcap=layer.softcap, window=layer.window)[0][0]


def attention_entropies(decoder: Decoder, tokens: Tensor, rows: slice) -> Tensor:
    """[L, Hkv] float32, nats: entropy of the attention of each KV head's queries, mean over them and over some rows.

    Args:
        tokens: [T] int64, a prompt. rows: those of its tokens that are looked at; only theirs are written out.
    """
    watching = _Watching(rows)
    decoder.forward(tokens.to(decoder.device), torch.arange(len(tokens), device=decoder.device), watching)
    return torch.stack(watching.entropies).cpu()
