import numpy as np
import paddle
import pytest

from fast_diffusers.denoisers.packing import check_packable, pack, unpack
from fast_diffusers.random import Generator, randn


def test_tokens_are_patches():
    """Token (i, j) holds channel c, row p and column q of its patch at 4 c + 2 p + q."""
    x = randn([2, 3, 6, 4], Generator(0))
    expected = np.zeros([2, 6, 12], np.float32)
    for i, j, c, p, q in np.ndindex(3, 2, 3, 2, 2):
        expected[:, 2 * i + j, 4 * c + 2 * p + q] = x.numpy()[:, c, 2 * i + p, 2 * j + q]
    np.testing.assert_array_equal(pack(x).numpy(), expected)
    assert paddle.equal_all(unpack(pack(x), 3, 2), x)


@pytest.mark.parametrize("shape", [[2, 2, 6, 4], [2, 3, 5, 4], [2, 3, 6, 3], [2, 3, 1, 6, 4]], ids=str)
def test_what_cannot_be_packed(shape):
    check_packable(paddle.zeros([2, 3, 6, 4]), 12, "FLUX")
    with pytest.raises(ValueError, match=r"do not fit this FLUX model: it takes \[B, 3, H, W\] with even H and W"):
        check_packable(paddle.zeros(shape), 12, "FLUX")
