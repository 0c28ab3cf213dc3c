"""Random-access formats: ArrayRecord of our own documents, and prepared TFDS builders.

    array_record:documents-*.array_record      written by `documents.store`
    tfds:coco_captions;split=val;data_dir=…    prepared with file_format=array_record

TFDS is read through its data sources, which do not need TensorFlow; images stay
encoded, and are all decoded by `documents.images`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from racm3_jax.documents import store
from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.fields import (
    ID_FIELDS,
    SOURCE_FIELDS,
    decode_text,
    make_record,
    pick,
    unique,
)
from racm3_jax.documents.readers.files import (
    RECORDS_PER_SHARD,
)
from racm3_jax.documents.readers.patterns import SourceFile, cut_files
from racm3_jax.documents.readers.records import BadRecord, RawRecord, Record, Shard

_RECORDS_PER_READ = 64


def array_record_shards(path: str, *, follow_links: bool = False) -> list[Shard]:
    """Ranges of the records of every file.

    Args:
      path: a file or a pattern; the documents keep their ids.
      follow_links: also read matching files that are links to other folders.

    Raises:
      FileNotFoundError: nothing matches.
      ValueError: a file is damaged.
    """

    def cut(file: SourceFile) -> Iterator[Shard]:
        with store.RecordFile(str(file.path)) as records:
            num_records = len(records)
        for start in range(0, num_records, RECORDS_PER_SHARD):
            stop = min(num_records, start + RECORDS_PER_SHARD)
            read = functools.partial(_read_records, str(file.path), start, stop)
            name = f"{file.path.as_posix()}[{start}:{stop}]"
            yield Shard(name, stop - start, read)

    return cut_files(path, "*.array_record", follow_links, cut)


def _read_records(file: str, start: int, stop: int) -> Iterator[RawRecord]:
    with store.RecordFile(file) as records:
        for first in range(start, stop, _RECORDS_PER_READ):
            numbers = range(first, min(stop, first + _RECORDS_PER_READ))
            for number, data in zip(numbers, records.read(list(numbers)), strict=True):
                read = functools.partial(store.decode_document, data)
                yield RawRecord(f"{file}[{number}]", read)


def tfds_shards(
    path: str,
    *,
    split: str = "train",
    data_dir: str | None = None,
    image: str | None = None,
    text: str | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Ranges of the examples of a prepared TFDS builder.

    Args:
      path: a builder's name, or the folder of a prepared one.
      split: "train", "validation[:100]", ….
      data_dir: where builders were prepared; None means TFDS's default folder.
      image: the image feature; None means the first.
      text: the text feature, with `/` for nested ones ("captions/text"); None means the
        first one named like a caption, or else the first.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: it is not prepared there.
      ValueError: prepared in another file format, or without texts and images.
    """
    import tensorflow_datasets as tfds

    builder: Any
    try:
        if data_dir is None and "/" in path:
            builder = tfds.builder_from_directory(path)
        else:
            builder = tfds.builder(path, data_dir=data_dir)
        decoding: Any = tfds.decode
        skip = {
            name: decoding.SkipDecoding()
            for name, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        examples: Any = builder.as_data_source(split, decoders=skip)
    except (tfds.core.DatasetNotFoundError, AssertionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"the TFDS builder {path!r} is not prepared here ({_first_line(error)}); "
            "prepare it with file_format=array_record, or give ;data_dir=FOLDER"
        ) from error
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"the TFDS builder {path!r} cannot be read: {_first_line(error)}; prepare it "
            "with file_format=array_record"
        ) from error
    texts = [text] if text else _text_features(builder.info.features, tfds)
    images = [image] if image else list(skip)
    if not texts and not images:
        raise ValueError(f"the TFDS builder {path!r} has neither texts nor images")
    name = f"{builder.info.full_name}/{split}"
    read = functools.partial(
        *(_read_examples, examples, name, images[:1], texts[:1], max_pixels)
    )
    return [
        Shard(
            f"{name}[{start}:{min(len(examples), start + RECORDS_PER_SHARD)}]",
            min(len(examples), start + RECORDS_PER_SHARD) - start,
            functools.partial(
                read, start, min(len(examples), start + RECORDS_PER_SHARD)
            ),
        )
        for start in range(0, len(examples), RECORDS_PER_SHARD)
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _text_features(features: Any, tfds: Any, prefix: str = "") -> list[str]:
    """Paths of the text features, those named like captions first."""
    found = []
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, tfds.features.Text):
            found.append(prefix + name)
        elif hasattr(inner, "items"):
            found += _text_features(inner, tfds, f"{prefix}{name}/")
    names = ("caption", "text")
    return sorted(
        found, key=lambda n: (not any(w in n for w in names), "filename" in n)
    )


def _read_examples(
    examples: Any,
    name: str,
    images: list[str],
    texts: list[str],
    max_pixels: int,
    start: int,
    stop: int,
) -> Iterator[RawRecord]:
    for number in range(start, stop):
        read = functools.partial(
            _make, examples, number, f"{name}/{number:08d}", images, texts, max_pixels
        )
        yield RawRecord(f"{name}[{number}]", read)


def _make(
    examples: Any,
    number: int,
    id: str,
    images: list[str],
    texts: list[str],
    max_pixels: int,
) -> Record:
    example = examples[number]
    words = unique(c for place in texts for c in _captions(_at(example, place)))
    pictures = [_at(example, place) for place in images]
    fields = {
        k: v
        for k, v in example.items()
        if k not in images and (np.ndim(v) == 0) and not isinstance(v, Mapping)
    }
    fields = {k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v
              for k, v in fields.items()}  # fmt: skip
    named = pick(fields, ID_FIELDS)
    return make_record(
        id,
        (*words[:1], *pictures),
        fields,
        more_captions=words[1:],
        source=str(pick(fields, SOURCE_FIELDS) or (named if named is not None else "")),
        max_pixels=max_pixels,
    )


def _at(example: Any, place: str) -> Any:
    for name in place.split("/"):
        if not isinstance(example, Mapping) or name not in example:
            raise BadRecord("missing feature", f"there is no feature {place!r}")
        example = example[name]
    return example


def _captions(value: Any) -> Iterator[str | None]:
    values = value if isinstance(value, np.ndarray | list | tuple) else [value]
    for caption in values:
        yield decode_text(caption)
