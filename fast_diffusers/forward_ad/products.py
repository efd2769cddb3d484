"""Rules of sums, products, quotients and powers."""

import math
from collections.abc import Iterable
from typing import Any

import paddle
from paddle import Tensor

from fast_diffusers.forward_ad.tape import Call, register_rule


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the tangents that are not zero; they broadcast."""
    present = [term for term in terms if term is not None]
    return None if not present else sum(present[1:], present[0])


def accumulated(terms: Iterable[Tensor]) -> Tensor:
    """The sum of fresh tensors, the following ones added into the first where shapes agree, to save memory."""
    terms = iter(terms)
    out = next(terms)
    for term in terms:
        out = out.add_(term) if out.shape == term.shape else out + term
    return out


_MULTILINEAR = """
    multiply matmul bmm mv dot einsum kron cross bilinear conv2d depthwise_conv2d conv3d conv2d_transpose
    depthwise_conv2d_transpose conv3d_transpose Tensor.__mul__ Tensor.__rmul__ Tensor.__matmul__ Tensor.__rmatmul__
"""


@register_rule(*_MULTILINEAR.split())
def multilinear(call: Call, *args: Any, **kwargs: Any) -> Tensor | None:
    """Linear in every tensor separately: the product rule."""
    terms = (call.again({path: tangent}) for path, tangent in call.duals.items())
    return accumulated(term[0] if isinstance(term, list | tuple) else term for term in terms)


@register_rule("add", "Tensor.__add__", "Tensor.__radd__")
def add(call: Call, x: Any, y: Any) -> Tensor | None:
    """x + y."""
    return total(call.tangent(x), call.tangent(y))


@register_rule("subtract", "Tensor.__sub__")
def subtract(call: Call, x: Any, y: Any) -> Tensor | None:
    """x - y."""
    dx, dy = call.tangent(x), call.tangent(y)
    return dx if dy is None else -dy if dx is None else dx - dy


@register_rule("Tensor.__rsub__")
def reverse_subtract(call: Call, y: Any, x: Any) -> Tensor | None:
    """x - y, called as a method of y."""
    return subtract(call, x, y)


@register_rule("divide", "Tensor.__div__", "Tensor.__truediv__")
def divide(call: Call, x: Any, y: Any) -> Tensor | None:
    """x / y."""
    dx, dy = call.tangent(x), call.tangent(y)
    return (dx if dy is None else -call.out * dy if dx is None else dx - call.out * dy) / y


@register_rule("Tensor.__rdiv__", "Tensor.__rtruediv__")
def reverse_divide(call: Call, y: Any, x: Any) -> Tensor | None:
    """x / y, called as a method of y."""
    return divide(call, x, y)


@register_rule("remainder", "Tensor.__mod__")
def remainder(call: Call, x: Any, y: Any) -> Tensor | None:
    """x - floor(x / y) y."""
    dy = call.tangent(y)
    return total(call.tangent(x), None if dy is None else -paddle.floor_divide(x, y) * dy)


@register_rule("pow", "elementwise_pow", "Tensor.__pow__")
def power(call: Call, x: Any, y: Any) -> Tensor | None:
    """x ** y."""
    dx, dy = call.tangent(x), call.tangent(y)
    if isinstance(y, int | float) and y == 0:
        return None
    base = None if dx is None else dx * y * x ** (y - 1)
    if dy is None:
        return base
    return total(base, dy * call.out * (paddle.log(x) if isinstance(x, Tensor) else math.log(x)))


@register_rule("Tensor.__rpow__")
def reverse_power(call: Call, y: Any, x: Any) -> Tensor | None:
    """x ** y, called as a method of y."""
    return power(call, x, y)


@register_rule("linear", "linear_v2")
def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor | None:
    """x weight + bias."""
    dx, dw = call.tangent(x), call.tangent(weight)
    return total(
        None if dx is None else paddle.matmul(dx, weight),
        None if dw is None else paddle.matmul(x, dw),
        call.tangent(bias),
    )


@register_rule("addmm", "baddbmm")
def addmm(call: Call, input: Tensor, x: Tensor, y: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor | None:
    """beta input + alpha x y."""
    added, dx, dy = call.tangent(input), call.tangent(x), call.tangent(y)
    return total(
        None if added is None else beta * added,
        None if dx is None else alpha * paddle.matmul(dx, y),
        None if dy is None else alpha * paddle.matmul(x, dy),
    )


@register_rule("lerp")
def lerp(call: Call, x: Tensor, y: Tensor, weight: Tensor) -> Tensor | None:
    """x + weight (y - x)."""
    dx, dy, dw = (call.tangent(z) for z in (x, y, weight))
    return total(
        None if dx is None else dx * (1 - weight),
        None if dy is None else dy * weight,
        None if dw is None else dw * (y - x),
    )


@register_rule("prod")
def prod(call: Call, x: Tensor, axis: Any, keepdim: bool, reduce_all: bool) -> Tensor:
    """Product of elements that are not zero."""
    return paddle.sum(call.tangent(x) / x, axis=None if reduce_all else axis, keepdim=keepdim) * call.out
