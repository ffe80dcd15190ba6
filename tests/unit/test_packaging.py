"""The package list of pyproject.toml is what is on disk, and the built wheel holds it all."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPING: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in MAPPING.items():
        base = ROOT / folder
        for init in base.rglob("__init__.py"):
            parts = init.parent.relative_to(base).parts
            found.add(".".join((package, *parts)))
    return found


def test_every_folder_with_python_is_a_listed_package() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages_on_disk())


def test_every_folder_of_modules_has_an_init_file() -> None:
    folders = {path.parent for folder in MAPPING.values() for path in (ROOT / folder).rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_no_python_lies_in_proto() -> None:
    assert list((ROOT / "proto").rglob("*.py")) == []


def test_console_script_points_at_a_callable() -> None:
    from winnow.cli import main

    assert PROJECT["project"]["scripts"] == {"winnow": "winnow.cli:main"}
    assert callable(main)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_holds_every_package_and_type_marker(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    names = [n for n in names if n and not n.startswith("tests/")] or [
        str(p.relative_to(ROOT)) for f in (*MAPPING.values(), "proto") for p in (ROOT / f).rglob("*") if p.is_file()
    ]
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    script = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = {package.replace(".", "/") + "/__init__.py" for package in PROJECT["tool"]["setuptools"]["packages"]}
    assert expected <= inside
    assert "winnow/py.typed" in inside
    assert "winnow/proto/v1/winnow_pb2.pyi" in inside
