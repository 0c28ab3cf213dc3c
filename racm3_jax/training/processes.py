"""Multi-process training: joining, stopping together, detecting stuck peers.

Every process runs the same command. JAX detects SLURM, Open MPI, TPU pods (gcloud and
GKE) and indexed Kubernetes jobs, and a line at the start says which one; elsewhere, set
three variables:

    RACM3_COORDINATOR=host:port RACM3_NUM_PROCESSES=2 RACM3_PROCESS_ID=0 racm3 train ...

`RACM3_NUM_PROCESSES=1` alone turns detection off.

A peer that dies or is stopped is detected after RACM3_HEARTBEAT_SECONDS (100), one that
never starts after RACM3_JOIN_SECONDS (300), and one that is alive but stuck by the
`Watchdog`; the process then exits with a non-zero status.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax
from absl import logging

# Exit status of a process whose step timed out.
STUCK = 76
_PLAIN = ("RACM3_COORDINATOR", "RACM3_NUM_PROCESSES", "RACM3_PROCESS_ID")
# The first step compiles: its timeout is this many times longer.
_FIRST_STEP = 4
# JAX's class names of the environments that it detects, and readable names.
_NAMES = {
    "SlurmCluster": "SLURM",
    "OmpiCluster": "Open MPI",
    "GceTpuCluster": "a TPU pod (GCE)",
    "GkeTpuCluster": "a TPU pod (GKE)",
    "K8sCluster": "a Kubernetes job",
}
_NO_CLUSTER = "no cluster"
# Set in the pods of an indexed job, which JAX can number.
_KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"


class Cluster(Protocol):
    """An environment that starts processes; `jax._src.clusters.ClusterEnv` is one."""

    __name__: str

    def is_env_present(self) -> bool: ...

    def get_process_count(self) -> int: ...


def join_processes(
    environment: Mapping[str, str] = os.environ,
    clusters: Sequence[Cluster] | None = None,
) -> int:
    """Joins the other processes of this training, before any other use of jax.

    Reports their number and the launcher: on stderr, or in the log if there is no
    launcher. A second call does nothing.

    Args:
      environment: environment variables.
      clusters: launchers to detect; all that JAX knows by default.

    Returns:
      The number of processes.

    Raises:
      ValueError: some of the three variables are set, but not all; an invalid number of
        seconds; or a pod of an indexed job without the package that finds its peers.
    """
    heartbeat = _read_seconds(environment, "RACM3_HEARTBEAT_SECONDS", 100)
    limits = {
        "initialization_timeout": _read_seconds(environment, "RACM3_JOIN_SECONDS", 300),
        "heartbeat_timeout_seconds": heartbeat,
        # How long an exiting process waits for its peers, which may be dead.
        "shutdown_timeout_seconds": heartbeat,
    }
    if jax.distributed.is_initialized():
        return jax.process_count()
    given = [name for name in _PLAIN if environment.get(name)]
    if given == ["RACM3_NUM_PROCESSES"] and environment["RACM3_NUM_PROCESSES"] == "1":
        starter = "RACM3_NUM_PROCESSES"
    elif given and len(given) < len(_PLAIN):
        missing = next(name for name in _PLAIN if name not in given)
        raise ValueError(f"{given[0]} is set but {missing} is not: set all of {_PLAIN}")
    elif given:
        starter = "RACM3_COORDINATOR"
        coordinator, number, own = (environment[name] for name in _PLAIN)
        _initialise(
            coordinator_address=coordinator,
            num_processes=int(number),
            process_id=int(own),
            **limits,
        )
    else:
        found = _find_cluster(
            environment, _list_clusters() if clusters is None else clusters
        )
        starter = _NAMES.get(found.__name__, found.__name__) if found else _NO_CLUSTER
        if found is not None and found.get_process_count() > 1:
            _initialise(**limits)
    words = f"process {jax.process_index()} of {jax.process_count()} ({starter})"
    if starter == _NO_CLUSTER:
        logging.info("%s", words)
    else:
        print(f"racm3: {words}", file=sys.stderr)
    return jax.process_count()


def _list_clusters() -> Sequence[Cluster]:
    """The clusters that `jax.distributed.initialize` tries, in order; no public API."""
    from jax._src.clusters import ClusterEnv

    return [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]


def _find_cluster(
    environment: Mapping[str, str], clusters: Sequence[Cluster]
) -> Cluster | None:
    is_indexed = _KUBERNETES_INDEX in environment
    for cluster in clusters:
        if cluster.__name__ == "K8sCluster" and not is_indexed:
            continue  # a single pod, which has no peers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it
            if cluster.is_env_present():
                return cluster
    if is_indexed and "KUBERNETES_SERVICE_HOST" in environment:
        raise ValueError(
            f"this is pod {environment[_KUBERNETES_INDEX]} of an indexed Kubernetes job, "
            'but the package that finds its peers is missing: pip install "jax[k8s]", '
            f"or set {', '.join(_PLAIN)}, or RACM3_NUM_PROCESSES=1 for a training of its "
            "own"
        )
    return None


def _read_seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "") or str(default)
    if not (value.isdigit() and int(value)):
        raise ValueError(f"{name} is {value!r}: give an integer number of seconds >= 1")
    return int(value)


def _initialise(**settings: object) -> None:
    # Collectives between CPU processes are off unless an implementation is named.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**settings)  # type: ignore[arg-type]


def wait_for_all(name: str) -> None:
    """A barrier: returns when every process has reached it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class StopRequest:
    """SIGTERM and Ctrl-C stop the training after a step, the same in all processes.

    Spot machines have only seconds: the signal of one process reaches the others via
    `jax.distributed` within a few steps, and they agree on where to stop. A second
    Ctrl-C interrupts as usual.

    ```
    with StopRequest() as stop:
        while step < num_steps and not stop.reached(step):
            ...
    ```
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._event = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # With several processes, jax.distributed already handles SIGTERM.
            numbers = [signal.SIGINT, *([signal.SIGTERM] if self._alone else [])]
            for number in numbers:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop before this step; all processes call it before every step."""
        if self._alone:
            return self._event.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _request(self, signum: int, frame: object) -> None:
        self._event.set()
        self._restore()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def fetch_all(tree: Any) -> Any:
    """Full NumPy copies of arrays on the mesh, in every process; a collective call."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


class ProcessHeartbeats:
    """One small file per process, rewritten every second: who is alive, and doing what.

        processes/0    "41 computes step 12"        the first number counts up
        processes/1    "38 reads the batch of step 13"

    Args:
      directory: shared by all processes; created if missing.
      index: of this process.
      count: how many processes there are.
    """

    def __init__(self, directory: Path, index: int, count: int) -> None:
        self._directory = directory
        self._index = index
        self._count = count
        self._num_beats = 0

    def beat(self, activity: str) -> None:
        """Called by each process about once a second."""
        self._num_beats += 1
        with contextlib.suppress(OSError):  # a full disk must not stop the watchdog
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / str(self._index)).write_text(
                f"{self._num_beats} {activity}"
            )

    def find_stalled(self, seconds: float, activity: str) -> str:
        """Waits, then names the processes that are silent or lag behind; "" if none.

        Args:
          seconds: to wait; longer than the interval between two heartbeats.
          activity: of this process; a process with another one lags behind.
        """
        before = self._read()
        time.sleep(seconds)
        after = self._read()
        others = [i for i in range(self._count) if i != self._index]
        silent = [i for i in others if after[i] == before[i]]
        if silent:
            last = "; ".join(f"last heartbeat: {after[i][1] or 'none'}" for i in silent)
            return f"process {_join(silent)} is not responding ({last})"
        lagging = [i for i in others if after[i][1] != activity]
        return "; ".join(f"process {i} {after[i][1]}" for i in lagging)

    def _read(self) -> list[tuple[str, str]]:
        beats = []
        for index in range(self._count):
            try:
                text = (self._directory / str(index)).read_text()
            except OSError:
                text = ""
            number, _, activity = text.partition(" ")
            beats.append((number, activity))
        return beats


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


class Watchdog:
    """Ends the process when no step has finished for too long.

    The heartbeat of `jax.distributed` notices a dead peer, but not one that is stuck:
    its collectives wait forever. A stuck process prints its stack, and names the peers
    that are silent or lag behind.

    Args:
      seconds: timeout between two calls of `heartbeat`, four times as long before the
        first one, because the first step compiles; 0 turns it off.
      end: called with the exit status instead of ending the process (for tests).
      heartbeats: of all processes, when there are several.

    Attributes:
      activity: what the process is doing now, shown to its peers; set it freely.
    """

    def __init__(
        self,
        seconds: float,
        end: Callable[[int], object] = os._exit,
        heartbeats: ProcessHeartbeats | None = None,
    ) -> None:
        self.activity = "starts"
        self._seconds = seconds
        self._end = end
        self._heartbeats = heartbeats
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

    def heartbeat(self) -> None:
        """Tells the watchdog that a step has finished."""
        self._last = time.monotonic()
        self._limit = self._seconds

    def _watch(self) -> None:
        while not self._closed.wait(self._pause):
            if self._heartbeats is not None:
                self._heartbeats.beat(self.activity)
            silent = time.monotonic() - self._last
            if silent > self._limit:
                self._report(silent)
                self._end(STUCK)
                return

    def _report(self, silent: float) -> None:
        stalled = ""
        if self._heartbeats is not None:
            stalled = self._heartbeats.find_stalled(3 * self._pause, self.activity)
        elif jax.process_count() > 1:
            stalled = "the state of its peers is unknown (no shared folder)"
        print(
            f"racm3: process {jax.process_index()} of {jax.process_count()} has "
            f"not finished a step for {silent:.0f} s (config.train."
            f"watchdog_seconds={self._seconds:g}); it {self.activity}, and "
            f"{stalled or 'all its peers respond'}; "
            "this process exits, and the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
