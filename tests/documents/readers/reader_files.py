"""Small corpora on disk, good and bad, in the formats that the readers read."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from racm3_jax.documents.readers import (
    ReadReport,
    find_shards,
    read_documents,
    read_shard_ahead,
)
from racm3_jax.types import Document


def read(source: str, max_bad: float = 1.0, **options):
    report = ReadReport(max_bad)
    found = list(read_documents(source, report=report, **options))
    assert len(found) == report.num_documents
    in_threads = ReadReport(max_bad)
    ids = [
        id
        for shard in find_shards(source, **options)
        for id in read_shard_ahead(shard, in_threads, lambda r: r.document.id)
    ]
    assert ids == [document.id for document in found]
    assert in_threads.as_dict() == report.as_dict()
    return found, report


def shape(document: Document) -> list[str]:
    return [s.modality for s in document.segments]


def make_image(number: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (number * 9 % 256, 80, 200))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def jpeg(number: int) -> bytes:
    return encoded(make_image(number, (16, 16)), "JPEG", quality=95)


def animation() -> bytes:
    frames = [Image.new("P", (5, 5), colour) for colour in (1, 2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def write_tar(path: pathlib.Path, members, mode: str = "w") -> None:
    """Members are a dict, or a list where names are repeated."""
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, mode) as archive:
        for name, data in pairs:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def write_coco(root: pathlib.Path, num_images: int = 4) -> None:
    """COCO's layout: annotations/captions_<split>.json and <split>/*.jpg."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    images, annotations = [], []
    for i in range(num_images):
        name = f"{i + 100:012d}.jpg"
        (root / "val2017" / name).write_bytes(jpeg(i))
        images.append(
            {
                "id": i + 100,
                "file_name": name,
                "license": 4,
                "height": 16,
                "width": 16,
                "coco_url": f"http://images.cocodataset.org/val2017/{name}",
            }
        )
        annotations += [
            {"id": 10 * i + j, "image_id": i + 100, "caption": f"image {i}, way {j}"}
            for j in range(2)
        ]
    content = {
        "info": {},
        "images": images[::-1],
        "annotations": annotations[::-1],
        "licenses": [{"id": 4, "name": "Attribution License"}],
    }
    file = root / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps(content))


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be read, with the reason that is counted."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    return {
        "truncated.jpg": (whole[: len(whole) // 2], "damaged image"),
        "empty.jpg": (b"", "empty image"),
        "page.jpg": (b"<html>not found</html>", "not an image"),
        "bomb.png": (encoded(Image.new("L", (2000, 2000))), "too many pixels"),
    }


def odd_images() -> dict[str, bytes]:
    """Unusual files that a user would expect to be read."""
    base = make_image(3)
    exif = base.getexif()
    exif[0x0112] = 6
    turned = encoded(base, "JPEG", exif=exif)
    broken_exif = turned.replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\0!")
    assert broken_exif != turned
    return {
        "cmyk.jpg": encoded(base.convert("CMYK"), "JPEG"),
        "alpha.png": encoded(base.convert("RGBA")),
        "palette.png": encoded(base.convert("P")),
        "grey16.png": encoded(Image.fromarray(np.full((4, 6), 40_000, np.uint16))),
        "animated.gif": animation(),
        "turned.jpg": turned,
        "broken_exif.jpg": broken_exif,
    }
