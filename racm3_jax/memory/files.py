"""The files of an opened memory: verified first, opened when needed."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Collection
from typing import Any

from racm3_jax import checksums, storage
from racm3_jax.index import registry, sharded
from racm3_jax.index.contract import Index
from racm3_jax.index.rows import Rows
from racm3_jax.memory import format as format_lib


class MemoryFiles:
    """Columns and index of a memory. Thread-safe.

    Args:
      path: of the memory.
      manifest: its manifest.
      later: kinds of files (`format.kind_of`) that are verified and opened on first
        use; the others are already verified, and opened now.

    Attributes:
      folders: of its parts.

    Raises:
      IntegrityError: a column or an index does not match the manifest.
    """

    def __init__(
        self, path: pathlib.Path, manifest: dict[str, Any], later: Collection[str] = ()
    ):
        self.path = path
        self.manifest = manifest
        self.folders = [path / prefix for prefix in format_lib.prefixes(manifest)]
        self.num_documents: int = manifest["num_documents"]
        self._unverified = {
            name for name in manifest["files"] if format_lib.kind_of(name) in later
        }
        self._opening = threading.RLock()
        self._columns: dict[str, Rows] = {}
        self._index: Index | None = None
        self._check_counts()
        for name in format_lib.COLUMN_TYPES:
            needed = name not in format_lib.OPTIONAL_COLUMNS or self.has_column(name)
            if needed and name not in later:
                self.column(name)
        if "index" not in later:
            self.open_index()

    def close(self) -> None:
        """Closes the connections to other processes, if the index is shared."""
        if close := getattr(self._index, "close", None):
            close()

    def share_index(self) -> None:
        """Collective: each process opens some index shards, and searches cover all.

        The files of other shards are neither read nor opened here. For a memory that
        was loaded with its index in `later`; see `index.hosts`.
        """
        import jax

        from racm3_jax.index.hosts import HostsIndex

        places = [folder / format_lib.INDEX_DIRECTORY for folder in self.folders]
        shared = registry.assign_shards(
            places, jax.process_index(), jax.process_count()
        )
        own_of = dict(zip(format_lib.prefixes(self.manifest), shared, strict=True))

        def is_own(name: str) -> bool:
            prefix, _, inner = name.partition(f"{format_lib.INDEX_DIRECTORY}/")
            own = own_of[prefix]
            return own is None or sharded.shard_of(inner) in (None, *own)

        self._verify(set(filter(is_own, self._unread("index"))))
        counts = format_lib.part_counts(self.manifest)
        own_shards = registry.open_parts(
            places, counts, self.column("embeddings_document"), shared
        )
        self._index = HostsIndex.connect(own_shards, self.num_documents)

    def _unread(self, kind: str) -> set[str]:
        """Files of a kind whose sha256 is not verified yet."""
        return {n for n in self._unverified if format_lib.kind_of(n) == kind}

    def _verify(self, names: set[str]) -> None:
        storage.verify_files(
            self.path,
            {name: self.manifest["files"][name] for name in sorted(names)},
            format_lib.rebuild_remedy(self.path),
            checksums.recall,
        )
        self._unverified -= names

    def open_index(self) -> Index:
        """The memory's index, opened once."""
        if self._index is None:
            with self._opening:
                if self._index is None:
                    self._verify(self._unread("index"))
                    self._index = registry.open_parts(
                        [f / format_lib.INDEX_DIRECTORY for f in self.folders],
                        format_lib.part_counts(self.manifest),
                        self.column("embeddings_document"),
                    )
        assert self._index is not None  # without `shared` every part is opened
        return self._index

    def column(self, name: str) -> Rows:
        """A column, opened once.

        Raises:
          IntegrityError: it is damaged, or its type, width or length differs from the
            manifest.
        """
        if name not in self._columns:
            with self._opening:
                if name not in self._columns:
                    self._verify(self._unread(name))
                    self._columns[name] = self._open_column(name)
        return self._columns[name]

    def _open_column(self, name: str) -> Rows:
        files = [
            self.path / file
            for prefix in format_lib.prefixes(self.manifest)
            for file in sorted(self.manifest["files"])
            if file.startswith(f"{prefix}{name}-")
        ]
        remedy = format_lib.rebuild_remedy(self.path)
        try:
            rows = Rows(files)
        except (ValueError, EOFError) as error:
            raise storage.IntegrityError(
                f"the column {name} of {self.path} cannot be read ({error}); {remedy}"
            ) from error
        num, width = self.num_documents, self.manifest["d_embed"]
        shapes = {
            "embeddings": (num, width),
            "queries": (num, self.manifest["num_query_variants"], width),
        }
        expected = shapes.get(name.split("_")[0], (num,))
        dtype = format_lib.COLUMN_TYPES[name]
        if (rows.shape, rows.dtype.str) != (expected, dtype):
            raise storage.IntegrityError(
                f"the column {name} of {self.path} is {rows.dtype.str}"
                f"{list(rows.shape)} instead of {dtype}{list(expected)}; {remedy}"
            )
        return rows

    def _check_counts(self) -> None:
        if sum(format_lib.part_counts(self.manifest)) != self.num_documents:
            raise storage.IntegrityError(
                f"the parts of {self.path} do not hold {self.num_documents} documents "
                f"in total; {format_lib.rebuild_remedy(self.path)}"
            )

    def has_column(self, name: str) -> bool:
        """Whether every part has this column."""
        return all(
            any(f.startswith(f"{prefix}{name}-") for f in self.manifest["files"])
            for prefix in format_lib.prefixes(self.manifest)
        )
