"""Benchmark: recall and speed of the memory's index, vs. flat search and FAISS.

    python experiments/bench_memory.py --num_rows=300000 --out=bench_memory

Clustered vectors (random ones are not meaningful for recall), and two kinds of queries,
like text and image queries: near the rows, and shifted from them by a common offset.

    ours        ScaNN as a memory builds and tunes it
    flat        exact search, block by block, in NumPy
    FAISS       the fastest of its kinds at its best setting: IVF with 4-bit product codes
                of 2, 3 or 4 dimensions, rescored; IVF with 8 bits; HNSW; flat

Each side is a process of its own on the same cores; FAISS is measured if installed. A
sweep of every side's settings finds its fastest one at `--recall_target`, or at the
highest recall that both reach; those are then measured in turns, `--repeats` times:
queries/s in one batch, and the median latency of single queries. The load is checked
first. Writes `results.json` and `sweep.png`. Tiny form: --num_rows=4000 --d_embed=32
--num_queries=64 --busy.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import itertools
import json
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench_sides import Side, add_busy_flag, ask_in_turns, check_load, serve

from racm3_jax.index import registry, streaming, tuning
from racm3_jax.index.scann import ScannIndex

K = 10
SIDES = ("ours", "flat", "FAISS")
SHARES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
# Rows that are rescored exactly.
REORDERED = (200, 800, 3200)
EF_SEARCH = (32, 64, 128, 256, 512)
BLOCK = 20_000
NUM_SINGLES = 200
# Exact search needs seconds per hundred queries.
NUM_FLAT = 100

Settings = dict[str, Any]


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


class Searcher(Protocol):
    """One side: its settings, and a search with one of them."""

    facts: dict[str, Any]

    def settings(self) -> Iterator[Settings]:
        """Those of the sweep; indexes are built on the way."""
        ...

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        """A function from queries to ids."""
        ...


class Ours:
    """ScaNN, built and tuned as by a memory; the queries of a batch in threads."""

    def __init__(self, folder: Path, rows: np.ndarray, threads: int, target: float):
        start = time.perf_counter()
        self.index = ScannIndex.build(rows, folder / "index")
        built = time.perf_counter() - start
        start = time.perf_counter()
        queries = dict(np.load(folder / "queries.npz"))
        tuned = tuning.tune(
            self.index, folder / "index", rows, queries, recall_target=target
        )
        self.threads = threads
        self.facts = {
            "build_seconds": built,
            "tune_seconds": time.perf_counter() - start,
            "tuned_recall": tuned,
        }

    def settings(self) -> Iterator[Settings]:
        yield dict(self.index.settings)
        leaves = self.index.settings.get("num_leaves")
        if not leaves:
            return
        for share, reordered in itertools.product(SHARES, REORDERED):
            searched = max(1, round(share * leaves))
            reordered = min(reordered, len(self.index))
            yield self.index.settings | {
                "num_searched": searched,
                "num_reordered": reordered,
            }

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        self.index.settings.update(settings)

        def search(queries: np.ndarray) -> np.ndarray:
            return self.index.search(queries, K).ids

        def in_threads(queries: np.ndarray) -> np.ndarray:
            if len(queries) < self.threads:
                return search(queries)
            with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
                blocks = np.array_split(queries, self.threads)
                return np.concatenate(list(pool.map(search, blocks)))

        return in_threads


class Flat:
    """Exact search, as of the expected results."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.facts = rows, {}

    def settings(self) -> Iterator[Settings]:
        yield {}

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        del settings
        return lambda queries: streaming.find_exact(self.rows, queries, K)


class Faiss:
    """FAISS's own classes, with its own threads; one index in memory at a time."""

    def __init__(self, rows: np.ndarray, threads: int):
        import faiss

        self.faiss, self.rows = faiss, rows
        faiss.omp_set_num_threads(threads)
        self.leaves = max(4, round(4 * len(rows) ** 0.5))
        self.facts: dict[str, Any] = {
            "version": importlib.metadata.version("faiss-cpu"),
            "build_seconds": {},
        }
        self._kind = ""
        self._index: Any = None

    def settings(self) -> Iterator[Settings]:
        dims = self.rows.shape[1]
        for per_code in (2, 3, 4):
            if dims % per_code:
                continue
            kind = f"IVF{self.leaves},PQ{dims // per_code}x4fs,RFlat"
            for share, reordered in itertools.product(SHARES, REORDERED):
                yield {"kind": kind} | self._probes(share) | {"reordered": reordered}
        for share in SHARES:
            yield {"kind": f"IVF{self.leaves},SQ8"} | self._probes(share)
        for ef in EF_SEARCH:
            yield {"kind": "HNSW32", "ef_search": ef}
        yield {"kind": "Flat"}

    def _probes(self, share: float) -> Settings:
        return {"searched": max(1, round(share * self.leaves))}

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        if settings["kind"] != self._kind:
            self._index = None  # frees it first
            self._index = self._build(settings["kind"])
            self._kind = settings["kind"]
        # The casts do not own the index.
        index = self.faiss.downcast_index(self._index)
        if "reordered" in settings:
            index.k_factor = settings["reordered"] / K
            self.faiss.downcast_index(index.base_index).nprobe = settings["searched"]
        elif "searched" in settings:
            index.nprobe = settings["searched"]
        elif "ef_search" in settings:
            index.hnsw.efSearch = settings["ef_search"]
        return lambda queries: index.search(queries, K)[1]

    def _build(self, kind: str) -> Any:
        start = time.perf_counter()
        metric = self.faiss.METRIC_INNER_PRODUCT
        index = self.faiss.index_factory(self.rows.shape[1], kind, metric)
        # FAISS itself samples 256 rows for each leaf.
        index.train(self.rows)
        for first in range(0, len(self.rows), BLOCK):
            index.add(np.ascontiguousarray(self.rows[first : first + BLOCK]))
        self.facts["build_seconds"][kind] = time.perf_counter() - start
        return index


def run_side(name: str, folder: Path, threads: int, target: float) -> None:
    """The process of a side: sweeps, or measures one setting."""
    rows = np.load(folder / "rows.npy", mmap_mode=None if name == "FAISS" else "r")
    queries = dict(np.load(folder / "queries.npz"))
    expected = dict(np.load(folder / "expected.npz"))
    side: Searcher
    if name == "ours":
        side = Ours(folder, np.asarray(rows), threads, target)
    elif name == "flat":
        side = Flat(np.asarray(rows))
        queries = {kind: some[:NUM_FLAT] for kind, some in queries.items()}
    else:
        side = Faiss(rows, threads)

    def answer(request: dict[str, Any]) -> Any:
        if "settings" in request:
            search = side.prepare(request["settings"])
            return measure(search, queries, expected)
        points = []
        for settings in side.settings():
            search = side.prepare(settings)
            points.append(
                {"settings": settings} | measure(search, queries, expected, singles=20)
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {"points": points, "facts": side.facts, "peak_gb": peak}

    serve(answer)


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
        for _ in range(repeats):
            for name, side in sides.items():
                point = chosen[name]
                assert point is not None  # all reach `common`
                request = {"settings": point["settings"]}
                values[name] += ask_in_turns([side], request, 1)[name]
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
    add_busy_flag(parser)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(
            arguments.side, arguments.out, arguments.threads, arguments.recall_target
        )
        return
    load = check_load(parser, arguments.busy)
    out = arguments.out
    out.mkdir(parents=True)
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
    sides = {n: Side(n, [*command, f"--side={n}"], cores) for n in names}
    try:
        sweeps = {n: ask_in_turns([s], {}, 1)[n][0] for n, s in sides.items()}
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
        **found,
        "sweeps": sweeps,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(out / "sweep.png", sweeps)
    for name in ("rows.npy", "queries.npz", "expected.npz"):
        (out / name).unlink()
    shutil.rmtree(out / "index")
    print(json.dumps({k: v for k, v in results.items() if k != "sweeps"}, indent=1))


if __name__ == "__main__":
    main()
