"""Several processes, one training: joining, stopping together, noticing a stuck peer.

Every process runs the same command. Where SLURM, Open MPI, a TPU pod (gcloud's or GKE's)
or an indexed job of Kubernetes started them, JAX finds out by itself and a line at the
start says which it was; elsewhere three variables do:

    RACM3_COORDINATOR=host:port RACM3_NUM_PROCESSES=2 RACM3_PROCESS_ID=0 racm3 train ...

`RACM3_NUM_PROCESSES=1` by itself asks nobody.

A peer that dies or is stopped is noticed after RACM3_HEARTBEAT_SECONDS (100), one that
does not even start after RACM3_JOIN_SECONDS (300), and one that is alive but stuck by the
`Watchdog`; the process then ends with a status other than 0.
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

# The exit status of a process whose step did not end in time.
STUCK = 76
_PLAIN = ("RACM3_COORDINATOR", "RACM3_NUM_PROCESSES", "RACM3_PROCESS_ID")
# The first step compiles: it may take so many times the watchdog's seconds.
_FIRST_STEP = 4
# What JAX calls the environments that it knows, and what a reader does.
_NAMES = {
    "SlurmCluster": "SLURM",
    "OmpiCluster": "Open MPI",
    "GceTpuCluster": "a TPU pod (GCE)",
    "GkeTpuCluster": "a TPU pod (GKE)",
    "K8sCluster": "a Kubernetes job",
}
_NO_CLUSTER = "no cluster"
# Set in the pods of an indexed job: those that JAX can number.
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
    """Joins the other processes of this training, before anything else uses jax.

    Says how many there are and who started them: on stderr, or in the log for a process
    that nobody did. A second call does nothing.

    Args:
      environment: variables.
      clusters: that are asked whether they started this process; those that JAX knows
        by default.

    Returns:
      How many there are.

    Raises:
      ValueError: some of the three variables are set, but not all; a number of seconds
        that is none; or a pod of an indexed job without the package that finds the
        others.
    """
    heartbeat = _read_seconds(environment, "RACM3_HEARTBEAT_SECONDS", 100)
    limits = {
        "initialization_timeout": _read_seconds(environment, "RACM3_JOIN_SECONDS", 300),
        "heartbeat_timeout_seconds": heartbeat,
        # How long a process that ends waits for peers, which may be dead.
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
    """What `jax.distributed.initialize` asks, in its order; it has no public list."""
    from jax._src.clusters import ClusterEnv

    return [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]


def _find_cluster(
    environment: Mapping[str, str], clusters: Sequence[Cluster]
) -> Cluster | None:
    is_indexed = _KUBERNETES_INDEX in environment
    for cluster in clusters:
        if cluster.__name__ == "K8sCluster" and not is_indexed:
            continue  # a pod by itself, which has no peers to ask for
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said in a sentence below
            if cluster.is_env_present():
                return cluster
    if is_indexed and "KUBERNETES_SERVICE_HOST" in environment:
        raise ValueError(
            f"this is pod {environment[_KUBERNETES_INDEX]} of an indexed Kubernetes job, "
            'but the package that finds the others is missing: pip install "jax[k8s]", '
            f"or set {', '.join(_PLAIN)}, or RACM3_NUM_PROCESSES=1 for a training of its "
            "own"
        )
    return None


def _read_seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "") or str(default)
    if not (value.isdigit() and int(value)):
        raise ValueError(f"{name} is {value!r}: give whole seconds, 1 or more")
    return int(value)


def _initialise(**settings: object) -> None:
    # Collectives between CPU processes are off unless an implementation is named.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**settings)  # type: ignore[arg-type]


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class StopRequest:
    """SIGTERM and Ctrl-C end a training after a step, in all processes after the same.

    A spot machine has seconds: with several processes, the notice of one reaches the
    others through `jax.distributed` within the next steps, which agree on where to stop.
    A second Ctrl-C acts as usual.

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
            # With several, SIGTERM has a handler already: that of jax.distributed.
            numbers = [signal.SIGINT, *([signal.SIGTERM] if self._alone else [])]
            for number in numbers:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop before this step; every process asks before each of its steps."""
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
        elif jax.process_count() > 1:
            culprits = "what its peers do is not known, for want of a folder they share"
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
