"""Vectors on disk in .npy shards, and records in several files.

    embeddings_text-00000.npy   rows 0 .. R-1
    embeddings_text-00001.npy   rows R .. 2R-1
    embeddings_text-00002.npy   rows 2R .. n-1

Rows are appended as a stream, for memories of any size; reading memory-maps
the shards and gathers rows by index.
"""

from __future__ import annotations

import io
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from racm3_jax.documents import store

ROWS_PER_SHARD = 1 << 18


def _header(num_rows: int, row_shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    # NumPy pads the header so that the first axis can grow to 21 digits in place.
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (num_rows, *row_shape),
        },
    )
    return buffer.getvalue()


class RowsWriter:
    """Appends rows to `directory/name-00000.npy`, `-00001.npy`, …

    Args:
      directory: of the shards; must exist.
      name: their common name.
      row_shape: shape of one row.
      dtype: what is stored; rows are cast to it.
      rows_per_shard: rows per file.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        name: str,
        row_shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        rows_per_shard: int = ROWS_PER_SHARD,
    ):
        self.shards: list[str] = []
        self.num_rows = 0
        self._directory = directory
        self._name = name
        self._row_shape = row_shape
        self._dtype = np.dtype(dtype)
        self._rows_per_shard = rows_per_shard
        self._file: BinaryIO | None = None
        self._rows_in_shard = 0

    def append(self, rows: Shaped[np.ndarray, "rows ..."]) -> None:
        """Adds rows at the end.

        Raises:
          ValueError: their shape is not `[rows, *row_shape]`.
        """
        if rows.shape[1:] != self._row_shape:
            raise ValueError(
                f"{self._name} holds rows of shape {self._row_shape}; "
                f"got {rows.shape[1:]}"
            )
        rows = np.ascontiguousarray(rows, self._dtype)
        while len(rows):
            if self._file is None or self._rows_in_shard == self._rows_per_shard:
                self._open_next_shard()
            assert self._file is not None
            part = rows[: self._rows_per_shard - self._rows_in_shard]
            self._file.write(part.tobytes())
            self._rows_in_shard += len(part)
            self.num_rows += len(part)
            rows = rows[len(part) :]

    def close(self) -> None:
        """Finishes the last shard; without any rows, writes one empty shard."""
        if not self.shards:
            self._open_next_shard()
        self._end_shard()

    def _open_next_shard(self) -> None:
        self._end_shard()
        name = f"{self._name}-{len(self.shards):05d}.npy"
        self._file = open(self._directory / name, "wb")  # noqa: SIM115
        self._file.write(_header(0, self._row_shape, self._dtype))
        self._rows_in_shard = 0
        self.shards.append(name)

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(_header(self._rows_in_shard, self._row_shape, self._dtype))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


class Rows:
    """Memory-mapped rows from `RowsWriter`, read by index.

    Args:
      paths: the shards in order, of any lengths (a memory may have grown).

    Raises:
      ValueError: no files, damaged files, or rows with different shapes or types.
    """

    def __init__(self, paths: list[pathlib.Path]):
        if not paths:
            raise ValueError("there are no files of rows")
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        kinds = {(shard.dtype, shard.shape[1:]) for shard in self._shards if shard.ndim}
        if len(kinds) != 1 or any(shard.ndim == 0 for shard in self._shards):
            raise ValueError(f"the files of rows do not fit together: {paths[0]} …")
        lengths = [len(shard) for shard in self._shards]
        self._starts = np.cumsum([0, *lengths[:-1]])
        self.shape: tuple[int, ...] = (sum(lengths), *self._shards[0].shape[1:])
        self.dtype = self._shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: npt.ArrayLike | slice) -> np.ndarray:
        """Gathers rows: `[...]` integers give `[..., *row_shape]`, a slice a block."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if len(self._shards) == 1:
            return np.asarray(self._shards[0][rows])
        rows = np.where(rows < 0, rows + len(self), rows)
        found = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        # From the right, so that empty shards are skipped.
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            found[here] = self._shards[shard][rows[here] - self._starts[shard]]
        return found

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> np.ndarray:
        if len(self._shards) == 1:
            return np.array(self._shards[0], dtype, copy=copy)
        if copy is False:
            raise ValueError("rows in several shards cannot become one array uncopied")
        return np.concatenate(self._shards).astype(dtype or self.dtype, copy=False)

    def shards(self) -> Iterator[np.ndarray]:
        """The mapped shards, in order."""
        yield from self._shards

    def release(self) -> None:
        """Releases the pages that were read from resident memory.

        Mapped pages stay resident after reading; a pass over all rows would count all
        of them.
        """
        for shard in self._shards:
            mapped = getattr(shard, "_mmap", None)
            if mapped is not None:
                mapped.madvise(mmap.MADV_DONTNEED)


class Records:
    """Tokenised documents in one or more ArrayRecord files, read by index."""

    def __init__(self, paths: list[pathlib.Path]):
        self._files = [store.RecordFile(path) for path in paths]
        self._starts = np.cumsum([0, *(len(file) for file in self._files[:-1])])

    def read(self, rows: npt.ArrayLike) -> list[bytes]:
        """The records of these rows, in order."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(self._files) == 1:
            return self._files[0].read(rows.tolist()) if len(rows) else []
        found: list[bytes] = [b""] * len(rows)
        file_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(file_of):
            here = np.flatnonzero(file_of == number)
            records = self._files[number].read(rows[here] - self._starts[number])
            for place, record in zip(here, records, strict=True):
                found[place] = record
        return found

    def close(self) -> None:
        for file in self._files:
            file.close()
