"""Keys and values as they are kept: one tensor each or pages of a pool, in 32 or 16 bits or in float8 with scales.

`attend_stored` and `attend_pack` read them where they lie; `to_contiguous` is the way back to plain tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.errors import InvalidRequest, Unsupported

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of float8_e4m3fn
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, FP8)


@dataclass(frozen=True, eq=False)
class KVStorage:
    """Keys and values of a batch or of a pack of sequences.

    Attributes:
        k, v: float32, float16, bfloat16 or float8_e4m3fn, innermost stride 1, outer strides as they come. One of
            [B, Hkv, M, D], a batch of equally long sequences;
            [tokens, Hkv, D], a pack: sequences one behind another, cut by cumulative lengths;
            [pages, Hkv, page size, D] with a page_table, for both. (A pool [pages, page size, Hkv, D] is its `transpose(1, 2)`.)
        page_table: [B, pages of the longest sequence or more] int32, on the same device: page_table[b, x] holds keys
            x * page size.. of sequence b. Entries past a sequence's last key are not read, nor are keys past it in its last
            page. Sequences may share pages. The page size is a power of two >= 16, whatever a plan's tiles are.
        n_keys: M of a batch. None = all keys of a contiguous one, the plan's in pages; a pack's cumulative lengths say it.
        k_scale, v_scale: [B, Hkv], or [1, Hkv] for all sequences, float32: a float8 value stands for value * scale. None = 1.

    Raises:
        InvalidRequest: shapes, strides, devices or scales that do not fit each other.
        Unsupported: another dtype or page size.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None = None
    n_keys: int | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        k, v, table = self.k, self.v, self.page_table
        if k.shape != v.shape or k.dim() not in (3, 4) or k.dtype != v.dtype or k.device != v.device:
            raise InvalidRequest(
                f"kv: k and v must be alike, [B, Hkv, M, D], [tokens, Hkv, D] or [pages, Hkv, page size, D], got "
                f"{list(k.shape)} {k.dtype} on {k.device} and {list(v.shape)} {v.dtype} on {v.device}"
            )
        if k.dtype not in _DTYPES:
            raise Unsupported(f"kv: k and v must be float32, float16, bfloat16 or float8_e4m3fn, got {k.dtype}; convert them")
        if k.stride(-1) != 1 or v.stride(-1) != 1:
            raise InvalidRequest("kv: k and v need innermost stride 1; store them with the head's values side by side")
        if table is not None:
            if k.dim() != 4 or table.dim() != 2 or table.dtype != torch.int32 or table.device != k.device:
                raise InvalidRequest(
                    "kv: page_table must be [B, pages] int32 on the device of k, beside k of [pages, Hkv, page size, D], got "
                    f"{list(table.shape)} {table.dtype} on {table.device} beside {list(k.shape)} on {k.device}"
                )
            if self.page_size < 16 or self.page_size & (self.page_size - 1):
                raise Unsupported(f"kv: page size must be a power of two >= 16, got {self.page_size}; make pages of that size")
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is None:
                continue
            if not self.is_fp8:
                raise InvalidRequest(f"kv: {name} belongs to float8 values, k and v are {k.dtype}; leave it out")
            if scale.dim() != 2 or scale.shape[1] != self.kv_heads or scale.dtype != torch.float32 or scale.device != k.device:
                raise InvalidRequest(
                    f"kv: {name} must be [B or 1, {self.kv_heads}] float32 on {k.device}, got {list(scale.shape)} {scale.dtype} "
                    f"on {scale.device}"
                )

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def page_size(self) -> int:
        """Keys of a page; 0 = contiguous."""
        return 0 if self.page_table is None else int(self.k.shape[2])

    @property
    def is_fp8(self) -> bool:
        return self.k.dtype == FP8

    def sequence(self, index: int, first_key: int, n_keys: int) -> KVStorage:
        """Sequence `index` of a pack as a batch of one; views only. first_key: where it begins, in a contiguous pack."""
        k_scale, v_scale = (x if x is None or x.shape[0] == 1 else x[index : index + 1] for x in (self.k_scale, self.v_scale))
        if self.page_table is not None:
            own = self.page_table[index : index + 1]
            return replace(self, page_table=own, n_keys=n_keys, k_scale=k_scale, v_scale=v_scale)
        k, v = (x[first_key : first_key + n_keys].transpose(0, 1).unsqueeze(0) for x in (self.k, self.v))
        return replace(self, k=k, v=v, n_keys=n_keys, k_scale=k_scale, v_scale=v_scale)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys start..stop - 1 of a batch as they are stored, unscaled: [B, Hkv, stop - start, D] each. Copies pages only."""
        if self.page_table is None:
            return self.k[:, :, start:stop], self.v[:, :, start:stop]
        first = start // self.page_size
        pages = self.page_table[:, first : -(-stop // self.page_size)].long()
        found = []
        for x in (self.k, self.v):
            bits = x.view(torch.uint8) if self.is_fp8 else x  # float8 cannot be indexed everywhere
            rows = bits.transpose(0, 1)[:, pages].flatten(2, 3).transpose(0, 1).view(x.dtype)  # [B, Hkv, pages * page size, D]
            found.append(rows[:, :, start - first * self.page_size : stop - first * self.page_size])
        return found[0], found[1]

    def to_contiguous(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """k and v of a batch [B, Hkv, M, D] in this dtype, scales applied; views where nothing has to change.

        Does not wait for the device. Cost: 2 B Hkv M D values written.
        """
        k, v = self.part(0, int(self.k.shape[2] if self.n_keys is None else self.n_keys))
        if not self.is_fp8:
            return k.to(dtype), v.to(dtype)
        return _scaled(k, self.k_scale, dtype), _scaled(v, self.v_scale, dtype)

    def check(self, lengths: list[int]) -> None:
        """Raise InvalidRequest unless sequences of these many keys are in here.

        Page ids out of range are found on the CPU only: on a GPU that would wait for the device, and reading such a page is
        undefined there.
        """
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None and scale.shape[0] not in (1, len(lengths)):
                raise InvalidRequest(f"kv: {name} has {scale.shape[0]} rows, needs {len(lengths)} sequences or 1")
        longest = max(lengths)
        if self.page_table is None:
            if self.k.dim() == 4 and (self.k.shape[0] != len(lengths) or self.k.shape[2] < longest):
                raise InvalidRequest(f"kv: k is {list(self.k.shape)}, needs {len(lengths)} sequences of {longest} keys")
            return
        rows, columns = self.page_table.shape
        if rows != len(lengths) or columns * self.page_size < longest:
            raise InvalidRequest(
                f"kv: page_table must have a row for each of {len(lengths)} sequences and pages for {longest} keys, got {rows} "
                f"rows of {columns} pages of {self.page_size}"
            )
        if self.page_table.device.type == "cpu":
            used = torch.arange(columns) * self.page_size < torch.tensor(lengths)[:, None]
            ids = self.page_table[used]
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.k.shape[0]:
                raise InvalidRequest(
                    f"kv: page_table names pages {int(ids.min())}..{int(ids.max())}, there are 0..{self.k.shape[0] - 1}"
                )


def quantize_kv(k: Tensor, v: Tensor, *, k_scale: Tensor | None = None, v_scale: Tensor | None = None) -> KVStorage:
    """Keys and values in float8_e4m3fn, a scale for each head (and sequence): half the memory of 16 bits.

    Args:
        k, v: [B, Hkv, M, D], or [tokens, Hkv, D] of a pack, which gets one scale per head for all its sequences. Any float dtype.
        k_scale, v_scale: scales found earlier, [B, Hkv] or [1, Hkv] float32, for caches that grow; values beyond 448 * scale
            are cut. None = the largest absolute value of the head / 448.

    Returns:
        Storage on the same device; nothing waits for it. Each value is off by at most 1/16 of itself, or for those below
        scale / 64 by scale / 1024.

    Source: own; the format is that of Micikevicius et al. 2022 (FP8 formats for deep learning), E4M3 without infinities.
    """
    k_scale, v_scale = (_largest(x) if scale is None else scale for x, scale in ((k, k_scale), (v, v_scale)))
    return KVStorage(_cut(k, k_scale), _cut(v, v_scale), k_scale=k_scale, v_scale=v_scale)


def _largest(x: Tensor) -> Tensor:
    """[B, Hkv] or, for a pack, [1, Hkv] float32: what makes the largest value of a head the largest float8."""
    top = x.abs().amax((2, 3)) if x.dim() == 4 else x.abs().amax((0, 2)).unsqueeze(0)
    return torch.where(top == 0, 1.0, top.float() / _LARGEST)


def _cut(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    for head in range(x.shape[1]):  # head by head: float32 is four times as large
        factor = scale[:, head].view(-1, *[1] * (x.dim() - 2))
        out[:, head] = (x[:, head].float() / factor).clamp(-_LARGEST, _LARGEST).to(FP8)
    return out


def _scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return x.to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for head in range(x.shape[1]):
        out[:, head] = x[:, head].float() * scale[:, head, None, None]
    return out
