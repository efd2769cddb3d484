import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from distill.data.memory import digits, mnist, read_idx
from fast_diffusers.errors import UserError

MNIST = Path(os.environ.get("FAST_DIFFUSERS_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "mnist"


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def tiny_mnist(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 5), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_digits_are_the_scikit_learn_digits():
    source, bunch = digits("all"), load_digits()
    assert len(source) == 1797
    for index in (0, 700, 1796):
        record = source[index]
        assert record.image.dtype == np.uint8 and record.image.shape == (8, 8, 1)
        np.testing.assert_array_equal(np.rint(record.image[..., 0] / 255 * 16), bunch.images[index])
        assert record.prompt == str(bunch.target[index]) and record.name == f"digits-all[{index}]"
    assert source.images.min() == 0 and source.images.max() == 255


def test_digits_splits_are_stratified_and_disjoint():
    train, test, everything = digits("train"), digits("test"), digits("all")
    assert len(train) + len(test) == len(everything)
    rows = sorted(image.tobytes() for part in (train, test) for image in part.images)
    assert rows == sorted(image.tobytes() for image in everything.images)
    share = np.bincount(test.labels) / np.bincount(everything.labels)
    assert (abs(share - 0.2) < 0.005).all()


def test_identity_follows_the_content():
    assert digits("test").identity == digits("test").identity
    assert digits("test").identity != digits("train").identity
    changed = digits("test")
    changed.images = changed.images.copy()
    changed.images[3, 2, 2] ^= 1
    assert changed.identity != digits("test").identity


@pytest.mark.parametrize(("split", "prompts"), [("train", "01234"), ("test", "012"), ("all", "01234012")])
def test_mnist_splits(tiny_mnist, split, prompts):
    source = mnist(tiny_mnist, split)
    assert [source[i].prompt for i in range(len(source))] == list(prompts)
    assert source[0].image.shape == (28, 28, 1)


def test_mnist_padding(tiny_mnist):
    plain, padded = mnist(tiny_mnist, "train"), mnist(tiny_mnist, "train", size=32)
    np.testing.assert_array_equal(padded.images[:, 2:-2, 2:-2], plain.images)
    assert padded.images.shape == (5, 32, 32, 1) and padded.images.sum() == plain.images.sum()


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"MNIST not found at {MNIST}")
def test_real_mnist():
    source = mnist(MNIST, "test")
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_missing_files_are_named(tiny_mnist):
    (tiny_mnist / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.gz not found in .*set download=true"):
        mnist(tiny_mnist, "train")
    with pytest.raises(UserError, match="no folder is given"):
        mnist()


def test_download_goes_through_paddle(tiny_mnist, monkeypatch):
    class FakeMNIST:
        def __init__(self, mode, download):
            assert (mode, download) == ("train", True)
            self.image_path = str(tiny_mnist / "train-images-idx3-ubyte.gz")
            self.label_path = str(tiny_mnist / "train-labels-idx1-ubyte.gz")

    monkeypatch.setattr("paddle.vision.datasets.MNIST", FakeMNIST)
    assert len(mnist(None, "train", download=True)) == 5
    monkeypatch.setattr("paddle.vision.datasets.MNIST", lambda **_: (_ for _ in ()).throw(RuntimeError("offline")))
    with pytest.raises(UserError, match=r"download failed \(offline\)"):
        mnist(None, "train", download=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"not gzip", "not a whole gzip file"),
        (lambda data: data[: len(data) // 2], "not a whole gzip file"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-7]), r"holds 3929 bytes, its header says 3936"),
        (lambda data: gzip.compress(b"\0\0\x08\x01" + gzip.decompress(data)[4:]), r"magic number 00000801"),
        (lambda data: gzip.compress(b""), "not an idx file"),
        (lambda data: idx(np.zeros((4, 28, 28), np.uint8)), "has 4 images but .* has 5 labels"),
        (lambda data: idx(np.zeros((5, 8, 8), np.uint8)), "images of 8x8 pixels, expected 28x28"),
    ],
)
def test_damaged_files_are_named(tiny_mnist, damage, message):
    path = tiny_mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz.*{message}"):
        mnist(tiny_mnist, "train")


def test_read_idx_checks_dimensions(tiny_mnist):
    with pytest.raises(UserError, match="not an idx file of bytes with 1 dimensions"):
        read_idx(tiny_mnist / "train-images-idx3-ubyte.gz", ndim=1)


@pytest.mark.parametrize("call", [lambda: digits("trian"), lambda: mnist("x", "trian")])
def test_unknown_split_names_the_nearest(call):
    with pytest.raises(UserError, match="split 'trian': did you mean 'train'"):
        call()


@pytest.mark.parametrize("size", [27, 26, 31, "32"])
def test_bad_padding(tiny_mnist, size):
    with pytest.raises(UserError, match="mnist size must be an even number"):
        mnist(tiny_mnist, size=size)


def test_bad_folder_type():
    with pytest.raises(UserError, match="mnist folder must be a path, not 3"):
        mnist(3)
