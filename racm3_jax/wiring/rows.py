"""Metadata columns of a memory's rows for a training: split, class.

If the memory has the column, it is memory-mapped; else every record is read, once per
work directory, and the result is cached in `columns/`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from racm3_jax import storage
from racm3_jax.memory.format import hash_name, is_of_training
from racm3_jax.memory.memory import Memory
from racm3_jax.progress import open_progress
from racm3_jax.sharding import leader_first

COLUMNS_DIRECTORY = "columns"
_RECORDS_PER_READ = 1 << 12


def find_main_rows(memory: Memory, workdir: Path) -> Int64[np.ndarray, " rows"]:
    """The training rows: allowed, with split "train" or no split."""
    rows = memory.allowed_ids()
    splits = read_column(memory, "split", workdir)[rows]
    return rows[is_of_training(splits)]


def read_column(memory: Memory, key: str, workdir: Path) -> UInt64[np.ndarray, " n"]:
    """`hash_name` of a metadata value of every row; 0 if there is none.

    Args:
      memory: the memory.
      key: "split" is a column of all newer memories.
      workdir: cache of the column if it has to be read from the records.
    """
    if key == "split" and memory.split_hashes is not None:
        return memory.split_hashes
    name = f"{hash_name(key):016x}-{memory.fingerprint()}.npy"
    path = workdir / COLUMNS_DIRECTORY / name
    with leader_first():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            column = _read_records(memory, key)
            with storage.replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, column)
        column = np.load(path, mmap_mode="r", allow_pickle=False)
    if column.shape != (len(memory),) or column.dtype != np.uint64:
        raise storage.IntegrityError(
            f"{path} is {column.dtype}{list(column.shape)} instead of "
            f"uint64[{len(memory)}]: remove it and run the same command again"
        )
    return column


def _read_records(memory: Memory, key: str) -> UInt64[np.ndarray, " n"]:
    column = np.zeros(len(memory), np.uint64)
    with open_progress(total=len(memory), desc=f"read {key}", unit="documents") as bar:
        for start in range(0, len(memory), _RECORDS_PER_READ):
            rows = np.arange(start, min(start + _RECORDS_PER_READ, len(memory)))
            found = memory.metadata(rows)
            column[rows] = [hash_name(str(facts.get(key, ""))) for facts in found]
            bar.update(len(rows))
    return column
