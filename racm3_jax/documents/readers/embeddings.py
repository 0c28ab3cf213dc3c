"""Precomputed embeddings in the format of clip-retrieval.

    clip/img_emb/img_emb_0.npy  clip/text_emb/text_emb_0.npy  clip/metadata/metadata_0.parquet

Row i of each file belongs to one document. Needs pyarrow.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from racm3_jax.documents.readers.fields import (
    ID_FIELDS,
    make_record,
    pick,
    pick_captions,
)
from racm3_jax.documents.readers.files import Folder, is_hidden
from racm3_jax.documents.readers.parquet import import_parquet, read_rows
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Record, Shard

_PARTS = {"image": ("img_emb", "image_emb"), "text": ("text_emb",)}


def embedding_shards(
    path: str, *, text: str | None = None, follow_links: bool = False
) -> list[Shard]:
    """Precomputed embeddings with metadata, one shard per numbered file.

    Documents have only the caption (no image), or an empty text without a caption; the
    image's embedding still finds them.

    Args:
      path: the folder; `metadata/` and one of `img_emb/` and `text_emb/` are in it.
      text: column of the caption; None tries the usual names.
      follow_links: also follow links to outside the folder.

    Raises:
      FileNotFoundError: a folder or a file with the same number is missing.
      ValueError: two files with the same number.
    """
    root = Folder(path, follow_links)
    metadata = _numbered(root, "metadata", ".parquet")
    parts = {
        part: next((f for n in names if (f := _numbered(root, n, ".npy"))), {})
        for part, names in _PARTS.items()
    }
    if not metadata or not any(parts.values()):
        raise FileNotFoundError(
            f"{path} must hold metadata/*.parquet and img_emb/*.npy or text_emb/*.npy"
        )
    import_parquet()
    for part, files in {"metadata": metadata, **parts}.items():
        others = [metadata, *parts.values()]
        missing = sorted({n for other in others for n in other} - set(files))
        if files and missing:
            raise FileNotFoundError(
                f"{path} has no {part} file of number {missing[0]}, but others of that "
                "number; the files of one number go together"
            )
    shards = []
    for number, file in sorted(metadata.items()):
        arrays = {part: files[number] for part, files in parts.items() if files}
        read = functools.partial(_read, root, file, arrays, text)
        shards.append(Shard(file.as_posix(), file.stat().st_size, read))
    return shards


def _numbered(root: Folder, folder: str, suffix: str) -> dict[int, pathlib.Path]:
    """The files of a folder by the last number in their name, 0 without a number."""
    found: dict[int, pathlib.Path] = {}
    for file in sorted((root.path / folder).glob(f"*{suffix}")):
        if is_hidden(file.name):
            continue
        number = int((re.findall(r"\d+", file.stem) or ["0"])[-1])
        if number in found:
            raise ValueError(
                f"{found[number]} and {file} have the same number {number}; the last "
                "number of a name says which files go together"
            )
        found[number] = file
    return found


def _read(
    root: Folder,
    file: pathlib.Path,
    arrays: Mapping[str, pathlib.Path],
    text: str | None,
) -> Iterator[RawRecord]:
    for path in (file, *arrays.values()):
        root.find(f"{path.parent.name}/{path.name}")
    rows = {part: _open_array(path) for part, path in arrays.items()}
    lengths = {part: len(array) for part, array in rows.items()}
    with import_parquet().ParquetFile(file) as opened:
        lengths["metadata"] = opened.metadata.num_rows
    if len(set(lengths.values())) != 1:
        counts = ", ".join(f"{count} of {part}" for part, count in lengths.items())
        raise BadRecord(
            "damaged file",
            f"{file} and its embeddings have different numbers of rows: {counts}",
        )
    for number, fields in enumerate(read_rows(file)):
        read = functools.partial(_make, file.stem, number, fields, rows, text)
        yield RawRecord(f"{file.as_posix()}[{number}]", read)


def _open_array(path: pathlib.Path) -> Shaped[np.ndarray, "rows d_embed"]:
    """The rows of an .npy file, memory-mapped.

    Raises:
      BadRecord: it does not hold rows of numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        message = f"{path} cannot be read: {error}"
        if "objects" in str(error).lower():
            message = (
                f"{path} holds Python objects, which are not read; save numbers, with "
                "np.save(path, np.stack(rows).astype(np.float32))"
            )
        raise BadRecord("damaged file", message) from None
    if array.ndim == 3 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "fiu" or array.ndim != 2 or not array.shape[1]:
        raise BadRecord(
            "damaged file",
            f"{path} must hold numbers of shape [rows, d_embed]; got {array.dtype} of "
            f"shape {list(array.shape)}",
        )
    return array


def _normalise(row: Shaped[np.ndarray, " d_embed"]) -> Float32[np.ndarray, " d_embed"]:
    """Of length 1.

    Raises:
      BadRecord: its norm is 0 or not finite.
    """
    row = row.astype(np.float64)
    largest = float(np.abs(row).max())
    if not np.isfinite(largest) or largest == 0:
        raise BadRecord("bad embedding", f"an embedding's largest value is {largest}")
    row = row / largest
    return (row / np.linalg.norm(row)).astype(np.float32)


def _make(
    name: str,
    number: int,
    fields: Mapping[str, Any] | None,
    rows: Mapping[str, np.ndarray],
    text: str | None,
) -> Record:
    if fields is None:
        raise BadRecord("oversized row", "its metadata is larger than allowed")
    given = pick(fields, ID_FIELDS)
    id = f"{name}/{number:08d}" if given is None else str(given)
    words = pick_captions(fields, text)
    # A document without a caption is found only by its embeddings.
    found = make_record(
        id, words[:1], fields, more_captions=words[1:], may_be_empty=True
    )
    embeddings = {part: _normalise(array[number]) for part, array in rows.items()}
    return dataclasses.replace(
        found,
        text_embedding=embeddings.get("text"),
        image_embedding=embeddings.get("image"),
    )
