"""Process settings of the host machine; does not import jax."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from racm3_jax import storage

_JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Of all compiled programs: the quickstart keeps 7 MB, a 2.7B training step 30 to 90 MB.
MAX_CACHE_BYTES = 2 * 2**30


def prepare_host() -> None:
    """Called at the start of every command, training and evaluation; idempotent."""
    keep_compiled_programs()
    keep_freed_memory()


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that restarts do not recompile.

    It is in `~/.cache/racm3/programs`, or in the folder RACM3_CACHE; RACM3_CACHE=off
    turns it off. A cache folder that JAX is configured with takes precedence. Beyond
    `MAX_CACHE_BYTES`, the programs that were not read for longest are removed. (JAX can
    do this, too, but a kill between its two files of an entry ends all later writes.)
    """
    if os.environ.get(_JAX_VARIABLE):
        return
    folder = storage.cache_directory("programs")
    if folder is None:
        return
    remove_oldest(folder, "*-cache", MAX_CACHE_BYTES)
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


def remove_oldest(folder: Path, pattern: str, max_bytes: int) -> list[str]:
    """Removes files until the others have at most `max_bytes`, least recently read first.

    Args:
      folder: of a cache: other processes may remove the same files.
      pattern: of the file names; others are kept, and not counted.
      max_bytes: of the files that stay.

    Returns:
      The names of the removed files.
    """
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # removed by another process
            status = path.stat()
            used = max(status.st_atime, status.st_mtime)
            found.append((used, status.st_size, path))
    excess = sum(size for _, size, _ in found) - max_bytes
    removed = []
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            removed.append(path.name)
        excess -= size
    return removed


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
