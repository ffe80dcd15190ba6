"""Compile the tile attention kernel for sm_90 without a GPU and print what came out as JSON. Run in a process of its own.

`test_tile_attention_compiles.py` runs this file: a process that imported the kernel for the interpreter cannot compile it.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from winnow.workers.attention.kernels.tile_attention.kernel import Launch, tile_attention_kernel

_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TYPES = {"full_offsets": "*i64", "full_ids": "*i32", "partial_offsets": "*i64", "partial_ids": "*i32", "sink_ptr": "*i32",
          "recent_ptr": "*i32", "intervals_ptr": "*i32", "column_offsets": "*i64", "column_ids": "*i32", "lse_ptr": "*fp32",
          "pooled_weights": "*fp32", "scale_log2": "fp32"}  # fmt: skip


def compile_for(dtype: str, head_size: int, block_q: int, block_k: int, *features: str) -> dict[str, object]:
    """Facts about one build: whether it uses Hopper's matrix instruction, its shared memory, its size."""
    launch = Launch.choose(_TORCH[dtype], head_size, block_q, block_k)
    constants = launch.constants(**dict.fromkeys(features, True))
    signature: dict[str, str] = {}
    for name in tile_attention_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in _TYPES:
            signature[name] = _TYPES[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i64" if name.startswith("stride") else "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(tile_attention_kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    built = triton.compile(
        ASTSource(tile_attention_kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    ptx = built.asm["ptx"]
    return {
        "wgmma": ptx.count("wgmma.mma_async"),
        "shared_bytes": built.metadata.shared,
        "cubin_bytes": len(built.asm["cubin"]),
        "case": [dtype, head_size, block_q, block_k, *features],
    }


if __name__ == "__main__":
    cases = [case.split(",") for case in sys.argv[1:]]
    print(json.dumps([compile_for(dtype, int(d), int(bq), int(bk), *features) for dtype, d, bq, bk, *features in cases]))
