"""The neighbours of every document of a memory, as a table.

Made once, by exact search on all devices or by the memory's own index; training then
reads them (`Memory.use_table`) and needs no index.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float32

from racm3_jax import storage
from racm3_jax.index.contract import Index
from racm3_jax.index.exact import ExactIndex
from racm3_jax.index.folder import read_description
from racm3_jax.index.table import TableIndex
from racm3_jax.memory.memory import Memory
from racm3_jax.types import Modality

QUERIES_PER_BLOCK = 1024


def compute_neighbours(
    memory: Memory,
    path: str | os.PathLike[str],
    k: int,
    *,
    engine: Literal["exact", "memory"] = "exact",
    modalities: Sequence[Modality] = ("text", "image"),
    progress: Callable[[int, int], None] | None = None,
) -> TableIndex:
    """Writes the `k` nearest documents to every query that training may ask.

    Those are the text and image parts of every document, with and without query
    dropout. Removed and own documents are in the table too, and are left out when it is
    read: a removal needs no new table. Training gives the batches of a live search when
    `k` is at least what the strategy looks at (`max_candidates`), or all documents.

    Args:
      memory: whose documents ask and are found.
      path: directory of the table; another table there is replaced.
      k: neighbours of a query.
      engine: "exact" on all devices, or the "memory"'s own index.
      modalities: of the queries.
      progress: called with queries done and all queries.

    Raises:
      FileExistsError: anything but a table is at `path`.
      ValueError: k below 1, or another engine.
    """
    path = pathlib.Path(path)
    storage.check_target(path, "table of neighbours", is_table, overwrite=True)
    if engine not in ("exact", "memory"):
        raise ValueError(f'engine must be "exact" or "memory"; got {engine!r}')
    if k < 1:
        raise ValueError(f"k must be >= 1; got {k}")
    live: Index = memory.index
    if engine == "exact":
        live = ExactIndex(memory.embeddings, jax.devices())
    settings = {
        "memory": memory.fingerprint(),
        "engine": engine,
        "modalities": list(modalities),
    }
    table = TableIndex.compute(
        live,
        _queries(memory, modalities, progress),
        min(k, len(memory)),
        memory.d_embed,
        settings,
    )
    with storage.new_directory(path, replace=True) as directory:
        table.save(directory)
    return table


def is_table(path: pathlib.Path) -> bool:
    """Whether a folder is a table of neighbours."""
    try:
        return read_description(path).kind == TableIndex.kind
    except (ValueError, FileNotFoundError):
        return False


def _queries(
    memory: Memory,
    modalities: Sequence[Modality],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Float32[np.ndarray, "queries d_embed"]]:
    variants = range(memory.num_query_variants + 1)
    total, done = len(modalities) * len(variants) * len(memory), 0
    for modality in modalities:
        for variant in variants:
            for start in range(0, len(memory), QUERIES_PER_BLOCK):
                rows = np.arange(start, min(len(memory), start + QUERIES_PER_BLOCK))
                yield memory.queries(rows, modality, variant)
                done += len(rows)
                if progress is not None:
                    progress(done, total)
