import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from fast_diffusers.models.tiling import run_tiled, tile_starts


@pytest.mark.parametrize(
    "length, tile, overlap, starts",
    [(8, 8, 2, [0]), (5, 8, 2, [0]), (9, 8, 2, [0, 1]), (20, 8, 2, [0, 6, 12]), (21, 8, 2, [0, 6, 12, 13])],
)
def test_tiles_cover_everything_and_overlap(length, tile, overlap, starts):
    assert tile_starts(length, tile, overlap) == starts
    ends = [start + min(tile, length) for start in starts]
    assert ends[-1] == length
    assert all(end - start >= overlap for end, start in zip(ends, starts[1:], strict=False))


FUNCTIONS = {
    1: lambda x: x.square() + 1,
    2: lambda x: F.interpolate(x, scale_factor=2, mode="nearest") * 3,
    0.5: lambda x: F.avg_pool2d(x, 2),
}


@pytest.mark.parametrize("scale", FUNCTIONS)
@pytest.mark.parametrize("tile, overlap", [((8, 6), (2, 2)), ((4, 4), (0, 0)), ((6, 30), (4, 2)), ((50, 50), (8, 8))])
def test_local_functions_are_reproduced(scale, tile, overlap):
    x = paddle.randn([2, 3, 22, 16], "float64")
    found, expected = run_tiled(FUNCTIONS[scale], x, tile, overlap, scale), FUNCTIONS[scale](x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tiles_of_different_values_meet_without_a_seam():
    x = paddle.arange(40).astype("float64").reshape([1, 1, 1, 40])
    calls = []

    def rising(part):  # every tile has another level
        calls.append(part.shape)
        return paddle.full_like(part, float(len(calls)))

    out = run_tiled(rising, x, (1, 16), (0, 8)).flatten().numpy()
    assert calls == [[1, 1, 1, 16]] * 4
    steps = np.diff(out)
    assert out[0] == 1 and out[-1] == 4 and (steps >= 0).all() and steps.max() < 0.3
    np.testing.assert_allclose(out[12] - 1, 4.5**2 / (4.5**2 + 3.5**2), atol=1e-6)  # the first overlap is 8 to 15
