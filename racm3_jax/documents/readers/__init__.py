"""Readers of documents: `read_documents("kind:path;option=value")`.

folder        images with caption files next to them, or tables of captions
coco          COCO's annotations and images
webdataset    tars, as img2dataset writes them
parquet       images and captions in columns
jsonl         interleaved documents, one per line
tfds          a builder prepared on disk
array_record  documents written by `documents.store`
embeddings    precomputed .npy embeddings with parquet metadata
flagworld     the built-in world; other worlds by their names (`racm3_jax.worlds`)

A path may start with `~`, and may be a pattern for kinds that read files: `*/*.tar`,
`s-{00000..00099}.tar`. Hidden files are never read, nor links to outside the folder
(`;follow_links=true` reads those). webdataset, parquet and jsonl also read from buckets:
`webdataset:gs://me/{0000..0099}.tar`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from racm3_jax.buckets import is_url
from racm3_jax.documents.readers.coco import coco_shards
from racm3_jax.documents.readers.embeddings import embedding_shards
from racm3_jax.documents.readers.files import (
    IMAGE_SUFFIXES,
    expand_home,
)
from racm3_jax.documents.readers.folder import folder_shards
from racm3_jax.documents.readers.jsonl import jsonl_shards
from racm3_jax.documents.readers.parquet import parquet_shards
from racm3_jax.documents.readers.records import (
    BadRecord,
    RawRecord,
    ReadReport,
    Record,
    Shard,
    read_shard,
    read_shard_ahead,
)
from racm3_jax.documents.readers.records_on_disk import (
    array_record_shards,
    tfds_shards,
)
from racm3_jax.documents.readers.remote import refuse_kind
from racm3_jax.documents.readers.tar import tar_shards
from racm3_jax.documents.readers.world import world_options, world_shards
from racm3_jax.types import Document
from racm3_jax.worlds import WORLDS, find_world, list_worlds

__all__ = [
    "BadRecord",
    "RawRecord",
    "ReadReport",
    "Record",
    "Shard",
    "find_shards",
    "read_documents",
    "read_shard",
    "read_shard_ahead",
    "refuse_inside",
    "with_links",
]

READERS: dict[str, Callable[..., list[Shard]]] = {
    "folder": folder_shards,
    "coco": coco_shards,
    "webdataset": tar_shards,
    "parquet": parquet_shards,
    "jsonl": jsonl_shards,
    "tfds": tfds_shards,
    "array_record": array_record_shards,
    "embeddings": embedding_shards,
}
_KIND_OF_SUFFIX = {
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".array_record": "array_record",
}
_BOOLEANS = {
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
    "1": True,
    "0": False,
}


def read_documents(
    source: str,
    *,
    max_bad: float = 0.1,
    report: ReadReport | None = None,
    **options: Any,
) -> Iterator[Document]:
    """Streams the documents of a source.

    Args:
      source: "kind:path", e.g. "webdataset:coco/train-*.tar"; options may follow, e.g.
        "coco:data;split=val2017". The kind may be omitted if the path shows it.
      max_bad: maximum fraction of bad records, which are skipped; more are an error.
      report: counts what is read and what is skipped.
      **options: of the reader, as after `;`.

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: an unknown kind or option, or too many bad records.
    """
    report = report or ReadReport(max_bad)
    shards = find_shards(source, **options)
    return (record.document for record in _read(shards, report))


def _read(shards: list[Shard], report: ReadReport) -> Iterator[Record]:
    for shard in shards:
        yield from read_shard(shard, report)
    report.check(final=True)


def find_shards(source: str, **options: Any) -> list[Shard]:
    """The shards of a source, in a fixed order; see `read_documents`."""
    kind, path, written = parse_source(source)
    options = {**written, **options}
    reader, allowed = _open_kind(kind)
    for name, value in options.items():
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1, 0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{kind} has no option {name!r}{hint}")
        if isinstance(value, str):
            options[name] = _convert(kind, name, value, allowed[name])
    for place in (path, *options.values()):
        refuse_kind(kind, place)
    try:
        shards = reader(path, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_advise(kind, path)}") from error
    if not shards:
        raise FileNotFoundError(f"{source} holds no records")
    return shards


def _open_kind(kind: str) -> tuple[Callable[..., list[Shard]], Mapping[str, Any]]:
    """The reader of a kind, and its options with their defaults."""
    if kind not in READERS:
        world = find_world(kind)
        return functools.partial(world_shards, kind, world), world_options(world)
    parameters = inspect.signature(READERS[kind]).parameters.values()
    return READERS[kind], {
        p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY
    }


def _convert(kind: str, name: str, value: str, default: Any) -> Any:
    """Converts an option to the type of its default: boolean, number or string."""
    if isinstance(default, bool):
        if value.lower() not in _BOOLEANS:
            raise ValueError(
                f"{kind}'s option {name} is one of {', '.join(_BOOLEANS)}; got {value!r}"
            )
        return _BOOLEANS[value.lower()]
    if isinstance(default, int):
        try:
            return int(float(value))
        except (ValueError, OverflowError):
            raise ValueError(
                f"{kind}'s option {name} is a number; got {value!r}"
            ) from None
    return expand_home(value)


def parse_source(source: str) -> tuple[str, str, dict[str, str]]:
    """`"coco:data;split=val2017"` -> `("coco", "data", {"split": "val2017"})`.

    Raises:
      ValueError: an unknown kind, an option without `=`, no path, or a path of unclear
        kind.
    """
    place, *written = source.split(";")
    options = {}
    for option in written:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"an option of a source is name=value; got {option!r}")
        options[name.strip()] = value
    kind, colon, path = place.partition(":")
    is_kind = bool(colon) and _is_kind(kind)
    if not place.strip() or (is_kind and not path.strip()):
        raise ValueError(
            f"the source {source!r} has no path; give kind:path, as folder:pets (the "
            "current folder is folder:.)"
        )
    if is_kind:
        return kind, expand_home(path), options
    place = expand_home(place)
    if is_url(place):
        return _guess_kind(place), place, options
    if colon and "/" not in kind and not pathlib.Path(place).exists():
        kinds = _list_kinds()
        near = difflib.get_close_matches(kind, kinds, 1, 0.0)
        raise ValueError(
            f"unknown source kind {kind!r}; did you mean {near[0]!r}? The kinds are "
            f"{', '.join(kinds)}"
        )
    return _guess_kind(place), place, options


def _is_kind(name: str) -> bool:
    # The worlds of other packages last: it takes longer.
    return name in READERS or name in WORLDS or name in list_worlds()


def _list_kinds() -> list[str]:
    return [*READERS, *list_worlds()]


def _guess_kind(place: str) -> str:
    path = pathlib.Path(place)
    for suffix, kind in _KIND_OF_SUFFIX.items():
        if path.name.endswith(suffix):
            return kind
    if path.is_dir():
        if (path / "annotations").is_dir():
            return "coco"
        if (path / "metadata").is_dir() and not _has_images(path):
            return "embeddings"
        return "folder"
    raise ValueError(
        f"the path {place!r} does not show what kind of source it is; give kind:path "
        f"with one of {', '.join(_list_kinds())}"
    )


def with_links(source: str) -> str:
    """The source with `follow_links=true`."""
    return f"{source};follow_links=true"


def refuse_inside(source: str, path: str | pathlib.Path, change: str) -> None:
    """Refuses to write below a folder that is read: outputs would be read as images.

    Raises:
      ValueError: `path` is the folder of a source, or inside it; ends with `change`.
    """
    kind, folder, _ = parse_source(source)
    if kind == "folder" and _resolve(path).is_relative_to(_resolve(folder)):
        raise ValueError(
            f"{path} is inside {folder}, the source, so that images written there would "
            f"be read as documents: {change}"
        )


def _resolve(path: str | pathlib.Path) -> pathlib.Path:
    # Unlike Path.resolve, it does not raise for a link to itself.
    return pathlib.Path(os.path.realpath(path))


def _advise(kind: str, path: str) -> str:
    """Advice for a folder of files of another kind."""
    folder = pathlib.Path(path)
    if kind == "folder" and folder.is_dir():
        for suffix, other in _KIND_OF_SUFFIX.items():
            if next(folder.rglob(f"*{suffix}"), None) is not None:
                return f"; its {suffix} files are read as {other}:{path}/**/*{suffix}"
    return ""


def _has_images(path: pathlib.Path) -> bool:
    return any(p.suffix.lower() in IMAGE_SUFFIXES for p in path.iterdir())
