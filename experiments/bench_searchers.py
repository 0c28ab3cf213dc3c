"""The sides of bench_memory.py: ours, exact search and FAISS, and their settings."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench_sides import write_json

from racm3_jax.index import registry, streaming, tuning

K = 10
SHARES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
# Rows that are rescored exactly.
REORDERED = (200, 800, 3200)
EF_SEARCH = (32, 48, 64, 80, 96, 128, 192, 256, 512)
BLOCK = 20_000

Settings = dict[str, Any]


class Searcher(Protocol):
    """One side: its settings, and a search with one of them."""

    facts: dict[str, Any]

    def build(self) -> Iterator[str]:
        """Builds the indexes that are not in the folder yet; yields their names."""
        ...

    def settings(self) -> Iterator[Settings]:
        """Those of the sweep; indexes are built on the way."""
        ...

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        """A function from queries to ids."""
        ...


class Ours:
    """An index of this package, built and tuned as by a memory; batches in threads.

    Args:
      kind: of index; "auto" is the default of a memory.
      folder: with `queries.npz`, on which it is tuned; for the index and its facts.
      rows: of the index.
      threads: of a batch.
      target: recall.
    """

    def __init__(
        self, kind: str, folder: Path, rows: np.ndarray, threads: int, target: float
    ):
        self.kind = registry.choose_kind(kind, len(rows))
        self.folder, self.rows = folder, rows
        self.threads, self.target = threads, target
        self.facts: dict[str, Any] = {}

    def build(self) -> Iterator[str]:
        path = self.folder / f"index_{self.kind}.json"
        if not path.exists():
            write_json(path, self._build())
        self.facts = json.loads(path.read_text())
        self.index: Any = registry.open_index(self.folder / f"index_{self.kind}")
        yield self.kind

    def _build(self) -> dict[str, Any]:
        folder = self.folder / f"index_{self.kind}"
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        index: Any = registry.build_index(self.kind, self.rows, folder)
        built = time.perf_counter()
        queries = dict(np.load(self.folder / "queries.npz"))
        found = tuning.tune(
            index, folder, self.rows, queries, recall_target=self.target
        )
        return {
            "kind": self.kind,
            "build_seconds": built - start,
            "tune_seconds": time.perf_counter() - built,
            "tuned_recall": found,
        }

    def settings(self) -> Iterator[Settings]:
        yield dict(self.index.settings)
        if "ef_search" in self.index.settings:
            for ef in EF_SEARCH:
                yield self.index.settings | {"ef_search": ef}
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

    def build(self) -> Iterator[str]:
        yield from ()

    def settings(self) -> Iterator[Settings]:
        yield {}

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        del settings
        return lambda queries: streaming.find_exact(self.rows, queries, K)


class Faiss:
    """FAISS's own classes, with its own threads; one index in memory at a time."""

    def __init__(self, folder: Path, rows: np.ndarray, threads: int):
        import faiss

        self.faiss, self.folder, self.rows = faiss, folder, rows
        faiss.omp_set_num_threads(threads)
        self.leaves = max(4, round(4 * len(rows) ** 0.5))
        self.facts: dict[str, Any] = {
            "version": importlib.metadata.version("faiss-cpu"),
            "build_seconds": {},
        }
        self._kind = ""
        self._index: Any = None

    def build(self) -> Iterator[str]:
        for kind in dict.fromkeys(settings["kind"] for settings in self.settings()):
            self._open(kind)
            yield kind

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
        for kind, ef in itertools.product(("HNSW32", "HNSW32,SQfp16"), EF_SEARCH):
            yield {"kind": kind, "ef_search": ef}
        yield {"kind": "Flat"}

    def _probes(self, share: float) -> Settings:
        return {"searched": max(1, round(share * self.leaves))}

    def prepare(self, settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
        self._open(settings["kind"])
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

    def _open(self, kind: str) -> None:
        """Makes it the current index: from its file, or builds it and writes the file."""
        if kind == self._kind:
            return
        self._index = None  # frees it first
        self._kind = kind
        path = self.folder / f"faiss_{kind}.index"
        facts = path.with_suffix(".json")
        if not facts.exists():
            start = time.perf_counter()
            self._index = self._build(kind)
            self.faiss.write_index(self._index, str(path))
            write_json(facts, time.perf_counter() - start)
        else:
            self._index = self.faiss.read_index(str(path))
        self.facts["build_seconds"][kind] = json.loads(facts.read_text())

    def _build(self, kind: str) -> Any:
        metric = self.faiss.METRIC_INNER_PRODUCT
        index = self.faiss.index_factory(self.rows.shape[1], kind, metric)
        # FAISS itself samples 256 rows for each leaf.
        index.train(self.rows)
        for first in range(0, len(self.rows), BLOCK):
            index.add(np.ascontiguousarray(self.rows[first : first + BLOCK]))
        return index
