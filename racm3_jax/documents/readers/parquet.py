"""Parquet with image bytes, and embeddings as clip-retrieval writes them.

    parquet:shards/*.parquet     columns caption and image (bytes, or {bytes, path})
    embeddings:clip              clip/img_emb/img_emb_0.npy, clip/text_emb/text_emb_0.npy,
                                 clip/metadata/metadata_0.parquet

Needs pyarrow, which is not among the core dependencies.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.records import (
    ID_FIELDS,
    BadRecord,
    RawRecord,
    Record,
    Shard,
    make_document,
    pick,
    pick_text,
)
from racm3_jax.documents.readers.tar import find_files
from racm3_jax.types import Document

IMAGE_FIELDS = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "bytes", "img")
_ROWS_PER_READ = 64
_PARTS = {"image": ("img_emb", "image_emb"), "text": ("text_emb",)}


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
    text: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """A shard a row group of every file.

    Args:
      path: a file or a pattern.
      image: column of the encoded image; None looks for the usual names.
      text: column of the caption; None looks for the usual names.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: nothing matches.
      ImportError: without pyarrow.
      ValueError: a named column does not exist, or a file is no parquet.
    """
    parquet = import_parquet()
    shards = []
    for file in find_files(path):
        try:
            with parquet.ParquetFile(file) as opened:
                names = opened.schema_arrow.names
                rows = [
                    opened.metadata.row_group(g).num_rows
                    for g in range(opened.metadata.num_row_groups)
                ]
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        for column in (image, text):
            if column is not None and column not in names:
                raise ValueError(
                    f"{file} has no column {column!r}; it has {', '.join(names)}"
                )
        chosen = image or next((n for n in IMAGE_FIELDS if n in names), None)
        first = 0
        for group, num_rows in enumerate(rows):
            read = functools.partial(
                _read_group, file, group, first, chosen, text, max_pixels
            )
            shards.append(Shard(f"{file.as_posix()}#{group}", num_rows, read))
            first += num_rows
    return shards


def _rows(file: pathlib.Path, group: int | None = None) -> Iterator[dict[str, Any]]:
    with import_parquet().ParquetFile(file) as opened:
        groups = None if group is None else [group]
        for batch in opened.iter_batches(_ROWS_PER_READ, row_groups=groups):
            yield from batch.to_pylist()


def _read_group(
    file: pathlib.Path,
    group: int,
    first: int,
    image: str | None,
    text: str | None,
    max_pixels: int,
) -> Iterator[RawRecord]:
    for number, row in enumerate(_rows(file, group), first):
        read = functools.partial(_make, file, number, row, image, text, max_pixels)
        yield RawRecord(f"{file.as_posix()}[{number}]", read)


def _make(
    file: pathlib.Path,
    number: int,
    row: Mapping[str, Any],
    image: str | None,
    text: str | None,
    max_pixels: int,
) -> Document:
    picture = row.get(image) if image else None
    if isinstance(picture, Mapping):
        picture = picture.get("bytes")
    if picture is not None and not isinstance(picture, bytes):
        raise BadRecord(
            "no image bytes", f"column {image!r} holds {type(picture).__name__}"
        )
    fields = {k: v for k, v in row.items() if k != image}
    name = pick(fields, ID_FIELDS)
    return make_document(
        str(name) if name is not None else f"{file.stem}/{number:08d}",
        (pick_text(fields, text), picture),
        fields,
        max_pixels=max_pixels,
    )


def embedding_shards(path: str, *, text: str | None = None) -> list[Shard]:
    """Ready embeddings with their metadata, a shard a numbered file.

    Documents hold the caption alone (the images are not there); the image's embedding
    still finds them.

    Args:
      path: the folder; `metadata/` and one of `img_emb/` and `text_emb/` lie in it.
      text: column of the caption; None looks for the usual names.

    Raises:
      FileNotFoundError: a folder or a file of the same number is missing.
    """
    root = pathlib.Path(path)
    metadata = _numbered(root / "metadata", ".parquet")
    parts = {
        part: next((f for n in names if (f := _numbered(root / n, ".npy"))), {})
        for part, names in _PARTS.items()
    }
    if not metadata or not any(parts.values()):
        raise FileNotFoundError(
            f"{root} must hold metadata/*.parquet and img_emb/*.npy or text_emb/*.npy"
        )
    import_parquet()
    shards = []
    for number, file in sorted(metadata.items()):
        arrays = {p: files[number] for p, files in parts.items() if number in files}
        missing = [p for p, files in parts.items() if files and number not in files]
        if missing:
            raise FileNotFoundError(
                f"{root} has {file.name} but no {missing[0]} embeddings of that number"
            )
        read = functools.partial(_read_embeddings, file, arrays, text)
        shards.append(Shard(file.as_posix(), file.stat().st_size, read))
    return shards


def _numbered(folder: pathlib.Path, suffix: str) -> dict[int, pathlib.Path]:
    found = {}
    for file in sorted(folder.glob(f"*{suffix}")):
        digits = re.findall(r"\d+", file.stem)
        if digits:
            found[int(digits[-1])] = file
    return found


def _read_embeddings(
    file: pathlib.Path, arrays: Mapping[str, pathlib.Path], text: str | None
) -> Iterator[RawRecord]:
    rows = {p: np.load(f, mmap_mode="r", allow_pickle=False) for p, f in arrays.items()}
    lengths = {len(r) for r in rows.values()}
    with import_parquet().ParquetFile(file) as opened:
        lengths.add(opened.metadata.num_rows)
    if len(lengths) != 1:
        raise BadRecord(
            "damaged file",
            f"{file} and its embeddings have {sorted(lengths)} rows; they go together",
        )
    for number, fields in enumerate(_rows(file)):
        read = functools.partial(_make_embedded, file, number, fields, rows, text)
        yield RawRecord(f"{file.as_posix()}[{number}]", read)


def _make_embedded(
    file: pathlib.Path,
    number: int,
    fields: Mapping[str, Any],
    rows: Mapping[str, np.ndarray],
    text: str | None,
) -> Record:
    name = pick(fields, ID_FIELDS)
    document = make_document(
        str(name) if name is not None else f"{file.stem}/{number:08d}",
        (pick_text(fields, text),),
        fields,
    )
    found: dict[str, np.ndarray] = {}
    for part, array in rows.items():
        row = np.asarray(array[number], np.float32)
        norm = float(np.linalg.norm(row))
        if not np.isfinite(norm) or norm == 0:
            raise BadRecord("bad embedding", f"its {part} embedding has norm {norm}")
        found[part] = row / norm
    return Record(document, found.get("text"), found.get("image"))
