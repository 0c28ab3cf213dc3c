"""Several processes, one training: joining, taking turns, noticing a stuck peer.

Every process runs the same command. Where SLURM, a TPU pod, MPI or Kubernetes started
them, `jax.distributed` finds out by itself; elsewhere three variables say it:

    RACM3_COORDINATOR=host:port RACM3_NUM_PROCESSES=2 RACM3_PROCESS_ID=0 racm3 train ...

A peer that dies or is stopped is noticed after RACM3_HEARTBEAT_SECONDS (100), one that
does not even start after RACM3_JOIN_SECONDS (300), and one that is alive but stuck by the
`Watchdog`; the process then ends with a status other than 0.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

# The exit status of a process whose step did not end in time.
STUCK = 76
_PLAIN = ("RACM3_COORDINATOR", "RACM3_NUM_PROCESSES", "RACM3_PROCESS_ID")
# The first step compiles: it may take so many times the watchdog's seconds.
_FIRST_STEP = 4
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
      ValueError: some of the three variables are set, but not all; or a number of
        seconds that is none.
    """
    heartbeat = _read_seconds(environment, "RACM3_HEARTBEAT_SECONDS", 100)
    limits = {
        "initialization_timeout": _read_seconds(environment, "RACM3_JOIN_SECONDS", 300),
        "heartbeat_timeout_seconds": heartbeat,
        # How long a process that ends waits for peers, which may be dead.
        "shutdown_timeout_seconds": heartbeat,
    }
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
            **limits,
        )
    elif any(_is_several(environment.get(name, "")) for name in _LAUNCHERS):
        _initialise(**limits)
    return jax.process_count()


def _read_seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "") or str(default)
    if not (value.isdigit() and int(value)):
        raise ValueError(f"{name} is {value!r}: give whole seconds, 1 or more")
    return int(value)


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


class SignsOfLife:
    """One small file a process, rewritten all the time: who is alive, and doing what.

        processes/0    "41 computes step 12"        the first number counts up
        processes/1    "38 reads the batch of step 13"

    Args:
      directory: that all processes see; made if missing.
      index: of this process.
      count: how many processes there are.
    """

    def __init__(self, directory: Path, index: int, count: int) -> None:
        self._directory = directory
        self._index = index
        self._count = count
        self._given = 0

    def give(self, doing: str) -> None:
        """Called by each process every second or so."""
        self._given += 1
        with contextlib.suppress(OSError):  # a full disk must not end the watch
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / str(self._index)).write_text(f"{self._given} {doing}")

    def find_culprits(self, seconds: float, doing: str) -> str:
        """Waits, then says which processes are silent, or late; "" if none is.

        Args:
          seconds: to wait; more than the pause between two signs.
          doing: what this process does; who does something else is late.
        """
        before = self._read()
        time.sleep(seconds)
        after = self._read()
        others = [i for i in range(self._count) if i != self._index]
        silent = [i for i in others if after[i] == before[i]]
        if silent:
            last = "; ".join(f"its last sign: {after[i][1] or 'none'}" for i in silent)
            return f"process {_join(silent)} gives no sign of life ({last})"
        late = [i for i in others if after[i][1] != doing]
        return "; ".join(f"process {i} {after[i][1]}" for i in late)

    def _read(self) -> list[tuple[str, str]]:
        signs = []
        for index in range(self._count):
            try:
                text = (self._directory / str(index)).read_text()
            except OSError:
                text = ""
            number, _, doing = text.partition(" ")
            signs.append((number, doing))
        return signs


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


class Watchdog:
    """Ends the process when no step ended for too long.

    A dead peer is noticed by the heartbeat of `jax.distributed`; one that is stuck is
    not: its collectives wait for ever. A stuck process says where it stands, and names
    the peers that are silent or late.

    Args:
      seconds: without `pat` after which the process ends, four times as many before
        the first one, as the first step compiles; 0 never ends it.
      end: called with the exit status instead of ending the process (for tests).
      signs: what the processes know of each other, when there are several.

    Attributes:
      doing: what the process is about, for its peers; set it freely.
    """

    def __init__(
        self,
        seconds: float,
        end: Callable[[int], object] = os._exit,
        signs: SignsOfLife | None = None,
    ) -> None:
        self.doing = "starts"
        self._seconds = seconds
        self._end = end
        self._signs = signs
        self._pause = min(1.0, seconds / 4)
        self._last = time.monotonic()
        self._limit = _FIRST_STEP * seconds
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
        self._limit = self._seconds

    def _watch(self) -> None:
        while not self._closed.wait(self._pause):
            if self._signs is not None:
                self._signs.give(self.doing)
            silent = time.monotonic() - self._last
            if silent > self._limit:
                self._report(silent)
                self._end(STUCK)
                return

    def _report(self, silent: float) -> None:
        culprits = ""
        if self._signs is not None:
            culprits = self._signs.find_culprits(3 * self._pause, self.doing)
        print(
            f"racm3: process {jax.process_index()} of {jax.process_count()} has "
            f"not ended a step for {silent:.0f} s (config.train."
            f"watchdog_seconds={self._seconds:g}); it {self.doing}, and "
            f"{culprits or 'no peer is silent or late'}; "
            "this process ends, and the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
