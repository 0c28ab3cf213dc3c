"""Puts the folder of the experiments on the path, as for `experiments/run_all.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
