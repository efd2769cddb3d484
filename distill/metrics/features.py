"""Images to feature sets: the extractors, and what is measured on the features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import paddle

from distill.data.transforms import normalise
from distill.metrics.classifier import ASSETS, ImageClassifier, shipped_classifier
from distill.metrics.distances import (
    frechet_distance,
    label_accuracy,
    mean_pairwise_distance,
    precision_recall,
    within_class_distance,
)
from distill.metrics.inception import InceptionV3


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What is kept of N images.

    features: [N, D]. predictions: the class that the extractor sees, int [N]. clip: cosine with the prompt [N].
    """

    features: np.ndarray
    predictions: np.ndarray | None = None
    clip: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)


class Extractor(Protocol):
    """Images uint8 [B, C, H, W] -> (features float32 [B, D], predicted classes int64 [B] or None).

    `identity` changes when the extractor's weights do.
    """

    identity: str

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]: ...


class ClassifierFeatures:
    """Features and labels of the classifier that ships for `data` ("digits", "mnist")."""

    def __init__(self, data: str):
        self.model: ImageClassifier = shipped_classifier(data)
        self.identity = _file_identity(f"{data} classifier", ASSETS / f"classifier_{data}.safetensors")

    @paddle.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Extractor`."""
        features, logits = self.model(paddle.to_tensor(normalise(images)))
        return features.numpy(), logits.argmax(-1).numpy()


class InceptionFeatures:
    """The 2048 features of FID, from a weight file (see `distill.metrics.inception`); gray images become RGB."""

    def __init__(self, path: str | Path):
        self.model = InceptionV3.load(path)
        self.identity = _file_identity("inception", Path(path))

    @paddle.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Extractor`."""
        rgb = np.broadcast_to(images, (len(images), 3, *images.shape[2:]))
        return self.model(paddle.to_tensor(normalise(rgb))).numpy(), None


def extract(extractor: Extractor, images: np.ndarray, batch_size: int = 500) -> FeatureSet:
    """Feature set of images uint8 [N, C, H, W]."""
    parts = [extractor(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    return join([FeatureSet(*part) for part in parts])


def join(parts: list[FeatureSet]) -> FeatureSet:
    """The rows of all parts, in order."""

    def column(pick: Callable[[FeatureSet], np.ndarray | None]) -> np.ndarray | None:
        return None if pick(parts[0]) is None else np.concatenate([pick(part) for part in parts])

    return FeatureSet(column(lambda p: p.features), column(lambda p: p.predictions), column(lambda p: p.clip))


def measure(
    samples: FeatureSet,
    reference: FeatureSet | None = None,
    same_noise: FeatureSet | None = None,
    real: FeatureSet | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, float]:
    """The metrics of a set of samples; one that needs what is not given is left out.

    frechet_teacher, precision, recall: against `reference`, the teacher's samples at many steps from other noise.
    diversity, diversity_within: mean pairwise feature distance, overall and inside the classes `labels`, as a ratio to
        the reference's, which must have been asked for the same labels.
    frechet_same_noise: against the teacher's samples at many steps from the noise that the samples come from; zero for
        a student that follows the teacher's paths exactly.
    frechet_real: against `real` images.
    accuracy: share of samples whose predicted class is the one asked for, `labels` [N].
    clip_score: mean cosine with the prompt.
    """
    metrics: dict[str, float] = {}
    if reference is not None:
        metrics["frechet_teacher"] = frechet_distance(samples.features, reference.features)
        metrics["precision"], metrics["recall"] = precision_recall(reference.features, samples.features)
        distance = mean_pairwise_distance(reference.features)
        metrics["diversity"] = mean_pairwise_distance(samples.features) / distance
        if labels is not None:
            distance = within_class_distance(reference.features, labels)
            metrics["diversity_within"] = within_class_distance(samples.features, labels) / distance
    if same_noise is not None:
        metrics["frechet_same_noise"] = frechet_distance(samples.features, same_noise.features)
    if real is not None:
        metrics["frechet_real"] = frechet_distance(samples.features, real.features)
    if labels is not None and samples.predictions is not None:
        metrics["accuracy"] = label_accuracy(samples.predictions, labels)
    if samples.clip is not None:
        metrics["clip_score"] = float(samples.clip.mean())
    return metrics


def _file_identity(name: str, path: Path) -> str:
    return f"{name}:{hashlib.sha256(path.read_bytes()).hexdigest()}"
