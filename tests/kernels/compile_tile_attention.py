"""Compile the tile attention kernels for sm_90 without a GPU and print what came out as JSON. Run in a process of its own.

`test_tile_attention_compiles.py` runs this file: a process that imported the kernel for the interpreter cannot compile it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl

from winnow.workers.attention.kernels.tile_attention.hopper import HopperLaunch
from winnow.workers.attention.kernels.tile_attention.hopper_kernel import hopper_kernel
from winnow.workers.attention.kernels.tile_attention.kernel import Launch, tile_attention_kernel

_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TYPES = {"full_offsets": "*i64", "full_ids": "*i32", "partial_offsets": "*i64", "partial_ids": "*i32", "sink_ptr": "*i32",
          "recent_ptr": "*i32", "intervals_ptr": "*i32", "column_offsets": "*i64", "column_ids": "*i32", "lse_ptr": "*fp32",
          "pooled_weights": "*fp32", "scale_log2": "fp32", "page_table": "*i32", "k_scale_ptr": "*fp32",
          "v_scale_ptr": "*fp32", "items_ptr": "*i32", "sequences_ptr": "*i64", "counter": "*i32", "scale": "fp32"}  # fmt: skip


def compile_for(dtype: str, head_size: int, block_q: int, block_k: int, *features: str) -> dict[str, object]:
    """Facts about one build: whether it uses Hopper's matrix instruction, its shared memory, its size.

    features: names of `Launch.constants`, "page64" = pages of 64 keys; "hopper" = the kernel for Hopper, "pairs" = two heads
    share a list.
    """
    if "hopper" in features:
        built = _hopper(dtype, head_size, block_q, block_k, {name for name in features if name != "hopper"})
    else:
        launch = Launch.choose(_TORCH[dtype], head_size, block_q, block_k)
        page = next((int(name[4:]) for name in features if name.startswith("page")), 0)
        constants = launch.constants(**{name: True for name in features if not name.startswith("page")}, page=page)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        used = {"page_table": page > 0, "k_scale_ptr": "fp8" in features, "v_scale_ptr": "fp8" in features,
                "items_ptr": "packed" in features, "sequences_ptr": "packed" in features}  # fmt: skip
        constants.update({name: None for name, is_used in used.items() if not is_used})
        types = {"k_ptr": "*fp8e4nv", "v_ptr": "*fp8e4nv"} if "fp8" in features else {}
        built = _build(ASTSource, tile_attention_kernel, dtype, constants, types, options)
    return {
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
        "tma": built.asm["ptx"].count("cp.async.bulk.tensor"),
        "shared_bytes": built.metadata.shared,
        "cubin_bytes": len(built.asm["cubin"]),
        "case": [dtype, head_size, block_q, block_k, *features],
    }


def _hopper(dtype: str, head_size: int, block_q: int, block_k: int, features: set[str]) -> Any:
    try:
        from triton.experimental.gluon import GluonASTSource
    except ImportError:  # triton 3.6
        from triton.experimental.gluon._runtime import GluonASTSource
    launch = HopperLaunch.choose(head_size, block_q, block_k, pairs="pairs" in features)
    constants = launch.constants(**dict.fromkeys(features - {"pairs"}, True))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    rows = {"q_desc": 64, "k_desc": min(block_k, launch.step), "v_desc": min(block_k, launch.step)}
    for name in ("pooled_k_desc", "pooled_v_desc"):
        if "pooled" in features:
            rows[name] = launch.step
        else:
            constants[name] = None
    boxes = {name: f"tensordesc<{dtype}[1, 1, {n}, 64],{layout!r}>" for name, n in rows.items()}
    return _build(GluonASTSource, hopper_kernel, dtype, constants, boxes, launch.options())


def _build(
    source: Any, kernel: Any, dtype: str, constants: dict[str, Any], types: dict[str, str], options: dict[str, int]
) -> Any:
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types or name in _TYPES:
            signature[name] = types.get(name) or _TYPES[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i64" if name.startswith("stride") else "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    return triton.compile(source(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    cases = [case.split(",") for case in sys.argv[1:]]
    print(json.dumps([compile_for(dtype, int(d), int(bq), int(bk), *features) for dtype, d, bq, bk, *features in cases]))
