"""Process settings of the host machine; does not import jax."""

from __future__ import annotations

import os
import sys

from racm3_jax import storage

_JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def prepare_host() -> None:
    """Called at the start of every command, training and evaluation; idempotent."""
    keep_compiled_programs()
    keep_freed_memory()


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that restarts do not recompile.

    It is in `~/.cache/racm3/programs`, or in the folder RACM3_CACHE; RACM3_CACHE=off
    turns it off. A cache folder that JAX is configured with takes precedence.
    """
    if os.environ.get(_JAX_VARIABLE):
        return
    folder = storage.cache_directory("programs")
    if folder is None:
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    if "jax" not in sys.modules:  # it reads them when it is imported
        for name, value in settings.items():
            os.environ.setdefault(name.upper(), str(value))
        return
    import jax

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        for name, value in settings.items():
            jax.config.update(name, value)


def keep_freed_memory() -> None:
    """Tells glibc not to return large blocks to the kernel after every step.

    XLA on CPU allocates and frees its buffers in each call; fresh pages from the kernel
    took a seventh of a training step.
    """
    import ctypes

    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # from malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)
