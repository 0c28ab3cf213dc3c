"""What every test runs on: eight fake CPU devices, set before jax starts."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of the suite's time is compilation of programs that then run for milliseconds.
# Without the fusion emitters the large ones compile in half the time; newer versions
# have no flag for them (0.12), and XLA ends a process that names an unknown one.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if JAXLIB < (0, 11):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
# What was compiled is kept: a second run takes a third of the time of the first.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# Its fixture is for every test that needs a bucket.
pytest_plugins = ["fake_bucket"]

# No caches outside of the repository.
os.environ.setdefault(
    "RACM3_CACHE", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "racm3")
)

# After these settings: it imports jax.
from joined_processes import four_hosts, reading  # noqa: F401
