"""What the selectors share: logits, tile pooling, and choosing tiles from scores. Device-side, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec


def logits_of(q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
    """q [..., n, D] and k [..., m, D] -> [..., n, m] float32, with the layer's scale and soft-capping."""
    logits = torch.matmul(q.float() * layer.scale, k.float().transpose(-1, -2))
    return torch.tanh(logits / layer.softcap) * layer.softcap if layer.softcap else logits


def pool_sum(x: Tensor, size: int) -> Tensor:
    """[..., M] -> [..., ceil(M / size)], sums."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def pool_mean(x: Tensor, size: int) -> Tensor:
    """[B, H, M, D] -> [B, H, ceil(M / size), D] float32, means over the real tokens of each tile."""
    m = x.shape[2]
    sums = torch.nn.functional.pad(x, (0, 0, 0, -m % size)).unflatten(2, (-1, size)).sum(3, dtype=torch.float32)
    sizes = torch.full((sums.shape[2], 1), float(size), device=x.device)
    sizes[-1] -= -m % size
    return sums / sizes


def forbidden_tiles(n: int, m: int, block_q: int, block_k: int, device: torch.device | str) -> Tensor:
    """[nQ, nK] bool: key tiles that begin after the last position of a query tile, right-aligned."""
    n_q, n_k = -(-n // block_q), -(-m // block_k)
    last = torch.clamp(torch.arange(1, n_q + 1, device=device) * block_q, max=n) - 1 + (m - n)
    return torch.arange(n_k, device=device) * block_k > last[:, None]


def diagonal_tiles(n: int, m: int, block_q: int, block_k: int, device: torch.device | str) -> Tensor:
    """[nQ, nK] bool: key tiles that hold the own key of some row of the query tile. They are part of every plan."""
    n_q, n_k = -(-n // block_q), -(-m // block_k)
    first = torch.arange(n_q, device=device) * block_q + (m - n)
    last = torch.clamp(first + block_q, max=m) - 1
    tile = torch.arange(n_k, device=device)
    return (tile >= (first // block_k)[:, None]) & (tile <= (last // block_k)[:, None])


def keep_top(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` largest entries of each row.

    Args:
        scores: [..., n] float; -inf is never kept. count: broadcastable to [...], int.

    Returns:
        [..., n] bool. Ties go to the lower index.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    count = torch.as_tensor(count, device=scores.device)
    wanted = (torch.arange(scores.shape[-1], device=scores.device) < count.unsqueeze(-1)).expand_as(scores)
    return torch.zeros_like(wanted).scatter(-1, order, wanted) & (scores > -torch.inf)


def keep_share(shares: Tensor, wanted: Tensor | float) -> Tensor:
    """The fewest entries of each row whose sum reaches `wanted`.

    Args:
        shares: [..., n], not negative. wanted: broadcastable to [...]; at or above a row's sum keeps all that is not 0.

    Returns:
        [..., n] bool. Ties go to the lower index.
    """
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    wanted = torch.as_tensor(wanted, device=shares.device)
    taken = (before < wanted.unsqueeze(-1)) & (ordered > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken)
