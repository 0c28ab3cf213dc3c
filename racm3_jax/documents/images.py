"""Images from outside, as uint8 RGB arrays; nothing is decoded before it is measured."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# A 20 KB file can hold 500 MB of pixels: the header is checked first.
DEFAULT_MAX_PIXELS = 64_000_000
# Formats that Pillow decodes by itself; others (EPS) would start foreign programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What Pillow's parsers raise on damaged files besides OSError.
_PARSE_ERRORS = (SyntaxError, EOFError, struct.error, zlib.error, IndexError, TypeError)


class ImageError(ValueError):
    """An image that cannot be read.

    Attributes:
      reason: the kind of fault, in a few words, equal for equal faults.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_image(
    source: str | os.PathLike[str] | bytes, max_pixels: int = DEFAULT_MAX_PIXELS
) -> UInt8[np.ndarray, "height width 3"]:
    """Read an image file as RGB.

    Transparent parts are laid on white, 16-bit greys are scaled to 8 bits, CMYK and
    palettes are converted, the EXIF rotation is applied; of an animation the first
    picture is read.

    Args:
      source: a path, or the file's bytes.
      max_pixels: refuse larger images, before decoding them.

    Raises:
      FileNotFoundError: there is no such file.
      ImageError: the file is not an image, is damaged, or is larger than allowed.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns; ours is checked below.
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=_FORMATS) as picture:
                _check_size(picture, name, max_pixels)
                picture.load()
                return _to_rgb(_rotated(picture))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            "too many pixels", f"{name} has more pixels than the {max_pixels} allowed"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            "not an image",
            f"{name} is not an image; readable are {', '.join(_FORMATS)}",
        ) from error
    except IsADirectoryError as error:
        raise ImageError(
            "not an image", f"{name} is not an image but a directory"
        ) from error
    except _PARSE_ERRORS as error:
        raise ImageError("not an image", f"{name} is not an image: {error}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(
            "damaged image", f"{name} is a damaged image: {error}"
        ) from error


def _check_size(picture: Image.Image, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            "too many pixels",
            f"{name} has {width}x{height} pixels, more than the {max_pixels} allowed; "
            "shrink it or raise max_pixels",
        )


def _rotated(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF says; damaged EXIF spoils no pixels, so it is ignored."""
    try:
        return ImageOps.exif_transpose(picture)
    except (*_PARSE_ERRORS, KeyError, ValueError, OSError):
        return picture


def _to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if picture.mode == "F":
        grey = np.asarray(picture).clip(0.0, 255.0).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        front = picture.convert("RGBA")
        picture = Image.new("RGBA", front.size, "white")
        picture.alpha_composite(front)
    return np.array(picture.convert("RGB"))


def encode_png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encode without loss; the bytes depend on the pixels alone."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            "image must be uint8[height, width, 3]; got "
            f"{image.dtype}{list(image.shape)}"
        )
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


def resize_image(
    image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Cut the largest centred square and resample it to `size` by `size` pixels."""
    if size < 1:
        raise ValueError(f"size must be >= 1; got {size}")
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))
