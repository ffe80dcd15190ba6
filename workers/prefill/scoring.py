"""What the selectors share: logits, tile pooling, and choosing tiles from scores. Device-side, no host synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from winnow.workers.attention.backend import LayerSpec
from winnow.workers.attention.kernels import kernel_module
from winnow.workers.attention.tiles import by_geometry, tile_kinds

SLAB_BYTES = 1 << 30  # most scores that a selector holds at once


def logits_of(q: Tensor, k: Tensor, layer: LayerSpec) -> Tensor:
    """q [..., n, D] and k [..., m, D] -> [..., n, m] float32, with the layer's scale and soft-capping."""
    logits = torch.matmul(q.float() * layer.scale, k.float().transpose(-1, -2))
    return torch.tanh(logits / layer.softcap) * layer.softcap if layer.softcap else logits


def quick_logits(q: Tensor, k: Tensor, layer: LayerSpec, factor: float = 1.0) -> Tensor:
    """`logits_of` times `factor`, multiplied in the inputs' own dtype: for maps too large for a float32 product.

    Args:
        q: [..., n, D]. k: [..., m, D]. factor: on the logits, before soft-capping.

    Returns:
        [..., n, m] in q's dtype, a new tensor; on a CPU float16 becomes float32, since its product is a thousand times slower.
    """
    if q.device.type == "cpu" and q.dtype == torch.float16:
        q, k = q.float(), k.float()
    # scaled before the product: sums of many unscaled products overflow float16
    logits = torch.matmul(q * (layer.scale * factor), k.transpose(-1, -2))
    return torch.tanh(logits / layer.softcap) * layer.softcap if layer.softcap else logits


def slabs(heads: int, n: int, m: int, block: int, pair_bytes: float, least_rows: int = 2048) -> Iterator[tuple[slice, int, int]]:
    """Cut a map of heads x rows x keys into pieces of at most `SLAB_BYTES`, one query tile of one head at least.

    Rows are also cut, in up to sixteen parts, because each part needs the keys up to its own last row only.

    Args:
        heads, n, m: sizes of the map. block: rows of a query tile. pair_bytes: bytes held for one (head, row, key).
        least_rows: of a part, where they fit: on an accelerator launches cost more than what short parts save.

    Yields:
        (heads, first row, row after the last); rows in whole query tiles, but for the end.
    """
    tiles = -(-n // block)
    tile_bytes = max(1.0, pair_bytes * block * m)
    step = min(max(-(-tiles // 16), least_rows // block, 1), max(1, int(SLAB_BYTES / tile_bytes)))
    width = max(1, int(SLAB_BYTES / (tile_bytes * step)))
    for head in range(0, heads, width):
        for first in range(0, n, step * block):
            yield slice(head, min(head + width, heads)), first, min(first + step * block, n)


def recent_mass(probe: Tensor, k: Tensor, layer: LayerSpec) -> tuple[Tensor, Tensor]:
    """Mean attention of the last rows, by key and by distance.

    Args:
        probe: [B, Hq, b, D], the last b query rows. k: [B, Hkv, M, D].

    Returns:
        vertical [B, Hq, M], by key j, and slash [B, Hq, M], by distance p - j; float32, each sums to 1.

    Holds at most about `SLAB_BYTES` at once, or what one head takes: 16 b (b + M) bytes.
    """
    batch, hq, b, d = probe.shape
    fast = score_kernels(probe, layer) if b <= 256 else None
    if fast is not None:
        found: tuple[Tensor, Tensor] = fast.probe_mass(probe, k, scale=layer.scale, slab_bytes=SLAB_BYTES)
        return found
    hkv, m = k.shape[1], k.shape[2]
    group = hq // hkv
    future = torch.ones(b, b, dtype=torch.bool, device=k.device).triu(1)
    fit = max(1, int(SLAB_BYTES / (16 * batch * b * (b + m))))  # query heads at once; whole groups, or a part that divides one
    width = fit // group * group or next(part for part in range(min(fit, group), 0, -1) if group % part == 0)
    verticals, slashes = [], []
    for first in range(0, hq, width):
        keys = k[:, first // group : -(-(first + width) // group)]
        rows = probe[:, first : first + width].reshape(batch, keys.shape[1], -1, d)
        logits = logits_of(rows, keys, layer).view(batch, -1, b, m)
        logits[..., m - b :].masked_fill_(future, -torch.inf)
        weights = torch.softmax(logits, -1)
        verticals.append(weights.mean(2))
        # b zeros to the left of each row, then rows cut one entry longer than they are: distances stand in columns
        wide = torch.nn.functional.pad(weights, (b, 0)).flatten(2)
        skewed = torch.nn.functional.pad(wide, (0, b)).view(batch, -1, b, m + b + 1)[..., 1 : m + 1]
        slashes.append(skewed.mean(2).flip(-1))
    return torch.cat(verticals, 1), torch.cat(slashes, 1)


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU on `device`. Out of pageable memory it is copied before this returns, and nobody waits."""
    return x.to(device, non_blocking=True)


def pool_sum(x: Tensor, size: int) -> Tensor:
    """[..., M] -> [..., ceil(M / size)], sums."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def pool_max(x: Tensor, size: int) -> Tensor:
    """[..., M] -> [..., ceil(M / size)], largest entries."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size), value=-torch.inf).unflatten(-1, (-1, size)).amax(-1)


def pool_mean(x: Tensor, size: int) -> Tensor:
    """[B, H, M, D] -> [B, H, ceil(M / size), D] float32, means over the real tokens of each tile."""
    m = x.shape[2]
    sums = torch.nn.functional.pad(x, (0, 0, 0, -m % size)).unflatten(2, (-1, size)).sum(3, dtype=torch.float32)
    sizes = torch.full((sums.shape[2], 1), float(size), device=x.device)
    sizes[-1] -= -m % size
    return sums / sizes


@by_geometry
def forbidden_tiles(n: int, m: int, block_q: int, block_k: int, device: torch.device | str) -> Tensor:
    """[nQ, nK] bool: key tiles that begin after the last position of a query tile, right-aligned. Not to be written."""
    full, partial, _ = tile_kinds(n, m, block_q, block_k, device)
    return ~(full | partial)


def diagonal_tiles(n: int, m: int, block_q: int, block_k: int, device: torch.device | str) -> Tensor:
    """[nQ, nK] bool: key tiles that hold the own key of some row of the query tile. They are part of every plan. As above."""
    return tile_kinds(n, m, block_q, block_k, device)[2]


@by_geometry
def sink_and_own_tiles(n: int, m: int, block_q: int, block_k: int, device: torch.device | str, before: int = 0) -> Tensor:
    """[nQ, nK] bool: key tile 0, `diagonal_tiles`, and `before` tiles before those. Not to be written."""
    mask = diagonal_tiles(n, m, block_q, block_k, device).clone()
    for _ in range(before):
        mask[:, :-1] |= mask[:, 1:].clone()
    mask[:, 0] = True
    return mask


def score_kernels(q: Tensor, layer: LayerSpec) -> ModuleType | None:
    """The module `kernels.tile_scores` where it takes these queries; elsewhere, on every CPU, selectors use plain torch."""
    found = kernel_module("tile_scores") if q.is_cuda else None
    return found if found is not None and found.fits(q, layer.softcap) else None


def code_kernels(q: Tensor, layer: LayerSpec) -> ModuleType | None:
    """The module `kernels.code_scores` where it takes these queries; elsewhere, on every CPU, selectors use plain torch."""
    found = kernel_module("code_scores") if q.is_cuda else None
    return found if found is not None and found.fits(q, layer.softcap) else None


def gate_kernels(q: Tensor, n_tiles: int) -> ModuleType | None:
    """As `code_kernels`, the module `kernels.gates` for rows of n_tiles key tiles."""
    found = kernel_module("gates") if q.is_cuda else None
    return found if found is not None and found.fits(q, n_tiles) else None


def bucket_kernels(q: Tensor, softcap: float) -> ModuleType | None:
    """As `code_kernels`, the module `kernels.bucket_attention`."""
    found = kernel_module("bucket_attention") if q.is_cuda else None
    return found if found is not None and found.fits(q, softcap) else None


def _choose(scores: Tensor, wanted: Tensor | float, *, share: bool) -> Tensor | None:
    """`row_choice.choose` where it takes these scores, else None."""
    found = kernel_module("row_choice") if scores.is_cuda else None
    return found.choose(scores, wanted, share=share) if found is not None and found.fits(scores) else None


def keep_top(scores: Tensor, count: Tensor | int) -> Tensor:
    """The `count` largest entries of each row.

    Args:
        scores: [..., n] float; -inf is never kept. count: broadcastable to [...], int.

    Returns:
        [..., n] bool. Ties go to the lower index.
    """
    chosen = _choose(scores, count, share=False)
    if chosen is not None:
        return chosen
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    count = count.unsqueeze(-1) if isinstance(count, Tensor) else count
    wanted = (torch.arange(scores.shape[-1], device=scores.device) < count).expand_as(scores)
    return torch.zeros_like(wanted).scatter(-1, order, wanted) & (scores > -torch.inf)


def keep_share(shares: Tensor, wanted: Tensor | float) -> Tensor:
    """The fewest entries of each row whose sum reaches `wanted`.

    Args:
        shares: [..., n], not negative. wanted: broadcastable to [...]; at or above a row's sum keeps all that is not 0.

    Returns:
        [..., n] bool. Ties go to the lower index.
    """
    chosen = _choose(shares, wanted, share=True)
    if chosen is not None:
        return chosen
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    taken = (before < (wanted.unsqueeze(-1) if isinstance(wanted, Tensor) else wanted)) & (ordered > 0)
    return torch.zeros_like(taken).scatter(-1, order, taken)
