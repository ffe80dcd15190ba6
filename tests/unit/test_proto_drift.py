"""The committed generated code is what the committed .proto files generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(120)
def test_generated_code_matches_the_proto_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="the dev extra brings grpcio-tools")
    names = [f"winnow/proto/v1/{path.name}" for path in sorted((ROOT / "proto" / "v1").glob("*.proto"))]
    command = [
        "-m",
        "grpc_tools.protoc",
        "-Iwinnow/proto=proto",
        *(f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")),
    ]
    subprocess.run([sys.executable, *command, *names], cwd=ROOT, check=True, capture_output=True, text=True)
    fresh = {path.name: path.read_text() for path in (tmp_path / "winnow/proto/v1").iterdir()}
    committed = {
        p.name: p.read_text()
        for p in (ROOT / "src/winnow/proto/v1").iterdir()
        if "_pb2" in p.name and p.suffix in (".py", ".pyi")
    }
    assert sorted(fresh) == sorted(committed)
    changed = [name for name in fresh if fresh[name] != committed[name]]
    assert changed == [], "run `make proto`"
