"""Launching `hopper_kernel`: which calls it takes, and the sizes it runs them with. Importing this module imports triton."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from winnow.workers.attention.kernels.tile_attention.pseudo_keys import pseudo_keys
from winnow.workers.attention.lowering import Lowered
from winnow.workers.attention.plan import TilePlan

log = logging.getLogger(__name__)
_LOG2_E = 1.4426950408889634
_SLAB_BYTES = 32 << 20  # K and V of the heads worked on at a time; the L2 holds 50 MB and keeps other things too


@dataclass(frozen=True)
class HopperLaunch:
    """Compile-time choices for one kind of call.

    Attributes:
        step, stages: keys of one product, and how many of those lie in shared memory at a time.
        consumers: warpgroups of 64 rows in a program; 2 = 128 rows that read the same keys.
        pack: 2 = those are 64-row query tiles of two heads with one list.
        programs: of each multiprocessor at a time.
    """

    head_size: int
    padded_size: int
    block_k: int
    step: int
    stages: int
    consumers: int
    pack: int
    programs: int

    @classmethod
    def choose(cls, head_size: int, block_q: int, block_k: int, *, pairs: bool) -> HopperLaunch:
        """pairs: neighbouring query heads share K, V and a list."""
        padded = 64 if head_size <= 64 else 128 if head_size <= 128 else 256
        pack = 2 if block_q == 64 and pairs else 1
        if block_q == 64 and not pairs:  # 64 rows to a program, two programs on a multiprocessor where they fit
            return cls(head_size, padded, block_k, 64, 2, 1, 1, 2 if padded <= 128 else 1)
        return cls(head_size, padded, block_k, 64 if padded == 256 else 128, 2 if padded == 256 else 3, 2, pack, 1)

    def constants(
        self, *, streams: bool = False, intervals: bool = False, columns: bool = False, pooled: bool = False
    ) -> dict[str, Any]:
        """The kernel's constexpr arguments."""
        return {
            "HEAD_SIZE": self.head_size,
            "D": self.padded_size,
            "BLOCK_K": self.block_k,
            "STEP": self.step,
            "STAGES": self.stages,
            "CONSUMERS": self.consumers,
            "PACK": self.pack,
            "STREAMS": streams,
            "INTERVALS": intervals,
            "COLUMNS": columns,
            "HAS_POOLED": pooled,
            "CONSUMER_REGISTERS": 240,  # twice, and the producer's: all that a multiprocessor has
            "PRODUCER_REGISTERS": 24,
        }

    def options(self) -> dict[str, int]:
        """Of the compiler. Two programs on a multiprocessor must share its registers."""
        return {"num_warps": 4, **({"maxnreg": 128} if self.consumers == 1 else {})}


@functools.cache
def _is_hopper(device_idx: int) -> bool:
    return torch.cuda.get_device_capability(device_idx) == (9, 0)


@functools.cache
def _processors(device_idx: int) -> int:
    return torch.cuda.get_device_properties(device_idx).multi_processor_count


@functools.cache
def _kernel() -> Any:
    """The kernel, or None where this triton has no Gluon for it, which is said once."""
    try:
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
            raise ImportError("needs triton 3.6")
        from winnow.workers.attention.kernels.tile_attention.hopper_kernel import hopper_kernel
    except (ImportError, AttributeError) as error:
        _give_up(error)
        return None
    return hopper_kernel


def _give_up(error: Exception) -> None:
    log.warning("tile attention: triton %s cannot build the kernel for Hopper, the general one is slower: %.300s",
                triton.__version__, error)  # fmt: skip


def takes(plan: TilePlan, q: Tensor, out: Tensor, *, scale: float) -> bool:
    """Whether `launch` can run this: capability 9.0, 16-bit in and out, query tiles of 64 or 128, heads of 33..256 in whole 16
    bytes."""
    head_size = q.shape[3]
    return (
        q.is_cuda
        and _is_hopper(q.device.index)
        and q.dtype in (torch.float16, torch.bfloat16)
        and out.dtype == q.dtype
        and plan.block_q in (64, 128)
        and plan.block_k in (16, 32, 64, 128)
        and 32 < head_size <= 256
        and head_size % 8 == 0
        and scale > 0
        and _kernel() is not None
    )


_refused: set[HopperLaunch] = set()  # Gluon is young: what a later triton does not compile is not tried again


def launch(
    plan: TilePlan, lists: Lowered, q: Tensor, k: Tensor, v: Tensor, *, scale: float, out: Tensor, lse: Tensor,
) -> bool:  # fmt: skip
    """As `tile_attention`, for what `takes` it; writes out and lse. K, V and q that TMA cannot read in place are copied.

    Returns:
        False, with nothing written, where this triton does not compile the kernel.
    """
    b, hq, n, d = q.shape
    hkv, m = k.shape[1:3]
    group, per_mask = hq // hkv, hq // plan.mask_heads
    choice = HopperLaunch.choose(d, plan.block_q, plan.block_k, pairs=group % 2 == 0 and per_mask % 2 == 0)
    if choice in _refused:
        return False
    q, k, v = (x if _is_readable(x) else x.contiguous() for x in (q, k, v))
    rows = min(plan.block_k, choice.step)
    q_desc, k_desc, v_desc = _boxes(q, 64), _boxes(k, rows), _boxes(v, rows)
    pooled_k_desc, pooled_v_desc, weights = None, None, lse
    pooled = plan.mean_correction and m >= plan.block_k
    if pooled:
        pooled_k, pooled_v, weights = pseudo_keys(plan, k, v)
        pooled_k_desc, pooled_v_desc = _boxes(pooled_k, choice.step), _boxes(pooled_v, choice.step)
    heads = hq // choice.pack
    n_items = plan.n_q_tiles * b * heads
    columns = plan.token_columns
    unused = lists.full.ids
    constants = choice.constants(
        streams=lists.sink is not None, intervals=lists.intervals is not None, columns=columns is not None, pooled=pooled
    )
    try:
        _kernel()[(min(n_items, _processors(q.device.index) * choice.programs),)](
            q_desc, k_desc, v_desc, pooled_k_desc, pooled_v_desc, k, v, out, lse,
            lists.full.offsets, lists.full.ids, lists.partial.offsets, lists.partial.ids,
            unused if lists.sink is None else lists.sink, unused if lists.recent is None else lists.recent,
            unused if lists.intervals is None else lists.intervals,
            lists.full.offsets if columns is None else columns.offsets, unused if columns is None else columns.ids, weights,
            torch.zeros(1, dtype=torch.int32, device=q.device),
            *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            n_items, plan.n_q_tiles, _slab(b * hkv, 4 * m * d) * group // choice.pack, n, m, heads, group,
            per_mask, plan.mask_heads, plan.batch, scale * _LOG2_E,
            **constants, **choice.options(),
        )  # fmt: skip
    except triton.TritonError as error:  # from its compiler, ptxas, or the driver that finds too little shared memory
        _refused.add(choice)
        _give_up(error)
        return False
    return True


def _slab(kv_heads: int, bytes_each: int) -> int:
    """KV heads to work on at a time: the most that fit in L2 and leave no smaller slab at the end; at least one."""
    return max(x for x in range(1, kv_heads + 1) if kv_heads % x == 0 and (x == 1 or x * bytes_each <= _SLAB_BYTES))


def _is_readable(x: Tensor) -> bool:
    outer = zip(x.shape[:3], x.stride()[:3], strict=True)
    return x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(size == 1 or (step > 0 and step % 8 == 0) for size, step in outer)


def _boxes(x: Tensor, rows: int) -> Any:
    """Describes x [B, H, L, D] to TMA, which fetches `rows` rows of 64 columns of one head and puts zeros past its end."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [step if size > 1 else 8 for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]  # unused but checked
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, 64], layout)
