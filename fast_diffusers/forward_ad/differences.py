"""Directional derivatives by central differences: for functions without rules, and to check those with."""

from collections.abc import Callable, Sequence
from typing import Any

from paddle import Tensor

from fast_diffusers.forward_ad.structure import map_leaves
from fast_diffusers.forward_ad.tape import differentiable

_WEIGHTS = {2: (1 / 2,), 6: (3 / 4, -3 / 20, 1 / 60)}
"""By order: weight of f(x + k h v) - f(x - k h v) for k = 1, 2, ... (Fornberg 1988, table 1)."""


def central_difference(
    fn: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], eps: float, order: int = 2
) -> Any:
    """Derivative of `fn` at `primals` along `tangents`, to O(eps^order), in the structure that `fn` returns.

    `order` is 2 (two calls) or 6 (six). What is not floating-point becomes None.
    """

    def at(step: float) -> Any:
        return fn(*(x if v is None else x + step * v for x, v in zip(primals, tangents, strict=True)))

    slope = None
    for k, weight in enumerate(_WEIGHTS[order], 1):
        term = map_leaves(_scaled_difference(weight / eps), at(k * eps), at(-k * eps))
        slope = term if slope is None else map_leaves(lambda a, b: None if a is None else a + b, slope, term)
    return slope


def _scaled_difference(factor: float) -> Callable[[Any, Any], Tensor | None]:
    return lambda ahead, behind: (ahead - behind) * factor if differentiable(ahead) else None
