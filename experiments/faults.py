"""Fault injection in trainings: kills, stuck peers, NaN, corruption, full disks.

    python experiments/faults.py --out=faults --kills=30 --corruptions=48 --full_disks=10

Two processes on this machine train together (experiments/fault_worker.py). Writes
`results.json` and prints a table with the expected value of every result; the exit
status is 1 if one is not met. For every guard there is a line "without ...", where the
guard is disabled and the fault must show: otherwise the check above it would be
meaningless. Takes fifteen minutes on 2 idle cores; on a busy machine the watchdog may
fire, and needs a larger --patience. Shorter: --kills=5 --peers=0 --nans=4 --patience=5.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_faults
from fault_pair import (
    GRACE,
    HEARTBEAT,
    IMPORTS,
    JOIN,
    METRICS,
    PATIENCE,
    SAVE_EVERY,
    WATCHDOG,
    Pair,
    PairEnded,
    read_lines,
    read_losses,
)
from fault_table import format_table, judge_all


def run_whole(workdir: Path, flags: list[str]) -> dict[int, float]:
    with Pair(workdir, flags) as pair:
        for number in range(2):
            status, _ = pair.wait(number, PATIENCE)
            if status != 0:
                raise RuntimeError(
                    f"exit status {status}: {pair.errors(number)[-800:]}"
                )
    return dict(read_losses(workdir))


def kill_once(
    workdir: Path, flags: list[str], last: int, rng: random.Random, patience: float
) -> dict[str, Any]:
    """One start of the pair, and a kill -9 of one of them at a random moment."""
    victim = rng.randrange(2)
    starting = rng.random() < 0.15
    starts = len(read_lines(workdir / "starts.jsonl"))
    lines = len(read_lines(workdir / METRICS))
    with Pair(workdir, flags) as pair:
        if starting:
            deadline = time.monotonic() + rng.uniform(0, 15)
            while time.monotonic() < deadline:
                if len(read_lines(workdir / "starts.jsonl")) > starts:
                    break  # a fast machine: it has started
                time.sleep(0.01)
        else:
            pair.wait_for_lines("starts.jsonl", starts + 1)
            start = read_lines(workdir / "starts.jsonl")[-1]["step"]
            # Past the next two saves at most, and before the end.
            steps = min(rng.randrange(2 * SAVE_EVERY + 3), last - start)
            pair.wait_for_lines(METRICS, lines + steps)
            time.sleep(rng.uniform(0, 0.05))
        pair.processes[victim].kill()
        pair.processes[victim].wait()
        limit = (IMPORTS + JOIN if starting else max(HEARTBEAT, WATCHDOG)) + GRACE
        status, seconds = pair.wait(1 - victim, limit * patience)
        time.sleep(0.2)
        reached = read_losses(workdir)[-1][0] if (workdir / METRICS).exists() else 0
        return {
            "victim": victim,
            "while_starting": starting,
            "reached": reached,
            "survivor_status": status,
            "survivor_seconds": seconds,
            "orphans": pair.count_orphans(),
        }


def steps_lost(steps: list[int]) -> int:
    """Maximum number of repeated steps: for the lines 1 2 3 4 3 4 5, two.

    Steps after the last written line are lost as well; at most one, as every step waits
    for its line.
    """
    pairs = itertools.pairwise(steps)
    return max((before + 1 - after for before, after in pairs), default=0) + 1


def run_kills(folder: Path, count: int, seed: int, patience: float) -> dict[str, Any]:
    """`count` kills, then an undisturbed end; compared with a run without kills."""
    rng = random.Random(seed)
    num_steps = 5 * count + 2 * SAVE_EVERY
    flags = [
        f"--num_steps={num_steps}",
        f"--save_every={SAVE_EVERY}",
        f"--watchdog_seconds={WATCHDOG}",
    ]
    whole = run_whole(folder / "unbroken", flags)
    workdir = folder / "killed"
    kills = []
    ended_by_themselves = 0
    while len(kills) < count:
        try:
            kills.append(kill_once(workdir, flags, num_steps - 2, rng, patience))
        except PairEnded as error:
            # A machine so busy that the watchdog fires: as good a fault as a kill.
            ended_by_themselves += 1
            if ended_by_themselves > count:
                raise
            print(f"before a kill: {error}", file=sys.stderr, flush=True)
            continue
        print(f"kill {len(kills)}: {kills[-1]}", file=sys.stderr, flush=True)
    run_whole(workdir, flags)
    losses = read_losses(workdir)
    lost = steps_lost([step for step, _ in losses])
    seconds = {
        starting: [
            kill["survivor_seconds"]
            for kill in kills
            if kill["while_starting"] == starting
        ]
        for starting in (False, True)
    }
    return {
        "kills": count,
        "ended_by_themselves": ended_by_themselves,
        "steps_run": len(losses),
        "steps_of_the_training": num_steps,
        "mismatches": sum(loss != whole[step] for step, loss in losses),
        "steps_missing": len(set(whole) - {step for step, _ in losses}),
        "most_steps_lost": lost,
        "most_save_intervals_lost": lost / SAVE_EVERY,
        "survivors_out": sum(k["survivor_status"] not in (None, 0) for k in kills),
        "slowest_survivor_seconds": max(seconds[False], default=0.0),
        "slowest_survivor_of_a_start_seconds": max(seconds[True], default=0.0),
        "orphans": sum(kill["orphans"] for kill in kills),
        "each": kills,
    }


def run_without_position(folder: Path) -> dict[str, Any]:
    """Resumes, but reads the data from the start: the loss curve must show it."""
    flags = ["--num_steps=12", f"--save_every={SAVE_EVERY}"]
    whole = run_whole(folder / "unbroken", flags)
    workdir = folder / "killed"
    with Pair(workdir, flags) as pair:
        pair.wait_for_lines(METRICS, SAVE_EVERY + 2)
        pair.processes[1].kill()
        pair.wait(0, PATIENCE)
    run_whole(workdir, [*flags, "--without=position"])
    losses = read_losses(workdir)
    return {"mismatches": sum(loss != whole[step] for step, loss in losses)}


def run_peer(folder: Path, fault: str, guarded: bool) -> dict[str, Any]:
    """A peer that is stopped (SIGSTOP) or stuck (sleeps in its data pipeline)."""
    flags = ["--num_steps=10000", "--save_every=5"]
    if guarded:
        flags.append(f"--watchdog_seconds={WATCHDOG}")
    if fault == "stuck":
        flags.append("--stuck_step=12")
    # Here the watchdog should detect a stopped peer; the heartbeat would be faster.
    slow = fault == "stopped" or not guarded
    limit = WATCHDOG + GRACE
    with Pair(folder, flags, heartbeat=600 if slow else HEARTBEAT) as pair:
        pair.wait_for_lines(METRICS, 8 if fault == "stopped" else 12)
        if fault == "stopped":
            os.kill(pair.processes[1].pid, signal.SIGSTOP)
        status, seconds = pair.wait(0, limit)
        if fault == "stopped":
            os.kill(pair.processes[1].pid, signal.SIGCONT)
        other, _ = pair.wait(1, limit) if guarded else (None, 0.0)
        return {
            "survivor_status": status,
            "survivor_seconds": seconds,
            "other_status": other,
            "named": "process 1 " in pair.errors(0).partition("not finished a step")[2],
            "orphans": pair.count_orphans(),
        }


def run_terminated(folder: Path) -> dict[str, Any]:
    """SIGTERM to both: they save, exit cleanly, and the same command resumes."""
    flags = ["--num_steps=24", "--save_every=1000"]
    with Pair(folder, flags) as pair:
        pair.wait_for_lines(METRICS, 6)
        for process in pair.processes:
            process.terminate()
        statuses = [pair.wait(number, PATIENCE)[0] for number in range(2)]
    reached = read_losses(folder)[-1][0]
    run_whole(folder, flags)
    resumed = read_lines(folder / "starts.jsonl")[-1]["step"]
    return {"statuses": statuses, "steps_lost": reached - resumed}


def run_nans(folder: Path, count: int, seed: int, guarded: bool) -> dict[str, Any]:
    """Non-finite weights, only in the rows of one process."""
    num_steps = 3 * count
    steps = sorted(random.Random(seed).sample(range(num_steps), count))
    # At most three in a row: more would end the training.
    steps = [step for i, step in enumerate(steps) if i < 3 or steps[i - 3] != step - 3]
    flags = [
        f"--num_steps={num_steps}",
        "--nan_steps=" + ",".join(map(str, steps)),
        "--step_seconds=0",
        *([] if guarded else ["--without=skip"]),
    ]
    with Pair(folder, flags) as pair:
        statuses = [pair.wait(number, PATIENCE)[0] for number in range(2)]
    skips = [line for n in range(2) for line in read_lines(folder / f"skips.{n}.jsonl")]
    return {
        "injected": len(steps),
        "statuses": statuses,
        "states_compared": len(skips),
        "states_changed": sum(not line["same"] for line in skips),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--peers", type=int, default=1, help="0 skips them")
    parser.add_argument("--nans", type=int, default=20)
    parser.add_argument("--corruptions", type=int, default=48)
    parser.add_argument("--full_disks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="factor of the time limits after a kill",
    )
    arguments = parser.parse_args()
    out = Path(arguments.out).absolute()
    out.mkdir(parents=True)
    seed = arguments.seed
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {}
    if count := arguments.corruptions:
        parts["corruptions"] = lambda p: checkpoint_faults.run_corruptions(
            p, count, seed
        )
    if number := arguments.full_disks:
        parts["full_disks"] = lambda p: checkpoint_faults.run_full_disks(
            p, number, seed
        )
    if nans := arguments.nans:
        parts["nans"] = lambda p: run_nans(p, nans, seed, True)
        parts["nans_without_skip"] = lambda p: run_nans(p, nans, seed, False)
    if arguments.peers:
        for fault in ("stopped", "stuck"):
            parts[fault] = lambda p, f=fault: run_peer(p, f, True)
            parts[f"{fault}_without_watchdog"] = lambda p, f=fault: run_peer(
                p, f, False
            )
        parts["terminated"] = run_terminated
    if kills := arguments.kills:
        parts["kills"] = lambda p: run_kills(p, kills, seed, arguments.patience)
        parts["without_position"] = run_without_position
    results: dict[str, Any] = {}
    for name, part in parts.items():
        start = time.monotonic()
        results[name] = part(out / name)
        results[name]["seconds"] = round(time.monotonic() - start, 1)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(f"{name}: {results[name]['seconds']} s", file=sys.stderr, flush=True)
    rows = judge_all(results, arguments.patience)
    print(format_table(rows))
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
