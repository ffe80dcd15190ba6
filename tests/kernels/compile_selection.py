"""Compile the selectors' kernels for sm_90 without a GPU and print what came out as JSON. Run in a process of its own.

`test_selection_compiles.py` runs this file: a process that imported the kernels for the interpreter cannot compile them.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_KERNELS = "winnow.workers.attention.kernels."
_SCORES = {"row_codes_ptr": "*i8", "row_scales_ptr": "*fp32", "offsets_ptr": "*fp32", "key_codes_ptr": "*i8",
           "key_scales_ptr": "*fp32", "of_mean_ptr": "*fp32", "limits_ptr": "*fp32"}  # fmt: skip
_BUCKETS = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*fp32", "lse_ptr": "*fp32", "rows_ptr": "*i32",
            "keys_ptr": "*i32", "picks_ptr": "*i32", "pick_blocks_ptr": "*i32", "bias_ptr": "*fp32",
            "scale_log2": "fp32"}  # fmt: skip
_WIDE = {"num_warps": 8}
# what to build: module, kernel, types of pointers, constants, options
CASES: dict[str, tuple[str, str, dict[str, str], dict[str, Any], dict[str, int]]] = {
    "mass of tiles, many rows": (
        "tile_scores", "tile_lse_kernel",
        {"q_ptr": "*bf16", "k_ptr": "*bf16", "seen_ptr": "*i32", "lse_ptr": "*fp32", "top_ptr": "*fp32", "scale_log2": "fp32"},
        {"D": 128, "BLOCK_R": 128, "BLOCK_C": 128, "PER_TILE": 128, "TOP": False}, {"num_warps": 4, "num_stages": 2},
    ),
    "key codes": (
        "codes", "key_codes_kernel",
        {"k_ptr": "*bf16", "shift_ptr": "*fp32", "codes_ptr": "*i8", "scales_ptr": "*fp32", "top": "fp32"},
        {"D": 128, "TOKEN_SCALES": False}, {"num_warps": 4},
    ),
    "row codes": (
        "codes", "row_codes_kernel",
        {"q_ptr": "*bf16", "k_ptr": "*bf16", "shift_ptr": "*fp32", "codes_ptr": "*i8", "scales_ptr": "*fp32",
         "offsets_ptr": "*fp32", "means_ptr": "*bf16", "top": "fp32", "scale": "fp32"},
        {"D": 128, "STEP": 64, "TOKEN_SCALES": False}, {"num_warps": 4, "num_stages": 2},
    ),
    "mean logits": (
        "code_scores", "mean_logits_kernel", {"means_ptr": "*bf16", "k_ptr": "*bf16", "out_ptr": "*fp32", "scale": "fp32"},
        {"D": 128, "BLOCK_U": 128, "BLOCK_C": 128}, {"num_warps": 8},
    ),
    "verdicts": (
        "code_scores", "code_scores_kernel",
        {**_SCORES, "row_codes_ptr": "*fp8e4nv", "key_codes_ptr": "*fp8e4nv", "out_ptr": "*u8"},
        {"D": 128, "UNITS": 2, "BLOCK_C": 128, "TOKEN_SCALES": False, "VERDICTS": True}, _WIDE,
    ),
    "largest scores of 64": (
        "code_scores", "code_scores_kernel", {**_SCORES, "out_ptr": "*fp32"},
        {"D": 64, "UNITS": 2, "BLOCK_C": 128, "TOKEN_SCALES": True, "VERDICTS": False}, _WIDE,
    ),
    "pooled keys": (
        "gates", "pool_kernel", {"x_ptr": "*bf16", "cos_ptr": "*bf16", "sin_ptr": "*bf16", "out_ptr": "*fp32"},
        {"HALF": 64, "BLOCK": 64, "HEADS": 8, "EXTREMES": True}, {"num_warps": 8},
    ),
    "largest tiles": (
        "row_choice", "choose_tiles_kernel",
        {"scores_ptr": "*fp32", "counts_ptr": "*fp32", "out_ptr": "*u8", "threshold": "fp32"},
        {"TOP": True, "BLOCK": 2048}, {"num_warps": 2},
    ),
    "tiles of a share": (
        "row_choice", "choose_tiles_kernel",
        {"scores_ptr": "*fp32", "counts_ptr": "*fp32", "out_ptr": "*u8", "threshold": "fp32"},
        {"TOP": False, "BLOCK": 8192}, {"num_warps": 8},
    ),
    "weights of what is left out": (
        "tile_weights", "log_weights_kernel",
        {"class_ptr": "*i8", "full_offsets": "*i64", "full_ids": "*i32", "column_offsets": "*i64", "column_ids": "*i32",
         "out_ptr": "*fp32"},
        {"COLUMNS": True, "WINDOW": True, "BLOCK": 1024}, {"num_warps": 4},
    ),
    "ranks": (
        "bucket_attention", "gray_ranks_kernel", {"x_ptr": "*bf16", "terms_ptr": "*bf16", "out_ptr": "*i32"},
        {"D": 128, "WIDTH": 16, "TERMS": 3, "BLOCK": 128}, {"num_warps": 4},
    ),
    "buckets": (
        "bucket_attention", "bucket_attention_kernel", _BUCKETS, {"D": 128, "BLOCK_R": 128, "STEP": 64},
        {"num_warps": 8, "num_stages": 2},
    ),
    "buckets of 256": (
        "bucket_attention", "bucket_attention_kernel", _BUCKETS, {"D": 256, "BLOCK_R": 64, "STEP": 32},
        {"num_warps": 8, "num_stages": 2},
    ),
    "single keys": (
        "row_attention", "row_attention_kernel",
        {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*bf16", "lse_ptr": "*fp32", "tile_offsets": "*i64",
         "tile_ids": "*i32", "column_offsets": "*i64", "column_ids": "*i32", "scale": "fp32", "softcap": "fp32"},
        {"HEAD_SIZE": 128, "D": 128, "STEP": 16, "COLUMNS": True, "WINDOW": False, "SOFTCAP": False}, {"num_warps": 1},
    ),
    "verdicts of 256": (
        "code_scores", "code_scores_kernel", {**_SCORES, "out_ptr": "*u8"},
        {"D": 256, "UNITS": 2, "BLOCK_C": 128, "TOKEN_SCALES": False, "VERDICTS": True}, _WIDE,
    ),
}  # fmt: skip


def compile_for(name: str) -> tuple[dict[str, object], Any]:
    """Facts about one build, and the build: matrix instructions, shared memory, its size, values that move between layouts."""
    module, kernel_name, types, constants, options = CASES[name]
    kernel = getattr(importlib.import_module(_KERNELS + module), kernel_name)
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in types:
            signature[argument] = types[argument]
        else:
            signature[argument] = "i64" if argument.startswith("stride") else "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument.startswith("stride")
    }
    built = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    moved = [
        re.findall(r"tensor<([\dx]+)x\w+,", line)[-1] for line in built.asm["ttgir"].splitlines() if "convert_layout" in line
    ]
    sizes = [eval(shape.replace("x", "*")) for shape in moved]
    return {
        "case": name,
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
        "wgmma_8": len(re.findall(r"wgmma\.mma_async\S*\.(s32\.s8\.s8|f32\.e4m3\.e4m3)", built.asm["ptx"])),
        "shared_bytes": built.metadata.shared,
        "cubin_bytes": len(built.asm["cubin"]),
        "most_moved": max(sizes, default=0),
    }, built


if __name__ == "__main__":
    print(json.dumps([compile_for(name)[0] for name in sys.argv[1:] or CASES]))
