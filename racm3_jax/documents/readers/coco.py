"""COCO captions, in the layout of its archives.

coco:coco;split=val2017   coco/annotations/captions_val2017.json + coco/val2017/*.jpg
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from racm3_jax.documents.images import DEFAULT_MAX_PIXELS
from racm3_jax.documents.readers.fields import (
    as_object,
    decode_text,
    make_record,
    parse_json,
    unique,
)
from racm3_jax.documents.readers.files import Folder, cut_shards
from racm3_jax.documents.readers.records import BadRecord, Record, Shard

Captions = Literal["first", "each", "all"]
_Named = tuple[str, Callable[[], Record]]


def coco_shards(
    path: str,
    *,
    split: str = "train2017",
    captions: Captions = "first",
    follow_links: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Shard]:
    """Shards of COCO captions.

    Args:
      path: holds `annotations/captions_<split>.json` and the folder `<split>/`.
      split: "train2017", "val2017", "train2014", ….
      captions: one document per image with its first caption, the others in the
        metadata ("first"), or with all of them ("all"), or one document per caption
        ("each").
      follow_links: also read images through links to outside the folder.
      max_pixels: of an image.

    Raises:
      FileNotFoundError: there are no annotations.
      ValueError: they are not COCO annotations.
    """
    if captions not in ("first", "each", "all"):
        raise ValueError(f'captions must be "first", "each" or "all"; got {captions!r}')
    file = pathlib.Path(path) / "annotations" / f"captions_{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}; give COCO's folder and a split, e.g. ;split=train2017"
        )
    # The captions of a split are large, but the user's own file: no limit.
    try:
        content = as_object(parse_json(file.read_bytes()))
        texts, unknown = _read_annotations(content["annotations"])
        images = sorted(content["images"], key=_sort_key)
        licences = {
            entry["id"]: entry.get("name", "")
            for entry in content.get("licenses") or ()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold COCO captions: {error!r}") from error
    folder = Folder(path, follow_links)
    records: list[_Named] = list(unknown)
    for entry in images:
        own = texts.pop(str(_get(entry, "id")), [])
        fields = {"licence": licences.get(_get(entry, "license"), "")}
        records += _of_image(folder, split, entry, fields, own, captions, max_pixels)
    for image_id, own in texts.items():
        message = f"{len(own)} captions of image {image_id}, which is not listed"
        error = BadRecord("caption of an unlisted image", message)
        records.append((f"annotations of {image_id}", _raising(error)))
    return cut_shards(f"{path}/{split}", records)


def _get(entry: Any, name: str) -> Any:
    found = entry.get(name) if isinstance(entry, Mapping) else None
    return found if isinstance(found, str | int) else None


def _sort_key(entry: Any) -> tuple[bool, int, str]:
    """Numbers in numeric order, then names."""
    name = _get(entry, "id")
    is_number = isinstance(name, int)
    return not is_number, name if is_number else 0, str(name)


def _raising(error: BadRecord) -> Callable[[], Record]:
    def read() -> Record:
        raise error

    return read


def _read_annotations(
    annotations: Sequence[Any],
) -> tuple[dict[str, list[tuple[str, Any]]], list[_Named]]:
    """(annotation's id, caption) by image, in the order of ids; and bad annotations."""
    found: dict[str, list[tuple[tuple[bool, int, str], str, Any]]] = {}
    bad: list[_Named] = []
    for number, entry in enumerate(annotations):
        image_id = _get(entry, "image_id")
        if image_id is None:
            error = BadRecord("damaged entry", f"annotation {number} names no image")
            bad.append((f"annotation {number}", _raising(error)))
            continue
        own = found.setdefault(str(image_id), [])
        given = _get(entry, "id")
        key = _sort_key(entry) if given is not None else (True, len(own), "")
        name = str(given) if given is not None else f"caption{len(own)}"
        own.append((key, name, entry.get("caption")))
    texts = {
        image: [(name, caption) for _, name, caption in sorted(own, key=lambda e: e[0])]
        for image, own in found.items()
    }
    return texts, bad


def _of_image(
    folder: Folder,
    split: str,
    entry: Any,
    fields: Mapping[str, Any],
    texts: Sequence[tuple[str, Any]],
    captions: Captions,
    max_pixels: int,
) -> Iterator[_Named]:
    image_id, file = _get(entry, "id"), _get(entry, "file_name")
    if image_id is None or file is None:
        error = BadRecord("damaged entry", "an image without an id or a file_name")
        yield f"image {image_id or file}", _raising(error)
        return
    fields = {"image_id": image_id, "file_name": file, **fields}
    source = str(entry.get("coco_url") or f"coco/{image_id}")

    def read(id: str, chosen: Sequence[Any], num_segments: int) -> Record:
        words = unique(decode_text(text) for text in chosen)
        return make_record(
            id,
            (*words[:num_segments], folder.read(f"{split}/{file}")),
            fields,
            more_captions=words[num_segments:],
            source=source,
            max_pixels=max_pixels,
        )

    texts = [(n, t) for n, t in texts if not (t is None or t == "" or str(t).isspace())]
    if captions == "each" and texts:
        for number, text in texts:
            name = f"{image_id}-{number}"
            yield name, functools.partial(read, name, [text], 1)
        return
    num_segments = 1 if captions == "first" else len(texts)
    chosen = [text for _, text in texts]
    yield str(image_id), functools.partial(read, str(image_id), chosen, num_segments)
