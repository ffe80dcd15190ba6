"""The selectors' kernels compile for Hopper on a machine without one, fit its shared memory, and keep scores in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 227 * 1024  # what one block may have on compute capability 9.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_builds_for_sm_90(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_selection.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    builds = {build["case"]: build for build in json.loads(done.stdout.strip().splitlines()[-1])}
    for build in builds.values():
        assert 0 <= build["shared_bytes"] <= SHARED_BYTES, build
        assert build["cubin_bytes"] > 0, build
    for case in ("verdicts", "verdicts of 256"):  # 8-bit products, whose scores no layout change sends through shared memory
        assert builds[case]["wgmma_8"] > 0, builds[case]
        assert builds[case]["most_moved"] <= 1024, builds[case]
    for case in ("row codes", "mean logits", "ranks", "buckets", "buckets of 256"):
        assert builds[case]["wgmma"] > 0, builds[case]
