import zlib
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from distill.metrics.inception import ConvReLU, InceptionV3
from fast_diffusers.errors import UserError

GOLDEN = Path(__file__).parents[2] / "assets" / "metrics" / "inception_outputs.safetensors"


def stored_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value that tests/assets/make_metric_goldens.py gave the tensor `name`."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("conv.weight"):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.endswith(("running_var", "bn.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.normal(0, 0.1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def state():
    """A pytorch-fid state dict."""
    state = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for layer, module in InceptionV3().named_sublayers():
        if isinstance(module, ConvReLU):
            shape = tuple(module.weight.shape)
            state[f"{layer}.conv.weight"] = stored_weight(f"{layer}.conv.weight", shape)
            for suffix in ("weight", "bias", "running_mean", "running_var"):
                state[f"{layer}.bn.{suffix}"] = stored_weight(f"{layer}.bn.{suffix}", shape[:1])
            state[f"{layer}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return state


def test_features_equal_torchvision_with_fid_pooling(tmp_path, state):
    save_file(state, tmp_path / "inception.safetensors")
    model = InceptionV3.load(tmp_path / "inception.safetensors")
    golden = load_file(GOLDEN)
    with paddle.no_grad():
        features = model(paddle.to_tensor(golden["image"])).numpy()
    assert features.shape == (1, 2048)
    np.testing.assert_allclose(features, golden["features"], rtol=1e-4, atol=1e-4)
    assert golden["features"].std() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_6a.branch3x3.conv.weight": None}, "Mixed_6a.branch3x3.conv.weight is missing"),
        ({"Mixed_7c.branch1x1.bn.bias": np.zeros(3, np.float32)}, r"Mixed_7c.branch1x1.bn.bias is \[3\], not \[320\]"),
        ({"Mixed_9z.conv.weight": np.zeros(1, np.float32)}, "Mixed_9z.conv.weight is unknown"),
        ({"AuxLogits.fc.bias": np.zeros(1000, np.float32)}, "torchvision's ImageNet weights"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, state, change, message):
    changed = {name: value for name, value in (state | change).items() if value is not None}
    save_file(changed, tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match=message):
        InceptionV3.load(tmp_path / "inception.safetensors")


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Inception weights at"):
        InceptionV3.load(tmp_path / "inception.safetensors")
    (tmp_path / "inception.pth").write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(UserError, match="convert pytorch-fid's weights first"):
        InceptionV3.load(tmp_path / "inception.pth")
