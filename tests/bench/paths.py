"""Import winnow from a checkout that is not installed, as on a bare GPU machine."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def ensure_importable() -> None:
    """Make `import winnow.workers...` work in this process and its children; does nothing where winnow is installed.

    A temporary folder holds `winnow/` with links to every entry of src/winnow and to the parts beside it, which is what the
    package mapping in pyproject.toml installs. The folder lives as long as the machine's temporary files; it holds links only.
    """
    if importlib.util.find_spec("winnow") is not None and importlib.util.find_spec("winnow.workers") is not None:
        return
    base = Path(tempfile.mkdtemp(prefix="winnow-import-"))
    package = base / "winnow"
    package.mkdir()
    for entry in (_ROOT / "src" / "winnow").iterdir():
        (package / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    for part in ("index", "workers", "services", "orchestration"):
        (package / part).symlink_to(_ROOT / part, target_is_directory=True)
    sys.path.insert(0, str(base))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(base), os.environ.get("PYTHONPATH", ""))))
    for name in [name for name in sys.modules if name == "winnow" or name.startswith("winnow.")]:
        del sys.modules[name]
    importlib.invalidate_caches()
