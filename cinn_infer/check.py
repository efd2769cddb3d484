"""How far the outputs of a graph are from those of the model, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TOLERANCES: Mapping[str, float] = {"bf16": 0.05, "int8": 0.05}
"""Errors above these mean that something is wrong; in fp32 it is the export that says how much."""


def error(output: np.ndarray, truth: np.ndarray, precision: str) -> float:
    """The error of one output.

    In fp32 the largest difference, relative to the largest entry of `truth` (at least 1); else the root mean square of
    the difference, relative to that of `truth`. Infinite if shapes differ, NaN if an entry is.
    """
    if output.shape != truth.shape:
        return float("inf")
    truth = truth.astype("float64")
    difference = output.astype("float64") - truth
    if precision == "fp32":
        return float(np.abs(difference).max(initial=0) / max(1.0, np.abs(truth).max(initial=0)))
    return float(np.sqrt(np.square(difference).mean()) / (np.sqrt(np.square(truth).mean()) or 1.0))
