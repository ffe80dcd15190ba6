"""Writes the generated parts of README.md and docs/results.md. `--check` only compares (exit code 1 = stale).

A part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; nothing else of a file is touched.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIRECT = (  # read where they are used, not through the configuration
    (
        "WINNOW_HOME",
        "`~/.cache/winnow`",
        "src/winnow/config.py",
        "Folder of models, run state and logs; each home is a pipeline of its own",
    ),
    (
        "WINNOW_ADDRESS",
        "the running pipeline's",
        "src/winnow/client.py",
        "Gateway the client and the commands talk to, host:port",
    ),
    ("WINNOW_TOKEN", "the running pipeline's", "src/winnow/client.py", "Bearer token of the client and the commands"),
    (
        "WINNOW_MODEL_WHEEL",
        "empty",
        "workers/model/default_model.py",
        "The default model's wheel or .gguf, fetched elsewhere (no network)",
    ),
)


def escaped(text: str) -> str:
    """Text fit for a cell of a table."""
    return text.replace("|", "\\|")


def settings() -> str:
    """Every WINNOW_* variable with its default and meaning."""
    from winnow.cli.settings import env_name, fields

    lines = ["| Variable | Default | Read in | Meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {default} | {place} | {text} |" for name, default, place, text in DIRECT]
    for name, default, text in fields():
        shown = f"`{default!r}`" if default != "" else "empty"
        lines.append(f"| `{env_name(name)}` | {shown} | src/winnow/config.py | {escaped(text)} |")
    return "\n".join(lines)


def methods() -> str:
    """Every built-in method with its capabilities."""
    from winnow.workers.decode.base import decode_methods
    from winnow.workers.draft.base import draft_scorers
    from winnow.workers.prefill.base import prefill_methods
    from winnow.workers.ranking.base import rankers

    lines = [
        "| Slot | Name | Exact | Prefix-safe | Chunked | Needs | Training | Falls back to | What it does |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    slots: tuple[tuple[str, Any], ...] = (
        ("prefill", prefill_methods), ("decode", decode_methods), ("draft", draft_scorers), ("ranker", rankers),
    )  # fmt: skip
    for slot, registry in slots:
        for entry in registry:
            if entry.cls is None or not entry.cls.__module__.startswith("winnow."):
                continue
            caps = entry.cls.caps
            marks = ["yes" if flag else "no" for flag in (caps.exact, caps.prefix_safe, caps.chunked)]
            needs, rest = ", ".join(sorted(caps.needs)) or "-", (caps.training or "-", caps.fallback or "-", escaped(caps.notes))
            lines.append(f"| {slot} | `{entry.name}` | {' | '.join((*marks, needs, *rest))} |")
    return "\n".join(lines)


def calibrations() -> str:
    """What comes with winnow for the default model: the command that makes it, and what the file says of how it went."""
    from safetensors import safe_open

    lines = ["| Made by | Of | Result |", "|---|---|---|"]
    for path in sorted((ROOT / "workers" / "prefill" / "calibrations").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            made = dict(file.metadata())
        options = dict(pair.split("=") for pair in made.pop("options").split())
        seed = options.pop("seed")
        command = " ".join(
            [f"winnow calibrate {made.pop('method')}", *(f"--option {key}={value}" for key, value in options.items())]
        )
        for known in ("model", "format"):
            del made[known]
        of = made.pop("data")
        results = "; ".join(f"{name.replace('_', ' ')}: {escaped(text)}" for name, text in sorted(made.items()))
        lines.append(f"| `{command}{'' if seed == '0' else f' --seed {seed}'}` | {escaped(of)} | {results} |")
    return "\n".join(lines)


def measurements(front: bool) -> str:
    """The tables of tests/bench/results."""
    tables = runpy.run_path(str(ROOT / "tests" / "bench" / "tables.py"))
    return str(tables["markdown"](tables["load"](), front))


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "settings": settings, "methods": methods, "calibrations": calibrations, "measurements": lambda: measurements(front=True),
    },
    "docs/results.md": {"measurements": lambda: measurements(front=False)},
}  # fmt: skip


def rewritten(name: str) -> str:
    """The document with every generated part made anew.

    Raises:
        ValueError: a part without its pair of markers, or with several.
    """
    text = (ROOT / name).read_text()
    for part, make in DOCUMENTS[name].items():
        pattern = re.compile(rf"(<!-- generated: {part} -->\n).*?(<!-- end: {part} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{name} needs the markers of {part} exactly once")
        body = make()
        text = pattern.sub(lambda match, body=body: match[1] + body + "\n" + match[2], text)
    return text


def main() -> None:
    new = {ROOT / name: rewritten(name) for name in DOCUMENTS}
    stale = [path.name for path, text in new.items() if path.read_text() != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale: {', '.join(stale)}; run `make docs`" if stale else 0)
    for path, text in new.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
