"""The kernels compile for Hopper on a machine without one, use its matrix instruction and fit its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 227 * 1024  # what one block may have on compute capability 9.0
CASES = [
    "bf16,128,128,128",
    "fp16,64,128,128",
    "bf16,64,64,64",
    "bf16,256,128,64",
    "fp32,64,32,32",
    "bf16,128,128,128,columns",
    "bf16,128,128,64,pooled",
    "bf16,128,128,128,intervals",
    "bf16,128,128,128,intervals,columns,pooled",
    "bf16,256,64,64,intervals,columns,pooled",
]
STORED_CASES = [
    "bf16,128,128,128,page64",
    "bf16,128,128,128,page16,columns,pooled",
    "bf16,128,128,128,fp8",
    "bf16,128,128,128,packed",
    "bf16,256,64,64,page16,fp8,packed,streams,intervals,columns,pooled",
    "fp16,64,64,64,page128,fp8,packed",
    "fp32,64,32,32,page16,fp8,packed",
]
HOPPER_CASES = [
    "bf16,128,128,128,hopper",
    "fp16,64,128,32,hopper,streams",
    "bf16,128,64,64,hopper,pairs,intervals",
    "bf16,128,64,64,hopper",
    "bf16,256,128,128,hopper",
    "bf16,96,128,16,hopper,streams,intervals,columns,pooled",
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cases", [CASES, STORED_CASES, HOPPER_CASES], ids=["general", "stored", "hopper"])
def test_builds_for_sm_90(tmp_path: Path, cases: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_tile_attention.py")
    done = subprocess.run([sys.executable, str(script), *cases], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    builds = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(builds) == len(cases)
    for build in builds:
        assert 0 < build["shared_bytes"] <= SHARED_BYTES, build
        assert build["cubin_bytes"] > 0, build
        if build["case"][0] != "fp32":
            assert build["wgmma"] > 0, build
        if "hopper" in build["case"]:
            assert build["tma"] > 0, build
