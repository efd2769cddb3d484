"""Extrapolation of what a model computed at earlier steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from paddle import Tensor

from fast_diffusers.models.layers import at_least_float32


def map_tensors(function: Callable[..., Tensor], *values: Any) -> Any:
    """`function` on tensors, or entry by entry on tuples of them; None stays None."""
    if values[0] is None:
        return None
    if isinstance(values[0], tuple):
        return tuple(map_tensors(function, *entries) for entries in zip(*values, strict=True))
    return function(*values)


class TaylorSeries:
    """Predicts a value (a tensor or a tuple of them) at a step from its values at earlier ones.

    TaylorSeer (arXiv 2503.06923, §3.3) expands around the last computed step with finite differences. This is the
    polynomial through the last `order` + 1 computed values, at the true distances of their steps. Up to order 1 it is
    the same; from order 2 on, sums of backward differences with factorials are not exact for polynomials, and this is.

    Values are kept as they are, so that taking one in costs nothing. Sums are float32 (float64 for float64 values).
    """

    def __init__(self, order: int):
        self.order = order
        self._steps: list[float] = []  # newest first
        self._values: list[Any] = []

    def __bool__(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self._steps)

    @property
    def last(self) -> Any:
        """The newest value."""
        return self._values[0]

    def update(self, step: float, value: Any) -> None:
        """Take in the value at a step, which must be another one than those before."""
        kept = self.order
        self._steps = [step, *self._steps[:kept]]
        self._values = [map_tensors(lambda x: x.detach(), value), *self._values[:kept]]

    def predict(self, step: float) -> Any:
        """The value at a step."""
        weights = extrapolation_weights(self._steps, step)
        return map_tensors(lambda *values: _weighted_sum(values, weights), *self._values)


def extrapolation_weights(steps: Sequence[float], step: float) -> list[float]:
    """Lagrange's: what to multiply values at `steps` by to get that at `step` of the polynomial through them."""
    return [
        math.prod((step - other) / (own - other) for j, other in enumerate(steps) if j != i)
        for i, own in enumerate(steps)
    ]


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return sum(at_least_float32(x) * weight for x, weight in zip(values, weights, strict=True)).astype(values[0].dtype)
