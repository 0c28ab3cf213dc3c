"""Benchmark: recall and speed of the memory's index, vs. flat search and FAISS.

    python experiments/bench_memory.py --num_rows=300000 --out=bench_memory

Clustered vectors (random ones are not meaningful for recall), and two kinds of queries,
like text and image queries: near the rows, and shifted from them by a common offset.

    ours        the index that a memory of this size has by default, as it is tuned
    ScaNN       as a memory with --index=scann has it
    flat        exact search, block by block, in NumPy
    FAISS       by its own classes, the fastest of its kinds at its best setting: IVF with
                4-bit product codes of 2, 3 or 4 dimensions, rescored; IVF with 8 bits;
                HNSW of float32 and of half precision; flat

Each side is a process of its own on the same cores; FAISS is measured if installed. A
sweep of every side's settings finds its fastest one at `--recall_target`, or at the
highest recall that both reach; those are then measured in turns, `--repeats` times:
queries/s in one batch, and the median latency of single queries. The load is checked
first. Writes `results.json` and `sweep.png`; results/bench_memory.json is a copy of the
former, and `python experiments/speed_table.py` makes the table of results/README.md from
it. An interrupted run keeps finished indexes and sweeps in --out, and the same command
reuses them: --only_build makes the indexes on a busy machine. Tiny form:
--num_rows=4000 --d_embed=32 --num_queries=64 --busy.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_searchers import BLOCK, Faiss, Flat, K, Ours, Searcher
from bench_sides import Side, add_busy_flag, check_load, serve, write_json
from speed_table import format_table

from racm3_jax.index import registry, streaming

SIDES = ("ours", "ScaNN", "flat", "FAISS")
# Indexes of this package, by side.
KINDS = {"ours": "auto", "ScaNN": "scann"}
NUM_SINGLES = 200
# Exact search needs seconds per hundred queries.
NUM_FLAT = 100


def make_vectors(
    num_rows: int, d_embed: int, num_queries: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Unit rows in clusters, and queries of both kinds.

    The variance decreases with the dimension, like that of trained embeddings along
    their principal axes: clusters overlap, and the distances between rows vary.
    """
    rng = np.random.default_rng(0)
    scales = (1 + np.arange(d_embed, dtype=np.float32)) ** -0.5
    shape = (max(16, num_rows // 200), d_embed)
    centres = scales * rng.standard_normal(shape, np.float32)

    def near(number: int) -> np.ndarray:
        noise = 1.4 * scales * rng.standard_normal((number, d_embed), np.float32)
        return _unit(centres[rng.integers(len(centres), size=number)] + noise)

    rows = np.empty((num_rows, d_embed), np.float32)
    for start in range(0, num_rows, BLOCK):
        stop = min(num_rows, start + BLOCK)
        rows[start:stop] = near(stop - start)
    image, text = near(num_queries), near(num_queries)
    text += 0.5 * _unit(rng.standard_normal(d_embed, np.float32))
    return rows, {"image": image, "text": _unit(text)}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def run_side(name: str, folder: Path, threads: int, target: float) -> None:
    """The process of a side: sweeps, or measures one setting."""
    rows = np.load(folder / "rows.npy", mmap_mode=None if name == "FAISS" else "r")
    queries = dict(np.load(folder / "queries.npz"))
    expected = dict(np.load(folder / "expected.npz"))
    side: Searcher
    if name in KINDS:
        side = Ours(KINDS[name], folder, np.asarray(rows), threads, target)
    elif name == "flat":
        side = Flat(np.asarray(rows))
        queries = {kind: some[:NUM_FLAT] for kind, some in queries.items()}
    else:
        side = Faiss(folder, rows, threads)

    def sweep_settings() -> Iterator[dict[str, Any]]:
        for settings in side.settings():
            search = side.prepare(settings)
            # Twice, so that a side's best setting is not one of luck.
            point = measure(search, queries, expected, singles=20)
            again = measure(search, queries, expected, singles=20)
            point["qps"] = max(point["qps"], again["qps"])
            point["p50_ms"] = min(point["p50_ms"], again["p50_ms"])
            yield {"settings": settings} | point
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        yield {"facts": side.facts, "peak_gb": peak}

    @functools.cache
    def build_once() -> None:
        for index in side.build():
            show(name, f"{index} is ready")

    answers = sweep_settings()

    def answer(request: dict[str, Any]) -> Any:
        # Not before the first request: another side may be measured.
        build_once()
        if request.get("only") == "build":
            return side.facts
        if "settings" in request:
            search = side.prepare(request["settings"])
            return measure(search, queries, expected)
        return next(answers)

    serve(answer)


def build(side: Side) -> None:
    """Builds the indexes of a side, one side after another for the memory's sake."""
    show(side.name, side.ask({"only": "build"}))
    side.close()


def sweep_path(folder: Path, name: str) -> Path:
    """Of a side's finished sweep."""
    return folder / f"sweep_{name}.json"


def sweep(side: Side, folder: Path, load: float) -> dict[str, Any]:
    """All settings of a side, one by one, or its finished sweep in the folder."""
    path = sweep_path(folder, side.name)
    if path.exists():
        show(side.name, f"the sweep in {path} is reused")
        return json.loads(path.read_text())
    show(side.name, "sweep")
    points: list[dict[str, Any]] = []
    while "peak_gb" not in (found := side.ask({})):
        show(side.name, found)
        if "settings" in found:
            points.append(found)
    show(side.name, found)
    found = {"points": points, **found, "load_average": load}
    write_json(path, found)
    return found


def show(name: str, found: Any) -> None:
    """A line of progress."""
    print(f"{name}: {found}", file=sys.stderr, flush=True)


def measure(
    search: Callable[[np.ndarray], np.ndarray],
    queries: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    singles: int = NUM_SINGLES,
) -> dict[str, float]:
    """Recall of each kind, queries/s in one batch, p50 latency of single ones."""
    search(next(iter(queries.values()))[:1])
    result: dict[str, float] = {}
    taken = 0.0
    for name, rows in queries.items():
        start = time.perf_counter()
        found = search(rows)
        taken += time.perf_counter() - start
        hits = [
            len(set(a) & set(b))
            for a, b in zip(expected[name][: len(rows)], found, strict=True)
        ]
        result[f"recall_{name}"] = sum(hits) / (K * len(rows))
    result["qps"] = sum(len(rows) for rows in queries.values()) / taken
    seconds = []
    for query in next(iter(queries.values()))[:singles]:
        begin = time.perf_counter()
        search(query[None])
        seconds.append(time.perf_counter() - begin)
    result["p50_ms"] = 1000 * statistics.median(seconds)
    result["recall"] = min(v for n, v in result.items() if n.startswith("recall_"))
    return result


def fastest(
    points: Sequence[dict[str, Any]], target: float, by: str = "qps"
) -> dict[str, Any] | None:
    """The fastest setting that reaches the recall, in one batch or alone ("p50_ms")."""
    reached = [p for p in points if p["recall"] >= target]
    if not reached:
        return None
    if by == "p50_ms":
        return min(reached, key=lambda p: p["p50_ms"])
    return max(reached, key=lambda p: p["qps"])


def front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Pareto front of recall and speed, by recall."""
    kept: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: -p["recall"]):
        if not kept or point["qps"] > kept[-1]["qps"]:
            kept.append(point)
    return kept[::-1]


def compare(
    sides: dict[str, Side], sweeps: dict[str, Any], target: float, repeats: int
) -> dict[str, Any]:
    """The sides at their fastest settings of the same recall, in turns.

    The setting for one batch may differ from the one for single queries.
    """
    most = [max(p["recall"] for p in found["points"]) for found in sweeps.values()]
    common = min(target, *most)
    results: dict[str, Any] = {"common_recall": common}
    for by in ("qps", "p50_ms"):
        chosen = {
            name: fastest(found["points"], common, by) for name, found in sweeps.items()
        }
        values: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for turn in range(repeats):
            for name, side in sides.items():
                point = chosen[name]
                assert point is not None  # all reach `common`
                values[name].append(side.ask({"settings": point["settings"]}))
                show(f"{name}, {turn + 1} of {repeats}", values[name][-1])
        results[by] = {
            name: {
                "settings": (chosen[name] or {})["settings"],
                "median": statistics.median(v[by] for v in found),
                "best": (max if by == "qps" else min)(v[by] for v in found),
                "recall": found[0]["recall"],
            }
            for name, found in values.items()
        }
    ours = results["qps"]["ours"], results["p50_ms"]["ours"]
    results["times"] = {
        name: {
            "batched": ours[0]["median"] / results["qps"][name]["median"],
            "single": results["p50_ms"][name]["median"] / ours[1]["median"],
        }
        for name in sides
        if name != "ours"
    }
    return results


def plot(path: Path, sweeps: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, found in sweeps.items():
        points = front(found["points"])
        if len(points) == 1:
            style = {"color": "grey", "linestyle": ":"}
            axes.axhline(points[0]["qps"], label=name, **style)
            continue
        speeds = [p["qps"] for p in points]
        axes.plot([p["recall"] for p in points], speeds, marker="o", label=name)
    axes.set(xlabel=f"recall@{K} of the worse kind", ylabel="queries/s", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def check_folder(
    parser: argparse.ArgumentParser, folder: Path, parameters: dict[str, Any]
) -> None:
    """Makes a new folder, or ends the program unless an equal run was interrupted."""
    path = folder / "parameters.json"
    if not folder.exists():
        folder.mkdir(parents=True)
        write_json(path, parameters)
    elif not path.exists():
        parser.error(
            f"{folder} exists, and is not an interrupted run: give a new --out"
        )
    elif (known := json.loads(path.read_text())) != parameters:
        parser.error(f"{folder} is a run with {known}: give these, or a new --out")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench_memory"))
    parser.add_argument("--num_rows", type=int, default=300_000)
    parser.add_argument("--d_embed", type=int, default=768)
    parser.add_argument("--num_queries", type=int, default=1000, help="of each kind")
    parser.add_argument("--recall_target", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=2, help="cores of every side")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--side", choices=SIDES, help="internal: run as this side")
    parser.add_argument("--only_build", action="store_true", help="measure nothing yet")
    add_busy_flag(parser)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(
            arguments.side, arguments.out, arguments.threads, arguments.recall_target
        )
        return
    load = check_load(parser, arguments.busy or arguments.only_build)
    out = arguments.out
    names = ("num_rows", "d_embed", "num_queries", "recall_target", "threads")
    check_folder(parser, out, {name: vars(arguments)[name] for name in names})
    shapes = arguments.num_rows, arguments.d_embed, arguments.num_queries
    rows, queries = make_vectors(*shapes)
    np.save(out / "rows.npy", rows)
    np.savez(out / "queries.npz", **queries)
    expected = {name: streaming.find_exact(rows, q, K) for name, q in queries.items()}
    np.savez(out / "expected.npz", **expected)
    del rows
    names = [n for n in SIDES if n != "FAISS" or registry.is_installed("faiss")]
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    command = [__file__, f"--out={out}", f"--threads={arguments.threads}"]
    command.append(f"--recall_target={arguments.recall_target}")
    for name in names:
        build(Side(name, [*command, f"--side={name}"], cores))
    if arguments.only_build:
        return
    sides = {n: Side(n, [*command, f"--side={n}"], cores) for n in names}
    try:
        sweeps = {name: sweep(side, out, load) for name, side in sides.items()}
        found = compare(sides, sweeps, arguments.recall_target, arguments.repeats)
    finally:
        for side in sides.values():
            side.close()
    results = {
        "rows": arguments.num_rows,
        "d_embed": arguments.d_embed,
        "queries": 2 * arguments.num_queries,
        "threads": arguments.threads,
        "load_average": load,
        "repeats": arguments.repeats,
        "kind": sweeps["ours"]["facts"]["kind"],
        **found,
        "sweeps": sweeps,
    }
    write_json(out / "results.json", results)
    plot(out / "sweep.png", sweeps)
    for name in ("parameters.json", "rows.npy", "queries.npz", "expected.npz"):
        (out / name).unlink()
    for pattern in ("sweep_*.json", "index_*.json", "faiss_*"):
        for path in out.glob(pattern):
            path.unlink()
    for path in out.glob("index_*"):
        shutil.rmtree(path)
    print(format_table({"bench_memory": results}))


if __name__ == "__main__":
    main()
