"""The sides of a comparison: each in its own process, in turns, on an idle machine.

    parent   {"call": 1} ->                     {"call": 1} ->
    ours                    0.42 s                            waits
    torch                   waits                             0.47 s

Threads that spin, memory that an allocator keeps and settings of the process belong to
one side alone. All have the same cores. OpenMP slows down many times on a busy machine,
which flatters the other side, so the load is checked first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Load average of the last minute above which comparisons are refused.
MOST_LOAD = 0.5


def add_busy_flag(parser: argparse.ArgumentParser) -> None:
    """`--busy`, which `check_load` reads."""
    parser.add_argument("--busy", action="store_true", help="ignore the load")


def check_load(parser: argparse.ArgumentParser, busy: bool) -> float:
    """The load average; ends the program if it is too high and not `busy`."""
    load = os.getloadavg()[0]
    if not busy and load > MOST_LOAD:
        parser.error(
            f"the load is {load:.1f}, but measurements need an idle machine (at most "
            f"{MOST_LOAD}): wait, or give --busy"
        )
    return load


class Side:
    """One side, in its own process.

    Args:
      name: as in the results.
      command: arguments of Python; the program calls `serve`.
      cores: of this process; as many threads of OpenMP, MKL and XLA.
    """

    def __init__(self, name: str, command: Sequence[str], cores: Sequence[int]) -> None:
        threads = str(len(cores))
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Before it imports XLA, which makes as many threads as it may use cores.
        os.sched_setaffinity(self._process.pid, cores)

    def ask(self, request: Any) -> Any:
        """The answer of the process.

        Raises:
          SystemExit: it ended.
        """
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None and pipes[1] is not None
        pipes[0].write(json.dumps(request) + "\n")
        pipes[0].flush()
        answer = pipes[1].readline()
        if not answer:
            raise SystemExit(f"{self.name} ended: see what it printed above")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def write_json(path: Path, content: Any) -> None:
    """Atomically."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def serve(answer: Callable[[Any], Any]) -> None:
    """The process of a side: an answer for each request, until the parent closes it."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def ask_in_turns(
    sides: Sequence[Side], request: Any, repeats: int
) -> dict[str, list[Any]]:
    """Each side's answers, one after another; shows progress."""
    answers: dict[str, list[Any]] = {side.name: [] for side in sides}
    for turn in range(repeats):
        for side in sides:
            answer = side.ask(request)
            answers[side.name].append(answer)
            progress = f"{side.name}, {turn + 1} of {repeats}: {answer}"
            print(progress, file=sys.stderr, flush=True)
    return answers


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and fastest of each side, and how much slower than the first one."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = {name: min(values) for name, values in seconds.items()}
    own = next(iter(medians))
    others = [name for name in medians if name != own]
    return {
        "median_seconds": medians,
        "fastest_seconds": fastest,
        "ours_is_faster": {name: medians[name] / medians[own] for name in others},
        "ours_is_faster_by_fastest": {
            name: fastest[name] / fastest[own] for name in others
        },
    }
