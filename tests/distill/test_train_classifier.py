import json

import numpy as np
import pytest

from distill import train_classifier
from distill.data import digits
from distill.metrics.classifier import ImageClassifier
from distill.train_classifier import Plan, accuracy, arrays, augment, main, train
from fast_diffusers.errors import UserError

SHORT = Plan(image_size=8, widths=(8, 16), epochs=3, max_shift=0.5)


def test_same_seed_same_weights_and_it_learns():
    images, labels = arrays(digits("train"))
    models = [train(SHORT, images, labels, seed) for seed in (0, 0, 1)]
    weights = [np.concatenate([w.numpy().ravel() for w in model.parameters()]) for model in models]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.abs(weights[0] - weights[2]).max() > 1e-3
    assert accuracy(models[0], *arrays(digits("test")), batch_size=100) > 0.85


def test_augmentation_is_mild_and_keeps_the_range():
    images, _ = arrays(digits("train"))
    moved = augment(images[:200], np.random.default_rng(0), 0.5).numpy()
    assert moved.shape == (200, 1, 8, 8)
    assert moved.min() >= -1.000001
    assert moved.max() <= 1.000001
    change = np.abs(moved - images[:200]).mean(axis=(1, 2, 3))
    assert 0.01 < change.mean() < 0.5
    black = augment(np.full((3, 1, 8, 8), -1, np.float32), np.random.default_rng(0), 0.5).numpy()
    np.testing.assert_allclose(black, -1)


def test_command_line_writes_weights_and_record(tmp_path, monkeypatch):
    monkeypatch.setitem(train_classifier.PLANS, "digits", SHORT)
    output = tmp_path / "new" / "digits.safetensors"
    main(["--data", "digits", "--seed", "3", "--output", str(output)])
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["seed"] == 3
    assert record["command"] == f"python distill/train_classifier.py --data digits --seed 3 --output {output}"
    assert accuracy(ImageClassifier.load(output), *arrays(digits("test"))) == pytest.approx(
        record["test_accuracy"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist", "--output", "x.safetensors"], "mnist: no folder is given"),
        (["--data", "digits", "--output", "x.pdparams"], r"--output must name a .safetensors file"),
    ],
)
def test_command_line_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_unknown_data_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--data", "cifar", "--output", "x.safetensors"])
    assert error.value.code == 2
    assert "invalid choice: 'cifar'" in capsys.readouterr().err
