"""Reading foreign images."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from racm3_jax.documents.images import encode_png, read_image, resize_image


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


def test_png_round_trip_from_bytes_and_path(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    data = encode_png(image)
    assert data == encode_png(image.copy())
    np.testing.assert_array_equal(read_image(data), image)
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        picture = Image.new("RGB", (6, 4), "white").convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = read_image(encode(picture, kind))
    assert image.dtype == np.uint8 and image.shape == (4, 6, 3)
    assert (image >= 254).all()


def test_transparency_is_laid_on_white():
    picture = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (read_image(encode(picture)) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0])
    assert (read_image(encode(palette, transparency=0)) == 255).all()


def test_16_bit_greys_are_scaled():
    picture = Image.fromarray(np.full((2, 2), 128 * 256, np.uint16))
    assert (read_image(encode(picture)) == 128).all()


def test_exif_rotation_is_applied():
    picture = Image.new("RGB", (6, 4), "white")
    exif = picture.getexif()
    exif[0x0112] = 6
    assert read_image(encode(picture, "JPEG", exif=exif)).shape == (6, 4, 3)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than its few bytes hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [1001, 12_000, 60_000])
def test_large_images_are_refused_by_their_header(side):
    with pytest.raises(
        ValueError, match="more (pixels )?than the 1000000 allowed|than"
    ):
        read_image(png_of(side, side), max_pixels=1_000_000)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_other_files_are_no_images(data):
    with pytest.raises(ValueError, match="is not an image"):
        read_image(data)


def test_damaged_images_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    data = encode_png(noise)
    for broken in (data[: len(data) // 2], data[:20], png_of(10, 100)):
        with pytest.raises(ValueError, match="image"):
            read_image(broken)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="directory"):
        read_image(tmp_path)


def test_resize_cuts_the_centre():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    small = resize_image(image, 5)
    assert small.shape == (5, 5, 3) and (small == 200).all()
    assert resize_image(small, 5) is small
    with pytest.raises(ValueError, match="size must be >= 1"):
        resize_image(image, 0)


def test_encode_png_refuses_other_arrays():
    with pytest.raises(ValueError, match="float64\\[2, 2, 3\\]"):
        encode_png(np.zeros((2, 2, 3)))
