"""Parquet: a caption and an image per row.

    parquet:shards/*.parquet     columns caption and image (in any form of `image_fields`)

Needs pyarrow, which is not among the core dependencies.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from racm3_jax.buckets import BucketError, BucketPath
from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.fields import (
    ID_FIELDS,
    make_record,
    pick,
    pick_captions,
)
from racm3_jax.documents.readers.files import (
    MAX_FILE_BYTES,
    Folder,
)
from racm3_jax.documents.readers.image_fields import find_images
from racm3_jax.documents.readers.patterns import SourceFile, cut_files, open_folder
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Record, Shard
from racm3_jax.documents.readers.remote import BucketFolder

_ROWS_PER_READ = 64


def import_parquet() -> Any:
    """pyarrow.parquet.

    Raises:
      ImportError: names the extra to install.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"reading parquet needs pyarrow ({error}); install it with "
            'pip install "racm3_jax[parquet]"'
        ) from error
    return pyarrow.parquet


def parquet_shards(
    path: str,
    *,
    image: str | None = None,
    images: str | None = None,
    text: str | None = None,
    follow_links: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """One shard per row group of every file.

    Args:
      path: a file or a pattern.
      image: column of the image; None tries the usual names.
      images: base folder of image paths; None means each file's own folder.
      text: column of the caption; None tries the usual names.
      follow_links: also follow links to outside these folders.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
      ImportError: without pyarrow.
      ValueError: a named column does not exist, or a file is not parquet.
    """
    parquet = import_parquet()

    def cut(file: SourceFile) -> Iterator[Shard]:
        try:
            with parquet.ParquetFile(_source(file.path)) as opened:
                names = opened.schema_arrow.names
                rows = [
                    opened.metadata.row_group(g).num_rows
                    for g in range(opened.metadata.num_row_groups)
                ]
        except BucketError:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file.path} cannot be read as parquet: {error}"
            ) from error
        for column in (image, text):
            if column is not None and column not in names:
                raise ValueError(
                    f"{file.path} has no column {column!r}; it has {', '.join(names)}"
                )
        folder = open_folder(images, file, follow_links)
        first = 0
        for group, num_rows in enumerate(rows):
            read = functools.partial(
                *(_read_group, file, group, first, folder, image, text, max_pixels)
            )
            yield Shard(f"{file.path.as_posix()}#{group}", num_rows, read)
            first += num_rows

    return cut_files(path, "*.parquet", follow_links, cut)


def _source(path: pathlib.Path | BucketPath) -> Any:
    """What pyarrow opens: local paths directly, which it memory-maps."""
    return path.open() if isinstance(path, BucketPath) else path


def read_rows(file: Any, group: int | None = None) -> Iterator[dict[str, Any] | None]:
    """The rows of a file, or of one of its groups; None for one that is too large."""
    with import_parquet().ParquetFile(file) as opened:
        groups = None if group is None else [group]
        for batch in opened.iter_batches(_ROWS_PER_READ, row_groups=groups):
            if batch.nbytes <= MAX_FILE_BYTES:
                yield from batch.to_pylist()
                continue
            for number in range(batch.num_rows):
                row = batch.slice(number, 1)
                yield row.to_pylist()[0] if row.nbytes <= MAX_FILE_BYTES else None


def _read_group(
    file: SourceFile,
    group: int,
    first: int,
    folder: Folder | BucketFolder,
    image: str | None,
    text: str | None,
    max_pixels: int,
) -> Iterator[RawRecord]:
    for number, row in enumerate(read_rows(_source(file.path), group), first):
        read = functools.partial(
            _make, file, number, row, folder, image, text, max_pixels
        )
        yield RawRecord(f"{file.path.as_posix()}[{number}]", read)


def _make(
    file: SourceFile,
    number: int,
    row: Mapping[str, Any] | None,
    folder: Folder | BucketFolder,
    image: str | None,
    text: str | None,
    max_pixels: int,
) -> Record:
    if row is None:
        raise BadRecord(
            "oversized row", f"it has more than the {MAX_FILE_BYTES} bytes allowed"
        )
    images, used = find_images(row, folder, image)
    words = pick_captions(row, text)
    return make_record(
        file.name_record(pick(row, ID_FIELDS), number),
        (*words[:1], *images),
        {name: value for name, value in row.items() if name != used},
        more_captions=words[1:],
        max_pixels=max_pixels,
    )
