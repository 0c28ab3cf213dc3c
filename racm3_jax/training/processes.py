"""Several processes, one training: joining, taking turns, noticing a stuck peer.

Every process runs the same command. Where SLURM, a TPU pod, MPI or Kubernetes started
them, `jax.distributed` finds out by itself; elsewhere three variables say it:

    RACM3_COORDINATOR=host:port RACM3_NUM_PROCESSES=2 RACM3_PROCESS_ID=0 racm3 train ...
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

# The exit status of a process whose step did not end in time.
STUCK = 76
_PLAIN = ("RACM3_COORDINATOR", "RACM3_NUM_PROCESSES", "RACM3_PROCESS_ID")
# Each of them is set by a launcher that `jax.distributed` knows.
_LAUNCHERS = {
    "SLURM_NTASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "TPU_WORKER_HOSTNAMES": "a TPU pod",
}


def join_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Joins the other processes of this training, before anything else uses jax.

    Returns:
      How many there are.

    Raises:
      ValueError: some of the three variables are set, but not all.
    """
    given = [name for name in _PLAIN if environment.get(name)]
    if given and len(given) < len(_PLAIN):
        missing = next(name for name in _PLAIN if name not in given)
        raise ValueError(f"{given[0]} is set but {missing} is not: set all of {_PLAIN}")
    if given:
        coordinator, number, own = (environment[name] for name in _PLAIN)
        _initialise(
            coordinator_address=coordinator,
            num_processes=int(number),
            process_id=int(own),
        )
    elif any(_is_several(environment.get(name, "")) for name in _LAUNCHERS):
        _initialise()
    return jax.process_count()


def _is_several(value: str) -> bool:
    """ "4" processes, or a list of several host names."""
    return int(value) > 1 if value.isdigit() else "," in value


def _initialise(**settings: object) -> None:
    # Collectives between CPU processes are off unless an implementation is named.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**settings)  # type: ignore[arg-type]


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """Process 0 runs the block, then all others do, who find what it made."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("leader first")
    try:
        yield
    finally:
        if jax.process_index() == 0:
            multihost_utils.sync_global_devices("leader first")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in some process; every process must ask."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def fetch_all(tree: Any) -> Any:
    """Arrays on the mesh as NumPy arrays, whole, in every process; all must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


class Watchdog:
    """Ends the process when no step ended for too long.

    A dead peer is noticed by the heartbeat of `jax.distributed`; one that is stopped or
    stuck is not: its collectives wait for ever. A stuck process says where it stands.

    Args:
      seconds: without `pat` after which the process ends; 0 never ends it.
      end: called with the exit status instead of ending the process (for tests).
    """

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit) -> None:
        self._seconds = seconds
        self._end = end
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def pat(self) -> None:
        """A step has ended."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                print(
                    f"racm3: process {jax.process_index()} of {jax.process_count()} has "
                    f"not ended a step for {silent:.0f} s (config.train."
                    f"watchdog_seconds={self._seconds:g}): a peer is dead or stuck; "
                    "this process ends, and the same command resumes",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._end(STUCK)
                return
