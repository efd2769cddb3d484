"""Classifier-free guidance as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import Tensor

from fast_diffusers.conditioning import Cond
from fast_diffusers.target_time import DenoiserWrapper
from fast_diffusers.transports import expand_time

UNCONDITIONAL_TOO = ("control",)
"""Entries of a conditioning that guidance leaves in its unconditional half, unless the null condition has its own."""


class ClassifierFree(DenoiserWrapper):
    """v_null + w (v_cond - v_null), in one batched call (Ho & Salimans 2022, arXiv 2207.12598).

    A denoiser whose `guidance` w is a scalar or [B]; without it, or where it is the number 1, only the conditional half
    is run. All else (`features`, `transformer`, ...) is the wrapped denoiser's.

    Args:
        denoiser: a denoiser that does not embed guidance.
        null_cond: what it leads away from, one row or as many as the states; otherwise of the condition's shapes.
    """

    def __init__(self, denoiser: Any, null_cond: Mapping[str, Tensor]):
        super().__init__(denoiser)
        self.null_cond = Cond(null_cond)

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Guided velocity, see `Denoiser`.

        Raises:
            ValueError: condition and null condition that differ in names or shapes, or guidance of another shape.
        """
        if guidance is None or (not isinstance(guidance, Tensor) and guidance == 1):
            return self.denoiser(x, t, cond, target_t=target_t)
        both = self.denoiser(
            paddle.concat([x, x]), _twice(t), self._conditions(cond, x.shape[0]), target_t=_twice(target_t)
        )
        conditional, null = both.chunk(2)
        return null + expand_time(guidance, null) * (conditional - null)

    def _conditions(self, cond: Mapping[str, Tensor], rows: int) -> Cond:
        """Conditional rows, then unconditional ones."""
        shared = {name: cond[name] for name in UNCONDITIONAL_TOO if name in cond and name not in self.null_cond}
        null = self.null_cond.expand(rows)
        return Cond(cond).concat(Cond({**null, **shared}))


def _twice(value: Tensor | float | None) -> Tensor | float | None:
    """A scalar as it is, values [B] for both halves."""
    return paddle.concat([value, value]) if isinstance(value, Tensor) and value.size > 1 else value
