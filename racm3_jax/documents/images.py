"""Input images as uint8 RGB arrays; sizes are checked before decoding."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from racm3_jax.buckets import refuse_url

# A 20 KB file can hold 500 MB of pixels: the header is checked first.
DEFAULT_MAX_PIXELS = 64_000_000
# Formats that Pillow decodes itself; others (EPS) would start external programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
# Brands of the `ftyp` box at the start of a HEIC file.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Bit depths of grey images of cameras, scanners and microscopes, in 16 or 32 bits.
_GREY_BITS = (8, 10, 12, 14, 16)
# Exceptions of Pillow's parsers for damaged files, besides OSError.
_PARSE_ERRORS = (
    *(SyntaxError, EOFError, struct.error, zlib.error, LookupError, TypeError),
    *(RuntimeError, ArithmeticError, AssertionError, AttributeError),
)


class _SilencedWarnings:
    """Hides warnings while any thread is inside; `warnings` itself is not thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._filters.__exit__(None, None, None)


# Pillow's own limit of pixels only warns; `_check_size` refuses.
_silenced_warnings = _SilencedWarnings()


class ImageError(ValueError):
    """An image that cannot be read.

    Attributes:
      reason: the kind of error in a few words, equal for equal errors.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_image(
    source: str | os.PathLike[str] | bytes, max_pixels: int = DEFAULT_MAX_PIXELS
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads an image file as RGB.

    Transparent parts become white, deep greys are scaled to 8 bits by their range,
    CMYK and palettes are converted, the EXIF rotation is applied; of an animation the
    first image is read. HEIC needs pillow-heif.

    Args:
      source: a path, or the file's bytes.
      max_pixels: refuse larger images, before decoding them.

    Raises:
      FileNotFoundError: there is no such file.
      ImageError: the file is not an image, is damaged, or is larger than allowed.
      ValueError: a URL.
    """
    if not isinstance(source, bytes):
        refuse_url(source, "an image")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _silenced_warnings, Image.open(stream, formats=_formats()) as picture:
            _check_size(picture, name, max_pixels)
            picture.load()
            _rotate(picture)
            return _to_rgb(picture)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            "too many pixels", f"{name} has more pixels than the {max_pixels} allowed"
        ) from error
    except UnidentifiedImageError as error:
        if "HEIF" not in _formats() and _is_heic(source):
            raise ImageError(
                "HEIC without pillow-heif",
                f'{name} is a HEIC image; to read it: pip install "racm3_jax[heic]"',
            ) from error
        raise ImageError(
            "not an image",
            f"{name} is not an image; readable are {', '.join(_formats())}",
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


@functools.cache
def _formats() -> tuple[str, ...]:
    """Formats that this installation decodes: HEIC only with pillow-heif."""
    Image.init()
    wanted = _FORMATS
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        wanted = tuple(name for name in _FORMATS if name != "HEIF")
    else:
        pillow_heif.register_heif_opener()
    return tuple(name for name in wanted if name in Image.OPEN)


def _is_heic(source: str | os.PathLike[str] | bytes) -> bool:
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read(12)
    return source[4:8] == b"ftyp" and source[8:12] in _HEIC_BRANDS


def _check_size(picture: Image.Image, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            "too many pixels",
            f"{name} has {width}x{height} pixels, more than the {max_pixels} allowed; "
            "shrink it or raise max_pixels",
        )


def _rotate(picture: Image.Image) -> None:
    """Applies the EXIF rotation in place; damaged EXIF is ignored."""
    with contextlib.suppress(*_PARSE_ERRORS, ValueError, OSError):
        ImageOps.exif_transpose(picture, in_place=True)


def _to_rgb(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = _scale_grey(np.asarray(picture))
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        front = picture.convert("RGBA")
        picture = Image.new("RGBA", front.size, "white")
        picture.alpha_composite(front)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _scale_grey(
    grey: Integer[np.ndarray, "height width"] | Float[np.ndarray, "height width"],
) -> UInt8[np.ndarray, "height width"]:
    """Scales greys of more than 8 bits to 0..255, by the range of their values.

    whole numbers  0..255 as they are, 0..4095 (12 bits) / 16, 0..65535 / 256
    fractions      0..1 * 255, 0..255 as they are, 0..m * 255 / m
    with negatives from the lowest to the highest
    """
    finite = grey[np.isfinite(grey)]
    if not finite.size:
        return np.zeros(grey.shape, np.uint8)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and grey.dtype.kind != "f":
        bits = int(high).bit_length()
        shift = next((b for b in _GREY_BITS if b >= bits), bits) - _GREY_BITS[0]
        return (grey.astype(np.int64) >> shift).astype(np.uint8)
    if low >= 0:
        low, high = 0.0, 1.0 if high <= 1 else max(high, 255.0)
    values = np.nan_to_num(grey.astype(np.float64), nan=low, posinf=high, neginf=low)
    span = max(high - low, np.finfo(np.float64).tiny)
    return ((values - low) / span * 255.0).clip(0.0, 255.0).astype(np.uint8)


def encode_png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encodes without loss; the bytes depend only on the pixels."""
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
    """Crops the largest centred square and resizes it to `size` by `size` pixels."""
    if size < 1:
        raise ValueError(f"size must be >= 1; got {size}")
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))
