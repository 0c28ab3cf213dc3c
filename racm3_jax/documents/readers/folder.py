"""A folder of images with captions.

    folder:pets   pets/cat.jpg + pets/cat.txt, cat.caption, cat.jpg.txt, or cat.json
    folder:pets   pets/captions.csv, metadata.jsonl, … (see `tables`), or in subfolders
                  pets/train/metadata.jsonl names pets/train/cat.jpg

A text file without an image is a text document, an image without a caption an image
document. A caption whose image cannot be read is neither: it is counted with its image.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers import tables
from racm3_jax.documents.readers.fields import (
    decode_sidecar,
    decode_text,
    make_record,
    pick_captions,
    unique,
)
from racm3_jax.documents.readers.files import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    VIDEO_SUFFIXES,
    Folder,
    cut_shards,
    read_file,
)
from racm3_jax.documents.readers.records import BadRecord, LeftOut, Record, Shard

_OTHER_MEDIA = UNSUPPORTED_SUFFIXES | VIDEO_SUFFIXES
_SIDECARS = (*TEXT_SUFFIXES, ".json")


def folder_shards(
    path: str,
    *,
    captions: str | None = None,
    text: str | None = None,
    encoding: str | None = None,
    follow_links: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Shards of a folder of images.

    Args:
      path: the folder; read recursively, without hidden files and folders.
      captions: a table of captions; only its rows are read. None looks for tables in
        every folder, and reads the other images too.
      text: the column, or JSON field, of the caption; None tries the usual names.
      encoding: of CSV tables; None means UTF-8, or UTF-16 with a byte order mark.
      follow_links: also follow links to outside the folder.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: no such folder, or it has no readable files.
      ValueError: a table that cannot be read, or without a column of file names.
    """
    root = Folder(path, follow_links)
    if not root.path.is_dir():
        found = f"{path} is a file" if root.path.exists() else f"there is no {path}"
        raise FileNotFoundError(f"{found}: give a folder of images with captions")
    names, refused = root.walk()
    images = [n for n in names if _suffix(n) in IMAGE_SUFFIXES]
    if captions:
        rows = _read_rows(pathlib.Path(captions), encoding, text)
        records = list(_of_tables(root, images, [("", rows)]))
    else:
        stems = {os.path.splitext(name)[0] for name in images}
        found = list(_find_tables(root, names, stems, refused, encoding, text))
        used = {table for table, _, _ in found}
        by_folder = [(folder, rows) for _, folder, rows in found]
        beside = _Sidecars(n for n in names if n not in used)
        records = [
            dataclasses.replace(r, sidecars=beside.take(r.images[0])) if r.images else r
            for r in _of_tables(root, images, by_folder)
        ]
        named = {name for record in records for name in record.images}
        records += _of_files([n for n in names if n not in used], named, beside)
    records += [_Found(f"link {i}", error=error) for i, error in enumerate(refused)]
    if not records:
        raise FileNotFoundError(
            f"{path} holds no images and no captions: put images there with their "
            "captions next to them (cat.jpg, cat.txt), or give another folder"
        )
    read = functools.partial(_read, root, text=text, max_pixels=max_pixels)
    return cut_shards(path, [(r.name, functools.partial(read, r)) for r in records])


@dataclasses.dataclass(frozen=True)
class _Found:
    """The files of one document, relative to the folder.

    Attributes:
      name: the document's id.
      images: in order; usually one, several if a row names several.
      sidecars: files with its caption, in order of preference.
      rows: of tables, with its captions and fields.
      error: why it is not a document.
    """

    name: str
    images: tuple[str, ...] = ()
    sidecars: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    error: BadRecord | LeftOut | None = None


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _read(root: Folder, found: _Found, *, text: str | None, max_pixels: int) -> Record:
    if found.error is not None:
        raise found.error
    fields: dict[str, Any] = {}
    captions: list[str | None] = []
    for row in found.rows:
        captions += pick_captions(row, text)
        fields = {**row, **fields}
    for name in found.sidecars:
        data = root.read(name)
        if name.lower().endswith(".json"):
            beside = decode_sidecar(data)
            captions += pick_captions(beside, text)
            fields |= beside
        else:
            captions.append(decode_text(data))
    images = [root.read(name) for name in found.images]
    words = unique(captions)
    return make_record(
        found.name,
        (*words[:1], *images),
        fields,
        more_captions=words[1:],
        max_pixels=max_pixels,
    )


def _read_rows(
    file: pathlib.Path, encoding: str | None, text: str | None
) -> list[tables.Row]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no table of captions {file}")
    return tables.read_table(read_file(file), str(file), encoding, text)


def _find_tables(
    root: Folder,
    names: Sequence[str],
    stems: set[str],
    refused: list[BadRecord],
    encoding: str | None,
    text: str | None,
) -> Iterator[tuple[str, str, list[tables.Row]]]:
    """(table, its folder, its rows) of every table below the folder.

    Possible tables that cannot be read are added to `refused`.
    """
    for name in sorted(names, key=lambda n: (n.count("/"), n)):
        # `cat.json` next to `cat.jpg` is the caption of that image.
        if not tables.may_be_table(name) or os.path.splitext(name)[0] in stems:
            continue
        must = tables.must_be_table(name)
        try:
            data = root.read(name)
        except BadRecord as error:
            if must:
                raise
            refused.append(error)
            continue
        shown = (root.path / name).as_posix()
        if must or tables.is_table(data, shown, encoding):
            rows = tables.read_table(data, shown, encoding, text)
            yield name, os.path.dirname(name), rows


def _of_tables(
    root: Folder,
    images: Sequence[str],
    found: Sequence[tuple[str, Sequence[tables.Row]]],
) -> Iterator[_Found]:
    """One document per image, with all rows that name it."""
    finder = _ImageFinder(images)
    merged: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    bad = []
    top = f"{root.path.as_posix()}/"
    for folder, rows in found:
        for row in rows:
            if row.error is not None:
                bad.append(_Found(row.place.removeprefix(top), error=row.error))
            else:
                names = tuple(finder.find(folder, name) for name in row.names)
                merged.setdefault(names, []).append(row.fields)
    for names, fields in merged.items():
        yield _Found("+".join(names), names, rows=tuple(fields))
    yield from bad


class _ImageFinder:
    """Finds the image that a table names, by path, or by name if it is unique.

    flickr8k/captions.txt names 1000.jpg -> Images/1000.jpg
    """

    def __init__(self, images: Sequence[str]) -> None:
        self._paths = {_compose(path): path for path in images}
        self._by_name: dict[str, list[str]] = {}
        for path in images:
            name = _compose(path.rsplit("/", 1)[-1])
            self._by_name.setdefault(name, []).append(path)

    def find(self, folder: str, name: str) -> str:
        """The path below the root; if not found, the name in `folder`."""
        if "://" in name:
            return name
        spelt = name if "\\" not in name else name.replace("\\", "/")
        # A bare name in `train/metadata.csv` is not in the parent folder.
        starts = (folder, "") if "/" in spelt else (folder,)
        for start in starts:
            for form in (name, spelt):
                path = _compose(os.path.normpath(os.path.join(start, form)))
                if path in self._paths:
                    return self._paths[path]
        same = [
            path
            for path in self._by_name.get(_compose(spelt), [])
            if not folder or path.startswith(f"{folder}/")
        ]
        return same[0] if len(same) == 1 else os.path.join(folder, name)


def _compose(name: str) -> str:
    """Normalises Unicode: macOS stores `é` as `e` and an accent."""
    return unicodedata.normalize("NFC", name)


class _Sidecars:
    """Caption files by the image next to them.

    cat.jpg: cat.jpg.txt, cat.jpg.json, cat.caption, cat.txt, cat.json
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._left: dict[str, list[str]] = {}
        self._taken: set[str] = set()
        for name in sorted(names, key=lambda name: (_suffix(name) == ".json", name)):
            if _suffix(name) in _SIDECARS:
                self._left.setdefault(os.path.splitext(name)[0], []).append(name)

    def take(self, image: str) -> tuple[str, ...]:
        """The caption files of an image; images with the same stem share them."""
        stems = dict.fromkeys((image, os.path.splitext(image)[0]))
        self._taken.update(stems)
        return tuple(name for stem in stems for name in self._left.get(stem, ()))

    def rest(self) -> Iterator[tuple[str, list[str]]]:
        """(stem, files) of the caption files without an image."""
        for stem, names in self._left.items():
            if stem not in self._taken:
                yield stem, names


def _of_files(
    names: Sequence[str], named: set[str], beside: _Sidecars
) -> Iterator[_Found]:
    """Images with their caption files, and the remaining files.

    Args:
      names: of all files except tables.
      named: images that are in tables.
      beside: caption files.
    """
    images = [n for n in names if _suffix(n) in IMAGE_SUFFIXES and n not in named]
    for name in images:
        yield _Found(name, (name,), sidecars=beside.take(name))
    stems = {os.path.splitext(name)[0] for name in (*images, *named)}
    for name in names:
        if _suffix(name) in _OTHER_MEDIA and name not in named:
            yield _Found(name, error=_judge(name, beside.take(name), stems))
    for stem, own in beside.rest():
        yield _alone(stem, own)


def _judge(name: str, sidecars: Sequence[str], stems: set[str]) -> BadRecord | LeftOut:
    """A file that is not read: an error, unless an image with its stem is read."""
    suffix = _suffix(name)
    if os.path.splitext(name)[0] in stems:
        return LeftOut(f"{suffix} file next to an image with its name")
    if suffix in VIDEO_SUFFIXES and not sidecars:
        return LeftOut(f"{suffix} file")
    return BadRecord(
        "unsupported file type",
        f"{name} is not read, as {suffix} is not supported"
        + (f", nor is its caption {sidecars[0]}" if sidecars else "")
        + "; convert it to JPEG or PNG",
    )


def _alone(stem: str, sidecars: Sequence[str]) -> _Found:
    """Caption files without an image."""
    texts = [name for name in sidecars if _suffix(name) != ".json"]
    if not texts:
        return _Found(sidecars[0], error=LeftOut(".json file without an image"))
    if _suffix(stem) in IMAGE_SUFFIXES:
        message = f"{texts[0]} is the caption of {stem}, which does not exist"
        return _Found(texts[0], error=BadRecord("missing file", message))
    return _Found(texts[0], sidecars=tuple(sidecars))
