"""LPIPS against a second implementation in NumPy, with random weights under the names of the published ones."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import save_file

from distill.metrics.lpips import LAYERS, LPIPS
from fast_diffusers.errors import UserError


@pytest.fixture(scope="module")
def weights():
    rng, state = np.random.default_rng(0), {}
    for index, (number, part, entry, out, kernel, *_) in enumerate(LAYERS):
        scale = (entry * kernel * kernel) ** -0.5
        weight = rng.standard_normal([out, entry, kernel, kernel], np.float32) * scale
        state[f"net.slice{part}.{number}.weight"] = weight
        state[f"net.slice{part}.{number}.bias"] = rng.standard_normal(out, np.float32) * 0.1
        state[f"lin{index}.model.1.weight"] = rng.random([1, out, 1, 1], np.float32)
    return state


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(weights, path)
    return path


def by_hand(weights, images, reference):
    """The paper's equation 1 for uint8 RGB images."""

    def features(pixels):
        x = (pixels / 127.5 - 1 - np.reshape([-0.030, -0.088, -0.188], [3, 1, 1])) / np.reshape(
            [0.458, 0.448, 0.450], [3, 1, 1]
        )
        for number, part, _, _, kernel, stride, padding in LAYERS:
            if number in (3, 6):
                x = sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((-1, -2))
            x = np.pad(x, [(0, 0), (0, 0), (padding,) * 2, (padding,) * 2])
            windows = sliding_window_view(x, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
            x = np.einsum("nchwij,ocij->nohw", windows, weights[f"net.slice{part}.{number}.weight"], optimize=True)
            x = np.maximum(x + weights[f"net.slice{part}.{number}.bias"][:, None, None], 0)
            yield x / np.linalg.norm(x, axis=1, keepdims=True)

    pairs = zip(features(images), features(reference), strict=True)
    return sum(((a - b) ** 2 * weights[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2)) for i, (a, b) in enumerate(pairs))


def test_distances(weights, path):
    rng = np.random.default_rng(1)
    images, reference = rng.integers(0, 256, [2, 3, 3, 35, 47], dtype=np.uint8)
    model = LPIPS.load(path)
    expected = by_hand(weights, images.astype(np.float64), reference.astype(np.float64))
    np.testing.assert_allclose(model.distances(images, reference, batch_size=2), expected, rtol=1e-4)
    assert not model.distances(images, images).any()
    gray = images[:, :1]
    rgb = np.repeat(gray, 3, axis=1)
    np.testing.assert_allclose(model.distances(gray, reference), model.distances(rgb, reference), rtol=1e-6)
    with pytest.raises(UserError, match="at least 31 pixels"):
        model.distances(images[..., :30], reference[..., :30])


def test_files_that_are_not_its_weights(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no LPIPS weights"):
        LPIPS.load(tmp_path / "none")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"pickled")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        LPIPS.load(file)
    save_file({name: tensor for name, tensor in weights.items() if name != "lin2.model.1.weight"}, file)
    with pytest.raises(UserError, match=r"lin2\.model\.1\.weight is missing"):
        LPIPS.load(file)
    save_file(weights | {"net.slice1.0.bias": np.zeros(7, np.float32)}, file)
    with pytest.raises(UserError, match=r"net\.slice1\.0\.bias is \[7\], not \[64\]"):
        LPIPS.load(file)
