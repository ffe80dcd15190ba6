"""Makes the seeded workloads and this folder's own cases importable from the tests below this folder."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in Path(__file__).resolve().parents[:2]:
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))
