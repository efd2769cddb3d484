import numpy as np
import paddle
import pytest
from PIL import Image

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.image_input import image_size, image_tensor

PIXELS = np.random.default_rng(0).integers(0, 256, [2, 4, 6, 3], dtype=np.uint8)
TRUTH = PIXELS.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1


@pytest.mark.parametrize(
    "images",
    [
        [Image.fromarray(each) for each in PIXELS],
        tuple(PIXELS),
        PIXELS,
        PIXELS.astype(np.float32) / 255,
        list(PIXELS.astype(np.float64) / 255),
        paddle.to_tensor(TRUTH),
    ],
    ids=["pil", "uint8 list", "uint8", "float", "float list", "tensor"],
)
def test_all_kinds_of_images(images):
    found = image_tensor(images, 4, 6)
    assert found.dtype == paddle.float32
    np.testing.assert_allclose(found, TRUTH, atol=1e-6)


def test_one_image():
    for image in (Image.fromarray(PIXELS[0]), PIXELS[0]):
        np.testing.assert_allclose(image_tensor(image, 4, 6), TRUTH[:1], atol=1e-6)


def test_pil_images_are_made_rgb_and_resized():
    gray = Image.new("L", (50, 30), 255)
    np.testing.assert_array_equal(image_tensor(gray, 4, 6), np.ones([1, 3, 4, 6]))


def test_gray_images():
    gray = PIXELS[..., :1]
    for images in (gray, [Image.fromarray(each[..., 0]) for each in gray], paddle.to_tensor(TRUTH[:, :1])):
        np.testing.assert_allclose(image_tensor(images, 4, 6, channels=1), TRUTH[:, :1], atol=1e-6)
    with pytest.raises(UserError, match=r"image must have shape \[4, 6, 1\], got \[4, 6, 3\]"):
        image_tensor(PIXELS, 4, 6, channels=1)


@pytest.mark.parametrize(
    "images, size",
    [
        (Image.new("L", (6, 4)), (4, 6)),
        ([Image.new("L", (6, 4)), Image.new("L", (9, 9))], (4, 6)),
        (PIXELS, (4, 6)),
        (PIXELS[0], (4, 6)),
        (list(PIXELS), (4, 6)),
        (paddle.to_tensor(TRUTH), (4, 6)),
        ([], None),
        ("image.png", None),
        (PIXELS[0, 0], None),
        (paddle.to_tensor(TRUTH[0]), None),
    ],
)
def test_size_of_the_first_image(images, size):
    assert image_size(images) == size


@pytest.mark.parametrize(
    "images, message",
    [
        (PIXELS[0, ..., 0], r"control must have shape \[4, 6, 3\], got \[4, 6\]"),
        (PIXELS[:, :2], r"control must have shape \[4, 6, 3\], got \[2, 6, 3\]"),
        (paddle.zeros([1, 3, 6, 4]), r"control must have shape \[B, 3, 4, 6\], got \[1, 3, 6, 4\]"),
        (PIXELS.astype(np.float32), "uint8, or floats in .0, 1.; got 1 to 248"),
        (np.full([4, 6, 3], np.nan), "uint8, or floats in .0, 1.; got nan"),
        ("image.png", "control must be PIL images, arrays or a tensor, got str"),
        ([], "control is an empty list"),
    ],
)
def test_bad_images_are_one_message(images, message):
    with pytest.raises(UserError, match=message):
        image_tensor(images, 4, 6, "control")
