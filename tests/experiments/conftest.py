"""The folder of the experiments, as `python experiments/run_all.py` sees it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
