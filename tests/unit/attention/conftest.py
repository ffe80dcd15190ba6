"""Makes the seeded workloads importable from the tests below this folder."""

from __future__ import annotations

import sys
from pathlib import Path

_UNIT = str(Path(__file__).resolve().parents[1])
if _UNIT not in sys.path:
    sys.path.append(_UNIT)
