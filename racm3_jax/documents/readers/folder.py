"""A folder of images with captions, and COCO's folder.

    folder:pets            pets/cat.jpg + pets/cat.txt, or + pets/cat.json {"caption": …}
    folder:pets            pets/captions.csv, metadata.csv, captions.jsonl, metadata.jsonl
                           with a column file_name (or file, filename, image, path)
    coco:coco;split=val2017   coco/annotations/captions_val2017.json + coco/val2017/*.jpg

A text file without an image is a document of text, an image without a caption one of an
image.
"""

from __future__ import annotations

import csv
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.records import (
    BadRecord,
    RawRecord,
    Shard,
    decode_json,
    decode_text,
    make_document,
    pick,
    pick_text,
)
from racm3_jax.types import Document

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
)
TABLE_NAMES = ("captions.csv", "metadata.csv", "captions.jsonl", "metadata.jsonl")
_FILE_FIELDS = ("file_name", "file", "filename", "image", "image_path", "path")
RECORDS_PER_SHARD = 4096

Captions = Literal["first", "each", "all"]


def folder_shards(
    path: str,
    *,
    captions: str | None = None,
    text: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Shards of a folder of images.

    Args:
      path: the folder; read with all below it.
      captions: a CSV or JSONL file with the captions; None looks for the usual names.
      text: the column, or JSON field, of the caption; None looks for the usual names.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: no such folder, or nothing readable in it.
      ValueError: a table without a column of file names.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    tables = [root / name for name in TABLE_NAMES if (root / name).is_file()]
    if captions:
        tables = [pathlib.Path(captions)]
    read = functools.partial(_read_files, text=text, max_pixels=max_pixels)
    if tables:
        rows = _read_table(tables[0])
        named = [
            (name, functools.partial(_of_row, root, name, row)) for name, row in rows
        ]
    else:
        files = sorted(p for p in root.rglob("*") if p.is_file())
        named = list(_pair_files(root, files))
    if not named:
        raise FileNotFoundError(f"{root} holds no images and no captions")
    return cut_shards(
        path, [(n, functools.partial(read, root, n, find)) for n, find in named]
    )


def cut_shards(
    name: str, records: Sequence[tuple[str, Callable[[], Document]]]
) -> list[Shard]:
    """Ranges of a list of records as shards."""

    def open_range(start: int) -> Iterator[RawRecord]:
        for record, read in records[start : start + RECORDS_PER_SHARD]:
            yield RawRecord(f"{name}/{record}", read)

    return [
        Shard(
            f"{name}[{start}:{min(len(records), start + RECORDS_PER_SHARD)}]",
            min(RECORDS_PER_SHARD, len(records) - start),
            functools.partial(open_range, start),
        )
        for start in range(0, len(records), RECORDS_PER_SHARD)
    ]


class _Files:
    """What belongs to one document: an image, its caption file, or its table row."""

    def __init__(
        self,
        image: pathlib.Path | None = None,
        sidecars: Sequence[pathlib.Path] = (),
        row: Mapping[str, Any] | None = None,
    ) -> None:
        self.image = image
        self.sidecars = sidecars
        self.row = row


def _pair_files(
    root: pathlib.Path, files: Sequence[pathlib.Path]
) -> Iterator[tuple[str, Callable[[], _Files]]]:
    sidecars: dict[pathlib.Path, list[pathlib.Path]] = {}
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    for path in files:
        if path.suffix.lower() in (".txt", ".json"):
            sidecars.setdefault(path.with_suffix(""), []).append(path)
    for image in images:
        own = sidecars.get(image.with_suffix(""), [])
        name = image.relative_to(root).as_posix()
        yield name, functools.partial(_Files, image, own)
    used = {image.with_suffix("") for image in images}
    for stem, own in sidecars.items():
        if stem not in used and own[-1].suffix.lower() == ".txt":
            name = own[-1].relative_to(root).as_posix()
            yield name, functools.partial(_Files, None, own)


def _of_row(root: pathlib.Path, name: str, row: Mapping[str, Any]) -> _Files:
    return _Files(inside(root, name), row=row)


def _read_files(
    root: pathlib.Path,
    name: str,
    find: Callable[[], _Files],
    *,
    text: str | None,
    max_pixels: int,
) -> Document:
    files = find()
    fields: dict[str, Any] = dict(files.row or {})
    caption = pick_text(fields, text)
    for path in files.sidecars:
        if path.suffix.lower() == ".json":
            fields |= decode_json(path.read_bytes())
            caption = pick_text(fields, text) or caption
        else:
            caption = decode_text(path.read_bytes()) or caption
    picture = files.image.read_bytes() if files.image is not None else None
    return make_document(name, (caption, picture), fields, max_pixels=max_pixels)


def inside(root: pathlib.Path, name: str) -> pathlib.Path:
    """`root/name`, refused where that lies outside of `root`.

    Raises:
      BadRecord: a path that leads out of the folder.
    """
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise BadRecord("path outside the folder", f"{name!r} leads out of {root}")
    return path


def _read_table(table: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """File name and fields of every row of a CSV or JSONL file."""
    if not table.is_file():
        raise FileNotFoundError(f"there is no table of captions {table}")
    rows: list[dict[str, Any]]
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table} is not a UTF-8 table: {error}") from error
    found = [(pick(row, _FILE_FIELDS), row) for row in rows]
    if any(name is None for name, _ in found):
        raise ValueError(
            f"{table} has rows without a file name; one of the columns "
            f"{', '.join(_FILE_FIELDS)} must hold it"
        )
    return [(str(name), row) for name, row in found]


def coco_shards(
    path: str,
    *,
    split: str = "train2017",
    captions: Captions = "first",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Shards of COCO captions as COCO's own archives unpack.

    Args:
      path: holds `annotations/captions_<split>.json` and the folder `<split>/`.
      split: "train2017", "val2017", "train2014", ….
      captions: one document an image with its first caption ("first") or with all of
        them ("all"), or one document a caption ("each").
      max_pixels: of an image.

    Raises:
      FileNotFoundError: no annotations there.
      ValueError: they are not COCO's.
    """
    if captions not in ("first", "each", "all"):
        raise ValueError(f'captions must be "first", "each" or "all"; got {captions!r}')
    root = pathlib.Path(path)
    file = root / "annotations" / f"captions_{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}; give COCO's folder and ;split=train2017 or the like"
        )
    try:
        content = json.loads(file.read_bytes())
        images, licences = content["images"], content.get("licenses", ())
        texts: dict[int, list[tuple[int, str]]] = {}
        for a in content["annotations"]:
            texts.setdefault(a["image_id"], []).append((a["id"], a["caption"]))
        names = {entry["id"]: entry.get("name", "") for entry in licences}
        records = [
            record
            for entry in sorted(images, key=lambda entry: entry["id"])
            for record in _coco_image(
                root / split,
                entry,
                sorted(texts.get(entry["id"], [])),
                names.get(entry.get("license"), ""),
                captions,
                max_pixels,
            )
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold COCO captions: {error!r}") from error
    return cut_shards(f"{path}/{split}", records)


def _coco_image(
    folder: pathlib.Path,
    entry: Mapping[str, Any],
    texts: Sequence[tuple[int, str]],
    licence: str,
    captions: Captions,
    max_pixels: int,
) -> list[tuple[str, Callable[[], Document]]]:
    image_id = int(entry["id"])
    file = str(entry["file_name"])
    fields = {"image_id": image_id, "file_name": file, "licence": licence}
    source = str(entry.get("coco_url") or f"coco/{image_id}")

    def read(id: str, chosen: Sequence[str]) -> Document:
        picture = inside(folder, file).read_bytes()
        return make_document(
            id, (*chosen, picture), fields, source=source, max_pixels=max_pixels
        )

    words = [text for _, text in texts]
    if captions == "each" and words:
        return [
            (
                f"{image_id}-{number}",
                functools.partial(read, f"{image_id}-{number}", [t]),
            )
            for number, t in texts
        ]
    words = words[:1] if captions == "first" else words
    return [(str(image_id), functools.partial(read, str(image_id), words))]
