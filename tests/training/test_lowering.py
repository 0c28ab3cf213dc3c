"""The paper's model, compiled for 8 and 64 devices that are not there: a stored file."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "training"


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", ["8", "64"])
def test_memory_and_collectives_are_those_of_the_stored_file(num_devices):
    """Bytes within 3%: XLA's own buffers differ a little from version to version."""
    stored = json.loads((GOLDEN / "lowering_2b7.json").read_text())[num_devices]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": num_devices}
    done = subprocess.run(
        [sys.executable, GOLDEN / "lower_2b7.py", num_devices],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.pop("collectives") == stored.pop("collectives")
    for name, size in stored.items():
        assert found[name] == pytest.approx(size, rel=0.03), name
