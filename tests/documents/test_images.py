"""Reading images of any format."""

from __future__ import annotations

import concurrent.futures
import io
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from racm3_jax.documents import images
from racm3_jax.documents.images import encode_png, read_image, resize_image


def encode(pillow_image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    pillow_image.save(stream, format=kind, **options)
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
        pillow_image = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        pillow_image = Image.new("RGB", (6, 4), "white").convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = read_image(encode(pillow_image, kind))
    assert image.dtype == np.uint8 and image.shape == (4, 6, 3)
    assert (image >= 254).all()


def test_transparency_becomes_white():
    pillow_image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (read_image(encode(pillow_image)) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0])
    assert (read_image(encode(palette, transparency=0)) == 255).all()


def test_16_bit_greys_are_scaled():
    pillow_image = Image.fromarray(np.full((2, 2), 128 * 256, np.uint16))
    assert (read_image(encode(pillow_image)) == 128).all()


def test_exif_rotation_is_applied():
    pillow_image = Image.new("RGB", (6, 4), "white")
    exif = pillow_image.getexif()
    exif[0x0112] = 6
    assert read_image(encode(pillow_image, "JPEG", exif=exif)).shape == (6, 4, 3)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims far more pixels than its few bytes contain."""

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
def test_other_files_are_refused(data):
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


def test_resize_crops_the_centre():
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


RAMP = np.tile(np.linspace(0.0, 1.0, 64), (8, 1))


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.round(RAMP * 65535).astype(np.uint16), "PNG"),
        (np.round(RAMP * 4095).astype(np.uint16), "TIFF"),
        (np.round(RAMP * 1023).astype(np.uint16), "PNG"),
        (np.round(RAMP * 255).astype(np.int32), "TIFF"),
        (np.round(RAMP * 255).astype(np.uint16), "PNG"),
        (np.round(RAMP * 65535).astype(np.int32), "TIFF"),
        (np.round(RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        (np.round(RAMP * 4095 - 1024).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 1000).astype(np.float32), "TIFF"),
        ((RAMP * 2 - 1).astype(np.float32), "TIFF"),
    ],
)
def test_deep_greys_are_scaled_by_their_range(pixels, kind):
    image = read_image(encode(Image.fromarray(pixels), kind))
    assert image.shape == (8, 64, 3)
    assert image[0, 0, 0] == 0 and image[0, -1, 0] == 255
    np.testing.assert_allclose(image[..., 0], RAMP * 255, atol=1.01)


def test_constant_greys():
    for value in (0.0, np.nan, -3.0, 1e38):
        pixels = np.full((4, 4), value, np.float32)
        assert read_image(encode(Image.fromarray(pixels), "TIFF")).std() == 0
    pixels = RAMP.astype(np.float32)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = np.nan, np.inf, -np.inf
    image = read_image(encode(Image.fromarray(pixels), "TIFF"))[..., 0]
    assert image[0, :3].tolist() == [0, 255, 0] and image[1, -1] == 255


@pytest.mark.parametrize("kind", ["AVIF", "MPO"])
def test_formats_of_phones(kind):
    pillow_image = Image.new("RGB", (64, 48), (200, 60, 40))
    image = read_image(encode(pillow_image, kind))
    assert image.shape == (48, 64, 3)
    assert (np.abs(image[0, 0].astype(int) - (200, 60, 40)) < 6).all()


@pytest.fixture
def other_formats():
    """Resets the cached list of decoders, before and after."""
    images._formats.cache_clear()
    yield
    images._formats.cache_clear()


def test_heic_without_its_library(other_formats, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    (tmp_path / "a.heic").write_bytes(data)
    for source in (data, tmp_path / "a.heic"):
        with pytest.raises(images.ImageError, match="racm3_jax\\[heic\\]") as caught:
            read_image(source)
        assert caught.value.reason == "HEIC without pillow-heif"


def test_heic(other_formats):
    heif = pytest.importorskip("pillow_heif")
    pillow_image = Image.new("RGB", (64, 48), (200, 60, 40))
    exif = pillow_image.getexif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    heif.from_pillow(pillow_image).save(stream, exif=exif.tobytes())
    data = stream.getvalue()
    image = read_image(data)
    assert image.shape in ((64, 48, 3), (48, 64, 3))
    assert (np.abs(image[0, 0].astype(int) - (200, 60, 40)) < 6).all()
    with pytest.raises(images.ImageError, match="more than the 100 allowed"):
        read_image(data, max_pixels=100)
    for broken in (data[: len(data) // 2], data[:24]):
        with pytest.raises(images.ImageError, match="image"):
            read_image(broken)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_changed_bytes_are_an_image_or_refused(kind):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    data = np.frombuffer(encode(Image.fromarray(noise), kind), np.uint8)
    for _ in range(60):
        changed = data.copy()
        changed[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
        try:
            image = read_image(changed.tobytes(), max_pixels=1 << 16)
        except images.ImageError:
            continue
        assert image.dtype == np.uint8 and image.shape[2] == 3


def test_threads_hide_warnings_and_leave_the_filters_as_they_were(monkeypatch):
    both_inside, filters = threading.Barrier(2, timeout=20), warnings.filters[:]
    to_rgb = images._to_rgb

    def wait_for_the_other(picture):
        both_inside.wait()
        warnings.warn("of Pillow", stacklevel=1)
        return to_rgb(picture)

    monkeypatch.setattr(images, "_to_rgb", wait_for_the_other)
    data = encode(Image.new("RGB", (3, 2), "red"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for image in pool.map(read_image, [data] * 20):
            assert image.shape == (2, 3, 3)
    assert warnings.filters == filters
