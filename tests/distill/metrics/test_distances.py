import numpy as np
import pytest
import scipy.linalg

from distill.metrics import distances
from distill.metrics.distances import (
    frechet_distance,
    label_accuracy,
    mean_pairwise_distance,
    precision_recall,
    within_class_distance,
)


def gaussian(n, d, seed, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).standard_normal((n, d))


def set_with_moments(mean, root, seed):
    """A feature set with exactly this mean and the covariance root^T root."""
    white = gaussian(3 * len(root), len(root), seed)
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return mean + white @ root


@pytest.mark.parametrize("rank", [16, 5])
def test_frechet_equals_sqrtm(rank):
    root_a, root_b = gaussian(rank, 16, 0), gaussian(16, 16, 1)
    mean_a, mean_b = gaussian(1, 16, 2)[0], gaussian(1, 16, 3)[0]
    a, b = root_a.T @ root_a, root_b.T @ root_b
    half = scipy.linalg.sqrtm(b)
    cross = np.trace(scipy.linalg.sqrtm(half @ a @ half)).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b) - 2 * cross
    distance = frechet_distance(set_with_moments(mean_a, root_a, 4), set_with_moments(mean_b, root_b, 5))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_closed_form_commuting_covariances():
    """Diagonal covariances: sum (mu_a - mu_b)^2 + (s_a - s_b)^2."""
    s_a, s_b, mean = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0]), np.array([0.5, -1.0, 2.0])
    expected = np.sum(mean**2) + np.sum((s_a - s_b) ** 2)
    distance = frechet_distance(set_with_moments(mean, np.diag(s_a), 0), set_with_moments(0, np.diag(s_b), 1))
    assert distance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(500, 8), (20, 64)])
def test_frechet_of_a_set_with_itself_is_zero(n, d):
    features = gaussian(n, d, 0, mean=3.0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features[::-1] + 2.0) == pytest.approx(4.0 * d, rel=1e-9)


def test_frechet_is_symmetric_and_biased_upwards():
    a, b = gaussian(400, 10, 0), gaussian(400, 10, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    large = frechet_distance(gaussian(40_000, 10, 0), gaussian(40_000, 10, 1))
    assert 0 < large < frechet_distance(a, b) / 30  # about 1/N


def test_one_dimension():
    a, b = gaussian(50, 1, 0), gaussian(60, 1, 1, mean=1.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_precision_recall_identical_and_disjoint():
    a = gaussian(300, 4, 0)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)


def test_precision_recall_of_mode_collapse():
    """Samples that cover one of two modes are precise and miss the other."""
    reference = np.concatenate([gaussian(300, 4, 0), gaussian(300, 4, 1, mean=50)])
    precision, recall = precision_recall(reference, gaussian(600, 4, 2))
    assert precision > 0.85
    assert 0.4 < recall <= 0.5


def test_collapse_on_one_point():
    reference = gaussian(200, 8, 0)
    precision, recall = precision_recall(reference, np.repeat(reference[:1], 50, axis=0))
    assert (precision, recall) == (1.0, 1 / 200)


def test_precision_recall_definition():
    """Against a loop over the definition, with several chunks."""
    reference, samples, k = gaussian(70, 3, 0), gaussian(50, 3, 1, scale=1.5), 4

    def share(points, manifold):
        distance = np.linalg.norm(manifold[:, None] - manifold[None], axis=-1)
        radii = np.sort(distance, axis=1)[:, k]
        return np.mean([(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points])

    expected = share(samples, reference), share(reference, samples)
    assert precision_recall(reference, samples, k) == pytest.approx(expected, abs=1e-12)


def test_chunks_do_not_change_results(monkeypatch):
    a, b = gaussian(101, 5, 0), gaussian(97, 5, 1)
    whole = precision_recall(a, b), mean_pairwise_distance(a)
    monkeypatch.setattr(distances, "CHUNK", 10)
    assert precision_recall(a, b) == whole[0]
    assert mean_pairwise_distance(a) == pytest.approx(whole[1], rel=1e-12)


def test_pairwise_distance_closed_form():
    assert mean_pairwise_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == pytest.approx(5.0)
    assert mean_pairwise_distance(np.array([[0.0], [1.0], [3.0]])) == pytest.approx((1 + 2 + 3) / 3)
    assert mean_pairwise_distance(gaussian(2000, 1, 0)) == pytest.approx(2 / np.sqrt(np.pi), rel=0.03)


def test_within_class_distance():
    features = np.array([[0.0], [1.0], [100.0], [103.0], [500.0]])
    assert within_class_distance(features, np.array([0, 0, 1, 1, 2])) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least two samples"):
        within_class_distance(features, np.arange(5))


def test_mode_collapse_lowers_diversity():
    features, labels = gaussian(400, 8, 0), np.arange(400) % 4
    collapsed = np.where(np.arange(400)[:, None] < 200, features, features[labels])
    assert mean_pairwise_distance(collapsed) < 0.95 * mean_pairwise_distance(features)
    assert within_class_distance(collapsed, labels) < 0.85 * within_class_distance(features, labels)


def test_label_accuracy():
    assert label_accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(np.zeros(4), np.zeros((4, 2))), r"shape \[samples, dimension\], got \[4\]"),
        (lambda: frechet_distance(np.zeros((1, 2)), np.zeros((4, 2))), "at least 2 samples, got 1"),
        (lambda: frechet_distance(np.zeros((4, 3)), np.zeros((4, 2))), "differ in dimension: 3 and 2"),
        (lambda: frechet_distance(np.full((4, 2), np.nan), np.zeros((4, 2))), "NaN or infinity in 4 of 4"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "reference needs at least 4 samples"),
        (lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), 0), "neighbours must be at least 1"),
        (lambda: label_accuracy(np.zeros(3), np.zeros(4)), r"labels must have shape \[3\], got \[4\]"),
        (lambda: label_accuracy(np.zeros(0), np.zeros(0)), "no samples"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
