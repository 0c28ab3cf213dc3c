"""MS-COCO in its original layout, and the fixed lists of test images.

    coco/annotations/captions_val2014.json     {"images": […], "annotations": […]}
    coco/val2014/COCO_val2014_000000391895.jpg
    coco/dataset_coco.json                     the Karpathy splits, for captioning

A list is chosen by sha256 of COCO's numbers: the same on every machine, without a seed and
independent of the order of the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from racm3_jax.documents.images import read_image, resize_image
from racm3_jax.types import Document, Segment

KARPATHY_FILE = "dataset_coco.json"


@dataclasses.dataclass(frozen=True)
class CocoItem:
    """One image of the test set.

    Attributes:
      image_id: COCO's number of the image.
      path: of its file.
      caption: the prompt for text to image.
      captions: all of its captions, the references of captioning.
    """

    image_id: int
    path: Path
    caption: str
    captions: tuple[str, ...]

    def read(self, size: int) -> Any:
        """The pixels: the largest centred square, bicubic, uint8[size, size, 3]."""
        return resize_image(read_image(self.path), size)

    def document(self, size: int) -> Document:
        """Caption and image, as a document."""
        segments = (Segment(text=self.caption), Segment(image=self.read(size)))
        return Document(f"coco-{self.image_id}", segments)


def read_coco(
    directory: str | os.PathLike[str], split: str = "val2014"
) -> list[CocoItem]:
    """All images of a split that have captions; one caption of each is the prompt.

    The prompt is the caption whose number has the smallest sha256.

    Raises:
      ValueError: no such folder, or a file that is not from COCO.
    """
    directory = Path(directory)
    record = _read_json(directory / "annotations" / f"captions_{split}.json")
    captions: dict[int, list[tuple[str, str]]] = {}
    for entry in record["annotations"]:
        text = " ".join(entry["caption"].split())
        captions.setdefault(entry["image_id"], []).append((_sha256(entry["id"]), text))
    return [
        CocoItem(
            image["id"],
            directory / split / image["file_name"],
            min(captions[image["id"]])[1],
            tuple(text for _, text in captions[image["id"]]),
        )
        for image in record["images"]
        if image["id"] in captions
    ]


def read_karpathy(
    directory: str | os.PathLike[str], split: str = "test"
) -> list[CocoItem]:
    """The Karpathy split (5,000 images in "test" and in "val"), in the file's order.

    Raises:
      ValueError: no such file or split.
    """
    directory = Path(directory)
    record = _read_json(directory / KARPATHY_FILE)
    items = []
    for image in record["images"]:
        if image["split"] == split:
            captions = tuple(sentence["raw"] for sentence in image["sentences"])
            path = directory / image["filepath"] / image["filename"]
            items.append(CocoItem(image["cocoid"], path, captions[0], captions))
    if not items:
        found = sorted({image["split"] for image in record["images"]})
        raise ValueError(f"no split {split!r} in {KARPATHY_FILE}; it has {found}")
    return items


def choose_items(items: Sequence[CocoItem], count: int) -> list[CocoItem]:
    """The first `count` images by sha256 of their number.

    Raises:
      ValueError: if there are fewer.
    """
    if not 1 <= count <= len(items):
        raise ValueError(
            f"{count} images are asked for, the split has {len(items)}: set num_items to "
            f"1..{len(items)}"
        )
    return sorted(items, key=lambda item: _sha256(item.image_id))[:count]


def fingerprint_items(items: Sequence[CocoItem]) -> str:
    """A fingerprint of numbers, captions and their order (not the pixels)."""
    content = [[item.image_id, item.caption, *item.captions] for item in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def fingerprint_files(items: Sequence[CocoItem]) -> str:
    """Changes when an image's file is replaced by one of another size.

    The bytes are not read: 30,000 images are 5 GB.
    """
    sizes = [[item.image_id, item.path.stat().st_size] for item in items]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def _sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: unpack COCO's annotations there (its images are next to "
            "the folder annotations/)"
        )
    record = json.loads(path.read_text())
    if "images" not in record:
        raise ValueError(f"{path} is not a COCO file: it has no list of images")
    return record
