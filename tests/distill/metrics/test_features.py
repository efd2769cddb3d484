import numpy as np
import pytest

from distill.data import digits
from distill.metrics.features import ClassifierFeatures, FeatureSet, InceptionFeatures, extract, join, measure
from distill.metrics.inception import InceptionV3


@pytest.fixture(scope="module")
def images():
    return digits("test").images.transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def extractor():
    return ClassifierFeatures("digits")


def test_extraction_does_not_depend_on_the_batch_size(images, extractor):
    whole, pieces = extract(extractor, images), extract(extractor, images, batch_size=100)
    assert whole.features.shape == (len(images), 64)
    assert len(whole) == len(images)
    np.testing.assert_allclose(whole.features, pieces.features, atol=1e-5)
    np.testing.assert_array_equal(whole.predictions, pieces.predictions)
    assert whole.predictions.dtype == np.int64


def test_measure_leaves_out_what_is_not_given(images, extractor):
    features, labels = extract(extractor, images), digits("test").labels
    assert measure(features) == {}
    assert measure(features, labels=labels).keys() == {"accuracy"}
    assert measure(features, features).keys() == {"frechet_teacher", "precision", "recall", "diversity"}
    with_clip = FeatureSet(features.features, clip=np.full(len(features), 0.3))
    assert measure(with_clip, labels=labels) == {"clip_score": pytest.approx(0.3)}


def test_mode_collapse(images, extractor):
    features, labels = extract(extractor, images), digits("test").labels
    first = np.array([np.flatnonzero(labels == label)[0] for label in labels])  # one image for each class
    collapsed = FeatureSet(features.features[first], features.predictions[first])
    metrics = measure(collapsed, features, features, labels=labels)
    assert metrics["diversity_within"] < 1e-6
    assert metrics["diversity"] > 0.8  # the classes are still apart
    assert metrics["recall"] < 0.1
    assert metrics["precision"] == 1.0
    assert metrics["frechet_teacher"] == metrics["frechet_same_noise"] > 1


def test_join():
    parts = [FeatureSet(np.zeros((2, 3)), np.array([1, 2])), FeatureSet(np.ones((1, 3)), np.array([3]))]
    joined = join(parts)
    assert joined.features.shape == (3, 3)
    np.testing.assert_array_equal(joined.predictions, [1, 2, 3])
    assert joined.clip is None


def test_inception_features_of_gray_images(tmp_path, monkeypatch):
    path = tmp_path / "inception.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setattr(InceptionV3, "load", classmethod(lambda cls, path: cls()))
    extractor = InceptionFeatures(path)
    gray = np.random.default_rng(0).integers(0, 256, (2, 1, 20, 20), dtype=np.uint8)
    features, predictions = extractor(gray)
    assert features.shape == (2, 2048)
    assert predictions is None
    np.testing.assert_allclose(features, extractor(np.repeat(gray, 3, axis=1))[0], rtol=1e-5, atol=1e-6)
    assert extractor.identity.startswith("inception:")
