"""Shapes, tensors, plans and the truth that the executor's tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.workers.attention.plan import TileLists, TilePlan

SCALE = 0.3
GEOMETRIES = [  # B, Hq, Hkv, N, M, Bq, Bk
    (1, 4, 2, 100, 100, 16, 16),
    (2, 4, 2, 33, 90, 16, 8),
    (1, 6, 3, 50, 77, 8, 16),
    (1, 4, 4, 1, 1, 16, 16),
    (1, 4, 2, 1, 50, 16, 16),
    (2, 4, 1, 65, 128, 1, 4),
    (1, 2, 1, 40, 43, 12, 8),
]


def tensors(b: int, hq: int, hkv: int, n: int, m: int, d: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Strided as in real use: q a transposed view, k and v slices of a longer buffer whose rest is NaN."""
    gen = torch.Generator().manual_seed(n * 1000 + m)
    q = torch.randn(b, n, hq, d, generator=gen).to(dtype).transpose(1, 2)
    k, v = (torch.full((b, hkv, m + 9, d), torch.nan, dtype=dtype) for _ in range(2))
    for x in (k, v):
        x[:, :, :m] = torch.randn(b, hkv, m, d, generator=gen).to(dtype)
    return q, k[:, :, :m], v[:, :, :m]


def truth(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, softcap: float = 0.0, window: int = 0
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(group, 1).transpose(-1, -2) * SCALE
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    n, m = logits.shape[-2:]
    position, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
    allowed = (key <= position) & ((key > position - window) if window else True)
    if keep is not None:
        allowed = allowed & keep.repeat_interleave(q.shape[1] // keep.shape[1], 1)
    logits = logits.masked_fill(~allowed, -torch.inf)
    return (logits.softmax(-1) @ v.double().repeat_interleave(group, 1)).float(), logits.logsumexp(-1).float()


def random_plan(
    geometry: tuple[int, ...],
    heads: int,
    density: float,
    *,
    batch: int | None = None,
    classes: bool = False,
    columns: float = 0.0,
    mean_correction: bool = False,
) -> TilePlan:
    """Random tiles, and of all keys the share `columns` as token columns of every query tile (before what is read is dropped)."""
    b, _, _, n, m, bq, bk = geometry
    gen = torch.Generator().manual_seed(int(density * 100) + heads)
    shape = (b if batch is None else batch, heads)
    mask = torch.rand(*shape, -(-n // bq), -(-m // bk), generator=gen) < density
    return TilePlan.from_mask(
        mask,
        n_rows=n,
        n_keys=m,
        block_q=bq,
        block_k=bk,
        head_class=torch.randint(0, 4, shape, generator=gen) if classes else None,
        sink=torch.full(shape, 3),
        recent=torch.full(shape, 6),
        row_intervals=random_intervals(*shape, n, m, gen) if classes else None,
        token_columns=TileLists.from_mask(torch.rand(*mask.shape[:3], m, generator=gen) < columns) if columns else None,
        mean_correction=mean_correction,
    )


def random_intervals(batch: int, heads: int, n: int, m: int, gen: torch.Generator) -> Tensor:
    """[B, Hm, N, 2]: windows that move with the row, some of which end before it or hold no key that it may read."""
    position = torch.arange(m - n, m).expand(batch, heads, n)
    length = torch.randint(1, m + 1, (batch, heads, 1), generator=gen)
    jitter = torch.randint(-3, 4, position.shape, generator=gen)
    lo = position - length + 1 + jitter
    return torch.stack((lo, position + 1 - torch.randint(-2, 4, position.shape, generator=gen)), -1)
