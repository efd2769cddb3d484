"""Rules of operators that choose among their inputs: the tangent of the chosen one."""

from typing import Any

import paddle
from paddle import Tensor

from fast_diffusers.forward_ad.linear import only_first
from fast_diffusers.forward_ad.tape import Call, register_rule


@register_rule("clip")
def clip(call: Call, x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """Zero outside the bounds."""
    tangent = only_first(call)
    return paddle.where(call.out == x, tangent, paddle.zeros([], tangent.dtype))


@register_rule("maximum", "minimum", "fmax", "fmin")
def larger_or_smaller(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """The tangent of the operand that is the result (x where both are)."""
    dx, dy = (paddle.zeros([], z.dtype) if call.tangent(z) is None else call.tangent(z) for z in (x, y))
    return paddle.where(call.out == x, dx, dy)


@register_rule("max", "min", "amax", "amin")
def extremum(call: Call, x: Tensor, axis: Any = None, keepdim: bool = False, *args: Any) -> Tensor:
    """The mean tangent of the elements that are the extremum."""
    axis = axis if isinstance(axis, int) else list(axis or []) or list(range(x.ndim))
    out = call.out if keepdim else call.out.reshape(paddle.sum(x, axis=axis, keepdim=True).shape)
    chosen = (x == out).astype(x.dtype)
    number = chosen.sum(axis=axis, keepdim=keepdim)
    return paddle.sum(only_first(call) * chosen, axis=axis, keepdim=keepdim) / number


@register_rule("topk")
def topk(call: Call, x: Tensor, k: Any, axis: int = -1, *args: Any) -> Tensor:
    """Returns (values, indices)."""
    return paddle.take_along_axis(only_first(call), call.out[1], axis=axis)


@register_rule("argsort")
def argsort(call: Call, x: Tensor, axis: int = -1, *args: Any) -> Tensor:
    """Returns (sorted values, indices)."""
    return paddle.take_along_axis(only_first(call), call.out[1], axis=axis)
