import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from distill.data import digits
from distill.metrics.classifier import ASSETS, FEATURE_DIM, ImageClassifier, shipped_classifier
from distill.train_classifier import PLANS, accuracy, arrays
from fast_diffusers.errors import UserError


@pytest.mark.parametrize("data", sorted(PLANS))
def test_shipped_weights_and_their_record(data):
    weights = ASSETS / f"classifier_{data}.safetensors"
    record = json.loads(weights.with_suffix(".json").read_text())
    assert weights.stat().st_size <= 300_000
    assert record["test_accuracy"] >= {"digits": 0.985, "mnist": 0.99}[data]
    assert f"--data {data}" in record["command"]
    model = shipped_classifier(data)
    assert model.config["widths"] == list(PLANS[data].widths)
    assert not model.training


def test_shipped_digits_classifier_reaches_its_record():
    record = json.loads((ASSETS / "classifier_digits.json").read_text())
    reached = accuracy(shipped_classifier("digits"), *arrays(digits("test")))
    assert reached == pytest.approx(record["test_accuracy"], abs=0.003)


def test_features_are_about_standardised():
    images, _ = arrays(digits("train"))
    with paddle.no_grad():
        features, logits = shipped_classifier("digits")(paddle.to_tensor(images))
    assert features.shape == [len(images), FEATURE_DIM]
    assert logits.shape == [len(images), 10]
    assert np.abs(features.numpy().mean(0)).max() < 1
    assert features.numpy().std(0) == pytest.approx(np.ones(FEATURE_DIM), abs=0.5)


def test_a_black_margin_changes_nothing():
    model = shipped_classifier("mnist")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, 28, 28)).astype(np.float32)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)
    with paddle.no_grad():
        np.testing.assert_array_equal(model(paddle.to_tensor(images))[0], model(paddle.to_tensor(padded))[0])


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 3, 8, 8), (1, 8, 8)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(UserError, match=r"takes images \[B, 1, H, W\] of at most 8 x 8 pixels, got"):
        shipped_classifier("digits")(paddle.zeros(shape))


def test_save_and_load(tmp_path):
    model = ImageClassifier(12, (4, 6), num_classes=3, channels=2)
    model.eval()
    model.save(tmp_path / "c.safetensors")
    images = paddle.randn([5, 2, 12, 12])
    for a, b in zip(model(images), ImageClassifier.load(tmp_path / "c.safetensors")(images), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match="no classifier ships for data 'faces'; there is one for: digits, mnist"):
        shipped_classifier("faces")
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no classifier weights at .*train_classifier.py"):
        ImageClassifier.load(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="not a readable classifier file"):
        ImageClassifier.load(path)
    state = load_file(ASSETS / "classifier_digits.safetensors")
    save_file(state, path)
    with pytest.raises(UserError, match="header has no config"):
        ImageClassifier.load(path)
    del state["head.bias"]
    config = shipped_classifier("digits").config
    save_file(state, path, metadata={"config": json.dumps(config)})
    with pytest.raises(UserError, match=r"wrong tensors head\.bias"):
        ImageClassifier.load(path)
