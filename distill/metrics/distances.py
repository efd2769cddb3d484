"""How far apart two sets of feature vectors are: pure functions of float64 arrays.

A feature set is an array [N, D]; any float dtype is accepted, the arithmetic is float64 throughout. Every function
raises ValueError when a set is not [N, D], holds NaN or infinity, or is too small for the statistic.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1024  # rows per block of a distance matrix: 80 MB of float64 against 10,000 columns


def check_features(features: np.ndarray, name: str = "features", minimum: int = 2) -> np.ndarray:
    """`features` as a finite float64 [N, D] array with N >= `minimum`; ValueError otherwise."""
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [samples, dimension], got {list(array.shape)}")
    if len(array) < minimum:
        raise ValueError(f"{name} needs at least {minimum} samples, got {len(array)}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        raise ValueError(f"{name} holds NaN or infinity in {bad} of {len(array)} samples")
    return array


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of two feature sets [N, D] and [M, D]: FID when the features are Inception's.

    It is the squared 2-Wasserstein distance of the Gaussians with the sets' means and covariances A and B,
    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    With finite sets it is biased upwards, roughly by a term in D/N: compare it only at equal sample counts, and against
    the distance of two independent sets of samples of one model.
    """
    features_a, features_b = check_features(features_a), check_features(features_b)
    _check_same_width(features_a, features_b)
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(features_a), _mean_and_root(features_b)
    # With A = P^T P and B = Q^T Q the last trace is the sum of the singular values of P Q^T. No covariance is formed:
    # nothing loses digits by squaring, and sets smaller than the dimension are as good as any.
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross
    return float(max(distance, 0.0))


def _mean_and_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and a matrix R [min(N, D), D] with R^T R the unbiased covariance."""
    mean = features.mean(axis=0)
    return mean, np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")


def precision_recall(reference: np.ndarray, samples: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall of `samples` [M, D] against `reference` [N, D], both in [0, 1].

    A set's manifold is the union of the balls around its points that reach to each point's `neighbours`-th nearest
    neighbour in the set. Precision is the share of samples inside the reference's manifold (fidelity), recall the share
    of reference points inside the samples' manifold (coverage) (Kynkäänniemi et al. 2019, eq. 1-3).
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    reference = check_features(reference, "reference", neighbours + 1)
    samples = check_features(samples, "samples", neighbours + 1)
    _check_same_width(reference, samples)
    centre = reference.mean(axis=0)  # distances by |a|^2 + |b|^2 - 2ab cancel less around the origin
    reference, samples = reference - centre, samples - centre
    return _covered(samples, reference, neighbours), _covered(reference, samples, neighbours)


def _covered(points: np.ndarray, manifold: np.ndarray, neighbours: int) -> float:
    """Share of `points` inside the k-nearest-neighbour balls of `manifold`."""
    radii = np.concatenate(
        # a point is its own nearest neighbour, at index 0
        [
            np.partition(_squared_distances(rows, manifold), neighbours, axis=1)[:, neighbours]
            for rows in _rows(manifold)
        ]
    )
    inside = [(_squared_distances(rows, manifold) <= radii).any(axis=1) for rows in _rows(points)]
    return float(np.concatenate(inside).mean())


def mean_pairwise_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of different samples of a feature set [N, D]."""
    features = check_features(features)
    features = features - features.mean(axis=0)
    total = sum(np.sqrt(_squared_distances(rows, features)).sum() for rows in _rows(features))
    return float(total / (len(features) * (len(features) - 1)))


def within_class_distance(features: np.ndarray, labels: np.ndarray) -> float:
    """`mean_pairwise_distance` inside each class, averaged over the classes.

    labels: [N] integers. Classes with one sample are left out; ValueError when no class has two.
    """
    features, labels = check_features(features), np.asarray(labels)
    _check_labels(features, labels)
    classes = [features[labels == label] for label in np.unique(labels)]
    distances = [mean_pairwise_distance(members) for members in classes if len(members) > 1]
    if not distances:
        raise ValueError("within-class distance needs a class with at least two samples")
    return float(np.mean(distances))


def label_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of `predictions` [N] (integers) that equal `labels` [N], in [0, 1]."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    _check_labels(predictions, labels)
    if not len(labels):
        raise ValueError("accuracy of no samples is undefined")
    return float(np.mean(predictions == labels))


def _rows(array: np.ndarray) -> list[np.ndarray]:
    return [array[start : start + CHUNK] for start in range(0, len(array), CHUNK)]


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [N, M] of the rows of a [N, D] and b [M, D].

    The expansion leaves rounding noise where the two rows coincide; what lies below it is set to exactly zero.
    """
    norms = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)
    squares = norms - 2 * (a @ b.T)
    squares[squares < 1e-14 * a.shape[1] * norms] = 0
    return squares


def _check_same_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"feature sets differ in dimension: {a.shape[1]} and {b.shape[1]}")


def _check_labels(samples: np.ndarray, labels: np.ndarray) -> None:
    if labels.shape != (len(samples),):
        raise ValueError(f"labels must have shape [{len(samples)}], got {list(labels.shape)}")
