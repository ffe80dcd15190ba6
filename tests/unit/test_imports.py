"""Who may import whom. Read from the source, so that lazy imports inside functions count too.

core `winnow` <- `winnow.index` <- `winnow.workers` <- `winnow.services` <- `winnow.orchestration` <- `winnow.cli`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"src/winnow": "winnow", "index": "winnow.index", "workers": "winnow.workers", "services": "winnow.services",
           "orchestration": "winnow.orchestration"}  # fmt: skip
LAYERS = ("core", "index", "workers", "services", "orchestration", "cli")  # each may import itself and those before it
ONLY = {  # package -> modules that may import it
    "ray": ("winnow.orchestration",),
    "grpc": ("winnow.services", "winnow.client", "winnow.proto"),
    "redis": ("winnow.orchestration.metadata",),
    "typer": ("winnow.cli",),
    "faiss": ("winnow.index",),
    "triton": ("winnow.workers.attention.kernels",),
}
# Set-up that has to be done before or beside the part it belongs to, each with its reason.
ALLOWED = {
    ("winnow.cli.doctor", "ray"): "reports versions",
}


def layer(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in LAYERS else "core"


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imported(path: Path, module: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "winnow":
                yield from ((node.lineno, f"winnow.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[: -node.level] if path.name != "__init__.py" else module.split(".")[: 1 - node.level or None]
            yield node.lineno, ".".join([*base, node.module or ""]).rstrip(".")


ALL = [(module, path, line, name) for module, path in modules() for line, name in imported(path, module)]


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith((name + ".", name + "_")) for name in allowed)


def test_the_reader_sees_imports() -> None:
    seen = {(module, name) for module, _, _, name in ALL}
    assert ("winnow.registry", "winnow.errors") in seen
    assert ("winnow.workers.decode.base", "winnow.index.segment") in seen
    assert len(ALL) > 100


def test_no_part_imports_a_later_one() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {layer(module)} imports {name}"
        for module, path, line, name in ALL
        if name.split(".")[0] == "winnow" and LAYERS.index(layer(name)) > LAYERS.index(layer(module))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ONLY)
def test_heavy_packages_stay_where_they_belong(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for module, path, line, name in ALL
        if name.split(".")[0] == package and not within(module, ONLY[package]) and (module, package) not in ALLOWED
    ]
    assert wrong == []


def test_parts_are_imported_by_their_full_name() -> None:
    bare = {"index", "workers", "services", "orchestration", "src", "proto"}
    assert [f"{path.relative_to(ROOT)}:{line}" for _, path, line, name in ALL if name.split(".")[0] in bare] == []
