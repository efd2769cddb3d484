import numpy as np
import pytest

from distill.data.transforms import fit_image, normalise


@pytest.mark.parametrize("channels", [1, 3])
def test_same_size_is_untouched(channels):
    image = np.random.default_rng(0).integers(0, 256, (6, 9, channels), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(image, 6, 9, channels), image.transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (12, 8), (40, 24)])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_shape_and_constant(height, width, before, after):
    image = np.full((20, 30, before), 77, dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(image, height, width, after), np.full((after, height, width), 77))


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_is_central(axis):
    # 24 wide with the middle 8 white: cropping to a square keeps exactly the white part
    image = np.zeros((8, 24, 1), dtype=np.uint8)
    image[:, 8:16] = 255
    image = image if axis else image.transpose(1, 0, 2)
    np.testing.assert_array_equal(fit_image(image, 8, 8, 1), np.full((1, 8, 8), 255))


def test_downscaling_keeps_the_mean_and_upscaling_a_ramp():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 1), dtype=np.uint8)
    assert abs(fit_image(noise, 16, 16, 1).mean() - noise.mean()) < 1
    ramp = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 16, 1)).copy()
    row = fit_image(ramp, 32, 32, 1)[0, 16, 4:-4].astype(float)
    np.testing.assert_allclose(np.diff(row), 5, atol=1.5)


def test_gray_is_luma_and_rgb_repeats_gray():
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert (fit_image(red, 2, 2, 1) == round(0.299 * 255)).all()
    gray = np.array([[[3], [200]]], dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(gray, 1, 2, 3), [[[3, 200]]] * 3)


def test_range():
    out = normalise(np.array([0, 127, 128, 255], dtype=np.uint8))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [-1, -1 / 255, 1 / 255, 1], atol=1e-7)
