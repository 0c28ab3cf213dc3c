"""Images in the fields of a record, in all common forms.

    {"image": <bytes>}                       {"image": "cats/1.jpg"}
    {"image": {"bytes": …, "path": …}}       {"images": ["cats/1.jpg", "cats/2.jpg"]}
    {"image": "data:image/png;base64,…"}     {"image_base64": "…"}

Paths are relative to the folder of the record's file.
"""

from __future__ import annotations

import base64
import binascii
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from racm3_jax.documents.readers.files import (
    IMAGE_SUFFIXES,
    UNSUPPORTED_SUFFIXES,
    Folder,
)
from racm3_jax.documents.readers.records import BadRecord
from racm3_jax.documents.readers.remote import BucketFolder

# Fields with images, in order of preference.
IMAGE_FIELDS = (
    *("images", "image", "image_bytes", "image_base64", "img", "imgs"),
    *("jpg", "jpeg", "png", "webp", "bytes", "image_path", "image_paths", "img_path"),
)
# Fields with names of any files: an image if the suffix says so.
FILE_FIELDS = (
    *("file_name", "file", "filename", "image_file", "image_name", "path", "filepath"),
    *("file_path", "file_names", "image_file_name", "image_file_names"),
)
_BASE64_FIELDS = ("image_base64", "base64", "b64")
_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)
# Base64 prefixes of JPEG, PNG, GIF, WEBP, BMP, TIFF and AVIF or HEIC.
_BASE64_STARTS = ("/9j/", "iVBORw0", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")
# A shorter text is a path, not base64.
_MIN_BASE64 = 64


def find_images(
    fields: Mapping[str, Any],
    folder: Folder | BucketFolder | None,
    name: str | None = None,
) -> tuple[list[bytes], str | None]:
    """The images of a record.

    Args:
      fields: of the record.
      folder: base of relative paths; None ignores paths.
      name: of the field; None tries the usual ones.

    Returns:
      (encoded images, the name of their field).

    Raises:
      BadRecord: an unknown form of image, or its path may not be read.
      FileNotFoundError: there is no such file.
    """
    known = {str(field).strip().lower(): field for field in fields}
    for wanted in (name,) if name else (*IMAGE_FIELDS, *FILE_FIELDS):
        field = wanted if wanted in fields else known.get(wanted)
        if field is None:
            continue
        value = fields[field]
        if name is None and wanted in FILE_FIELDS and not names_image(value):
            continue
        if wanted in _BASE64_FIELDS and isinstance(value, str) and value:
            return [decode_base64(value)], field
        images = read_images(value, folder)
        if images:
            return images, field
    return [], None


def names_image(value: Any) -> bool:
    """Whether a field holds names of image files."""
    if isinstance(value, list | tuple | np.ndarray):
        return len(value) > 0 and all(names_image(entry) for entry in value)
    if not isinstance(value, str):
        return False
    suffix = pathlib.PurePath(value.strip()).suffix.lower()
    return suffix in IMAGE_SUFFIXES or suffix in UNSUPPORTED_SUFFIXES


def read_images(value: Any, folder: Folder | BucketFolder | None) -> list[bytes]:
    """The encoded images of one field's value; see the module's docstring.

    Raises:
      BadRecord: it is of an unknown form, or its path may not be read.
      FileNotFoundError: there is no such file.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, bytes | bytearray | memoryview):
        return [bytes(value)]
    if isinstance(value, Mapping):
        return _of_object(value, folder)
    if isinstance(value, str):
        return _of_text(value.strip(), folder)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and not any(
        isinstance(entry, int | float) for entry in value
    ):
        return [image for entry in value for image in read_images(entry, folder)]
    if folder is None:
        return []
    raise BadRecord(
        "image of an unknown form",
        "an image is bytes, a path, base64, or a list of these; got "
        f"{type(value).__name__}",
    )


def _of_object(
    value: Mapping[str, Any], folder: Folder | BucketFolder | None
) -> list[bytes]:
    for name in ("bytes", *_BASE64_FIELDS, "path", "file_name", "image", "url"):
        inner = value.get(name)
        if inner is None or inner == "":
            continue
        if name in _BASE64_FIELDS and isinstance(inner, str):
            return [decode_base64(inner)]
        return read_images(inner, folder)
    return []


def _of_text(text: str, folder: Folder | BucketFolder | None) -> list[bytes]:
    if not text:
        return []
    data_url = _DATA_URL.match(text)
    if data_url:
        return [decode_base64(text[data_url.end() :])]
    if len(text) >= _MIN_BASE64 and text.startswith(_BASE64_STARTS):
        try:
            return [decode_base64(text)]
        except BadRecord:
            # A path may start like this, too.
            pass
    return [] if folder is None else [folder.read(text)]


def decode_base64(text: str) -> bytes:
    """Base64 with or without line breaks and padding, in either alphabet.

    Raises:
      BadRecord: it is not.
    """
    plain = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"})
    plain = plain.rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("damaged base64", f"an image is not base64: {error}") from None
