"""Facts of a memory's rows that a training asks for: its split, its class.

Where the memory has a column, that is mapped; else every record is read, once a work
directory: what was found is kept in `columns/`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from racm3_jax import storage
from racm3_jax.memory.format import hash_name
from racm3_jax.memory.memory import Memory
from racm3_jax.progress import open_progress
from racm3_jax.sharding import leader_first

COLUMNS_DIRECTORY = "columns"
_RECORDS_PER_READ = 1 << 12


def find_main_rows(memory: Memory, workdir: Path) -> Int64[np.ndarray, " rows"]:
    """The rows to train on: allowed, and of the split "train" or of none."""
    rows = memory.allowed_ids()
    splits = read_column(memory, "split", workdir)[rows]
    return rows[(splits == hash_name("train")) | (splits == 0)]


def read_column(memory: Memory, key: str, workdir: Path) -> UInt64[np.ndarray, " n"]:
    """`hash_name` of a metadata key of every row; 0 where there is none.

    Args:
      memory: whose rows.
      key: "split" is a column of every newer memory.
      workdir: where the column is kept if it has to be read from the records.
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
            f"uint64[{len(memory)}]: remove it, and it is made again"
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
