"""A pipeline of the demo's own: its own run folder and port, gone with all it made when the block ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from winnow.config import load_config
from winnow.errors import WinnowError
from winnow.orchestration import launch
from winnow.orchestration.state import RunState, read_state


@contextmanager
def own_pipeline(model: str, *, single: bool, on_progress: Callable[[str], None]) -> Iterator[RunState]:
    """Start a pipeline in a fresh WINNOW_HOME on a free port; stop it and remove the folder on every way out.

    Args:
        model: folder of the model; a model cache in the user's own WINNOW_HOME is used through its path.

    Raises:
        WinnowError: it cannot start, with the reason.
    """
    before = os.environ.get("WINNOW_HOME")
    folder = Path(tempfile.mkdtemp(prefix="winnow-demo-"))
    os.environ["WINNOW_HOME"] = str(folder)
    try:
        flags = {"model": {"source": model}, "gateway": {"port": 0, "host": "127.0.0.1"}, "metadata": {"redis_url": ""}}
        try:
            yield launch.up(load_config(None, flags), single=single, detach=False, on_progress=on_progress)
        finally:
            launch.down(on_progress=on_progress)
            left = read_state()
    finally:
        if before is None:
            del os.environ["WINNOW_HOME"]
        else:
            os.environ["WINNOW_HOME"] = before
        shutil.rmtree(folder, ignore_errors=True)
    if left is not None:
        raise WinnowError(f"the demo's pipeline did not stop: process {left.pid} is still there; end it with `kill {left.pid}`")
