"""Measuring samples: features, distances between feature sets, CLIP score, and reports."""

from distill.metrics.clip_score import ClipScorer
from distill.metrics.distances import (
    frechet_distance,
    label_accuracy,
    mean_pairwise_distance,
    precision_recall,
    within_class_distance,
)
from distill.metrics.features import ClassifierFeatures, FeatureSet, InceptionFeatures, extract, measure
from distill.metrics.report import Report, Row

__all__ = [
    "ClassifierFeatures",
    "ClipScorer",
    "FeatureSet",
    "InceptionFeatures",
    "Report",
    "Row",
    "extract",
    "frechet_distance",
    "label_accuracy",
    "mean_pairwise_distance",
    "measure",
    "precision_recall",
    "within_class_distance",
]
