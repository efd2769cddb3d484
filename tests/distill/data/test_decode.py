import io

import numpy as np
import pytest
from PIL import Image

from distill.data.decode import decode_image, read_bytes
from distill.data.records import BadRecord


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_survive(png, channels):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 6, channels), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(png(pixels), "x"), pixels)


def test_transparency_becomes_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(decode_image(saved(image), "x"), [[[255, 255, 255], [10, 20, 30]]])


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(saved(image, "JPEG", exif=exif), "x").shape == (4, 2, 3)


def test_16_bit_grayscale_keeps_its_high_byte():
    image = Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16))
    np.testing.assert_array_equal(decode_image(saved(image), "x")[..., 0], [[0, 0x80, 0xFF]])


def test_32_bit_pixels_are_refused():
    with pytest.raises(BadRecord, match="x: F pixels"):
        decode_image(saved(Image.new("F", (2, 2)), "TIFF"), "x")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_cut_off_images_are_bad(format, keep):
    data = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), format)
    with pytest.raises(BadRecord, match=r"photo: (not an image|broken image)"):
        decode_image(data[: int(len(data) * keep)], "photo")


def test_text_is_not_an_image():
    with pytest.raises(BadRecord, match="notes: not an image"):
        decode_image(b"hello", "notes")


def test_missing_file_and_folder_are_bad(tmp_path):
    with pytest.raises(BadRecord, match="does not exist"):
        read_bytes(tmp_path / "gone.png", "gone.png")
    with pytest.raises(BadRecord, match="cannot be read"):
        read_bytes(tmp_path, "folder.png")
