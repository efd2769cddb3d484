import numpy as np
import pytest

from distill.metrics.pixels import psnr


def test_psnr_of_known_differences():
    reference = np.full([4, 1, 2, 2], 100, np.uint8)
    images = reference.copy()
    images[1] += 1
    images[2] -= 51
    images[3, 0, 0, 0] = 202
    by_hand = [20 * np.log10(255) + 10 * np.log10(12), 20 * np.log10(255), 20 * np.log10(5), 20 * np.log10(255 / 51)]
    np.testing.assert_allclose(psnr(images, reference), by_hand)


@pytest.mark.parametrize("other", [np.zeros([2, 1, 4, 4], np.uint8), np.zeros([2, 1, 2, 2], np.float32)])
def test_sets_that_do_not_go_together(other):
    with pytest.raises(ValueError, match="two uint8 arrays of one shape"):
        psnr(np.zeros([2, 1, 2, 2], np.uint8), other)
