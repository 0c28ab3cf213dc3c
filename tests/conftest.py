"""What every test runs on: eight fake CPU devices, set before jax starts."""

from __future__ import annotations

import gc
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
# In one part instead of up to 32, a program compiles with a third less work.
if JAXLIB < (0, 11):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
    XLA_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
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

# The tests' products are small: a second thread of NumPy's waits in a loop for its part,
# and keeps a core from the other worker (20 times the time, in flagworld's).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tracing makes many objects that live for long: searching them for garbage every 700
# took up to a third of its time.
gc.set_threshold(50_000, 20, 20)

# No caches outside of the repository.
os.environ.setdefault(
    "RACM3_CACHE", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "racm3")
)

# After these settings: it imports jax.
from joined_processes import four_hosts, reading  # noqa: F401


def pytest_collection_finish():
    """What was imported is not searched for garbage again."""
    gc.collect()
    gc.freeze()
