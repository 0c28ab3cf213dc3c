"""Precomputes the neighbours of every document of a memory as a table.

Computed once, by exact search on all devices of all processes or with the memory's
index; training then reads the table (`Memory.use_table`) and needs no index.

    .table-parts.partial/plan.json       memory, number of neighbours, ...
    .table-parts.partial/00000.npz       one part: some rows, one modality, one variant
    table/                               the parts, sorted by query

Several processes (`jax.distributed`) make a part each at a time:

    process 0   queries of part 0 -> | all queries, | -> their neighbours -> 00000.npz
    process 1   queries of part 1 -> | all devices  | -> their neighbours -> 00001.npz

A part does not depend on the process that makes it; after an interruption, the same
call, with any number of processes, makes the missing parts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32

from racm3_jax import storage
from racm3_jax.index import contract
from racm3_jax.index.contract import Index
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.folder import read_description
from racm3_jax.index.table import TableIndex, TablePart
from racm3_jax.memory.memory import Memory
from racm3_jax.sharding import leader_first
from racm3_jax.types import Modality, Neighbours

QUERIES_PER_BLOCK = 1024
# Per modality and variant; at most one part is recomputed after an interruption.
ROWS_PER_PART = 1 << 16
_VALUES_PER_BLOCK = 1 << 25


def compute_neighbours(
    memory: Memory,
    path: str | os.PathLike[str],
    k: int,
    *,
    engine: Literal["exact", "memory"] = "exact",
    modalities: Sequence[Modality] = ("text", "image"),
    progress: Callable[[int, int], None] | None = None,
) -> TableIndex:
    """Writes the `k` nearest documents of every query that training may use.

    All processes of a job call it. The queries are the text and image embeddings of
    every document, with and without query dropout. Removed documents and the document
    itself are in the table too, and are excluded when it is read: a removal needs no
    new table. Training batches are the same as with live search if `k` is at least the
    strategy's `max_candidates`, or the number of documents.

    Args:
      memory: its documents are the queries and the results.
      path: directory of the table; replaces another table.
      k: neighbours per query.
      engine: "exact" on all devices, or "memory" for its own index.
      modalities: of the queries.
      progress: called with the numbers of finished queries and of all queries.

    Raises:
      BusyError: another job is computing this table.
      FileExistsError: something other than a table is at `path`.
      ValueError: k < 1, or an unknown engine.
    """
    path = pathlib.Path(path)
    storage.check_target(path, "table of neighbours", is_table, overwrite=True)
    if engine not in ("exact", "memory"):
        raise ValueError(f'engine must be "exact" or "memory"; got {engine!r}')
    if k < 1:
        raise ValueError(f"k must be >= 1; got {k}")
    settings = {
        "memory": memory.fingerprint(),
        "engine": engine,
        "modalities": list(modalities),
        "scores": "exact",
    }
    k = min(k, len(memory))
    work = storage.leftover(path.with_name(f"{path.name}-parts"), "partial")
    parts = _list_parts(memory, modalities, work)
    with contextlib.ExitStack() as held:
        with leader_first():
            if jax.process_index() == 0:
                plan = {**settings, "k": k, "rows": ROWS_PER_PART}
                held.enter_context(_claimed(work, path, plan))
        missing = _find_missing(parts)
        if missing:
            live: Index
            if engine == "exact":
                live = ExactIndex(memory.embeddings, jax.devices())
            else:
                live = memory.index
            _make_parts(_Finder(memory, live, k), parts, missing, progress)
            multihost_utils.sync_global_devices("parts of neighbours")
            if _find_missing(parts):
                raise ValueError(
                    f"not all processes see {work}: compute the neighbours in a "
                    "shared folder, or with one process"
                )
        with leader_first():
            if jax.process_index() == 0:
                with storage.new_directory(path, replace=True) as directory:
                    readers = [functools.partial(_read_part, p.file) for p in parts]
                    sizes = (len(memory), memory.d_embed)
                    TableIndex.join(readers, directory, *sizes, settings)
                storage.delete_directory(work)
    return TableIndex.load(path, verify=False)


def is_table(path: pathlib.Path) -> bool:
    """Whether a folder is a table of neighbours."""
    try:
        return read_description(path).kind == TableIndex.kind
    except (ValueError, FileNotFoundError):
        return False


class _Part(NamedTuple):
    """The queries of some rows, and the file of their neighbours."""

    modality: Modality
    variant: int
    start: int
    stop: int
    file: pathlib.Path


def _list_parts(
    memory: Memory, modalities: Sequence[Modality], work: pathlib.Path
) -> list[_Part]:
    variants = range(memory.num_query_variants + 1)
    starts = range(0, len(memory), ROWS_PER_PART)
    parts = []
    for modality, variant, start in itertools.product(modalities, variants, starts):
        stop = min(len(memory), start + ROWS_PER_PART)
        file = work / f"{len(parts):05d}.npz"
        parts.append(_Part(modality, variant, start, stop, file))
    return parts


@contextlib.contextmanager
def _claimed(
    work: pathlib.Path, path: pathlib.Path, plan: dict[str, Any]
) -> Iterator[None]:
    """A folder for the parts of this plan; parts of another plan are deleted.

    After an error it is kept if it has a part.

    Raises:
      BusyError: another job is computing this table.
    """
    work.mkdir(parents=True, exist_ok=True)
    with storage.locked(work, wait=False) as is_free:
        if not is_free:
            raise storage.BusyError(
                f"the neighbours of {path} are already being computed: wait for that"
            )
        file, sealed = work / "plan.json", storage.encode_sealed(plan)
        try:
            if not file.is_file() or file.read_bytes() != sealed:
                for old in work.iterdir():
                    old.unlink()
                storage.write_file(file, sealed)
            yield
        except BaseException:
            if not any(work.glob("*.npz")):  # nothing to resume
                shutil.rmtree(work, ignore_errors=True)
            raise


def _find_missing(parts: Sequence[_Part]) -> list[_Part]:
    """The parts that some process does not see, the same in all; a collective call."""
    seen = np.asarray([part.file.is_file() for part in parts])
    by_all = multihost_utils.process_allgather(seen).all(axis=0)
    return [part for part, is_there in zip(parts, by_all, strict=True) if not is_there]


def _make_parts(
    finder: _Finder,
    parts: Sequence[_Part],
    missing: Sequence[_Part],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Makes the missing parts, one per process at a time, in lockstep."""
    total = sum(part.stop - part.start for part in parts)
    done = total - sum(part.stop - part.start for part in missing)
    for first in range(0, len(missing), jax.process_count()):
        together = missing[first : first + jax.process_count()]
        own = together[jax.process_index() :][:1]
        found: list[TablePart] = []
        longest = max(part.stop - part.start for part in together)
        for offset in range(0, longest, QUERIES_PER_BLOCK):
            blocks = [
                np.arange(
                    p.start + offset, min(p.stop, p.start + offset + QUERIES_PER_BLOCK)
                )
                for p in together
            ]
            queries = np.zeros((0, finder.memory.d_embed), np.float32)
            if own:
                rows = blocks[jax.process_index()]
                queries = finder.memory.queries(rows, own[0].modality, own[0].variant)
            found.append(TablePart.find(finder, queries, finder.k))
            done += sum(map(len, blocks))
            if progress is not None:
                progress(done, total)
        if own:
            columns = map(np.concatenate, zip(*found, strict=True))
            with storage.replacing(own[0].file) as partial, open(partial, "wb") as file:
                np.savez(file, **TablePart(*columns)._asdict())


def _read_part(file: pathlib.Path) -> TablePart:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return TablePart(*(arrays[name] for name in TablePart._fields))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise storage.IntegrityError(
            f"{file} is damaged ({error}): remove it and run the same command again"
        ) from error


class _Finder:
    """Each process has its own queries; all devices search them together.

    Scores are those of `contract.score_rows`, independent of the devices.
    """

    def __init__(self, memory: Memory, live: Index, k: int) -> None:
        self.memory = memory
        self.k = k
        self._live = live
        self._is_shared = isinstance(live, ExactIndex) and jax.process_count() > 1
        self._none_denied = np.zeros(len(memory), bool)

    def __len__(self) -> int:
        return len(self.memory)

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`; 0 to `QUERIES_PER_BLOCK` queries."""
        found = self._search_together(queries, k)
        # Embedding rows in memory at a time.
        step = max(1, _VALUES_PER_BLOCK // (k * self.memory.d_embed))
        scored = [
            contract.score_rows(
                queries[start : start + step],
                Neighbours(*(column[start : start + step] for column in found)),
                self.memory.embeddings,
                self._none_denied,
            )
            for start in range(0, len(queries), step)
        ]
        if not scored:
            return found
        return Neighbours(*map(np.concatenate, zip(*scored, strict=True)))

    def _search_together(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        if not self._is_shared:
            return self._live.search(queries, k)
        padded = np.pad(queries, ((0, QUERIES_PER_BLOCK - len(queries)), (0, 0)))
        everyone = multihost_utils.process_allgather(padded, tiled=True)
        found = self._live.search(everyone, k)
        first = jax.process_index() * QUERIES_PER_BLOCK
        return Neighbours(*(column[first : first + len(queries)] for column in found))
