"""Rules of functions of one number: tangent times derivative."""

import math
from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from fast_diffusers.errors import UserError
from fast_diffusers.forward_ad.tape import Call, register_rule

DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # name: derivative from x and y = f(x)
    "acos": lambda x, y: -paddle.rsqrt(1 - x * x),
    "acosh": lambda x, y: paddle.rsqrt(x * x - 1),
    "asin": lambda x, y: paddle.rsqrt(1 - x * x),
    "asinh": lambda x, y: paddle.rsqrt(x * x + 1),
    "atan": lambda x, y: 1 / (1 + x * x),
    "atanh": lambda x, y: 1 / (1 - x * x),
    "cos": lambda x, y: -paddle.sin(x),
    "cosh": lambda x, y: paddle.sinh(x),
    "erf": lambda x, y: 2 / math.sqrt(math.pi) * paddle.exp(-x * x),
    "exp": lambda x, y: y,
    "expm1": lambda x, y: y + 1,
    "hardswish": lambda x, y: paddle.where(x.abs() < 3, x / 3 + 0.5, (x > 0).astype(x.dtype)),
    "log": lambda x, y: 1 / x,
    "log10": lambda x, y: 1 / (x * math.log(10)),
    "log1p": lambda x, y: 1 / (1 + x),
    "log2": lambda x, y: 1 / (x * math.log(2)),
    "logsigmoid": lambda x, y: F.sigmoid(-x),
    "mish": lambda x, y: _mish(x),
    "reciprocal": lambda x, y: -y * y,
    "relu": lambda x, y: (y > 0).astype(x.dtype),
    "relu6": lambda x, y: ((x > 0) & (x < 6)).astype(x.dtype),
    "rsqrt": lambda x, y: -0.5 * y / x,
    "sigmoid": lambda x, y: y * (1 - y),
    "sin": lambda x, y: paddle.cos(x),
    "sinh": lambda x, y: paddle.cosh(x),
    "softsign": lambda x, y: (1 - y.abs()) ** 2,
    "sqrt": lambda x, y: 0.5 / y,
    "square": lambda x, y: 2 * x,
    "tan": lambda x, y: 1 + y * y,
    "tanh": lambda x, y: 1 - y * y,
    "tanh_shrink": lambda x, y: paddle.tanh(x) ** 2,
}


def _mish(x: Tensor) -> Tensor:
    inner = paddle.tanh(F.softplus(x))
    return inner + x * (1 - inner * inner) * F.sigmoid(x)


def _pointwise(derivative: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def rule(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return call.tangent(x) * derivative(x, call.out)

    return rule


for _name, _derivative in DERIVATIVES.items():
    register_rule(_name)(_pointwise(_derivative))


@register_rule("gelu")
def gelu(call: Call, x: Tensor, approximate: bool | str = False, *args: Any) -> Tensor:
    """Paddle's gradient kernel: one pass over memory, where the formula takes nine."""
    return paddle._C_ops.gelu_grad(x, call.tangent(x), bool(approximate) and approximate != "none")


@register_rule("silu", "swish")
def silu(call: Call, x: Tensor) -> Tensor:
    """x sigmoid(x), by Paddle's gradient kernel as for gelu."""
    return paddle._C_ops.silu_grad(x, call.out, call.tangent(x))


@register_rule("abs")
def absolute(call: Call, x: Tensor) -> Tensor:
    """|x|, of complex numbers too."""
    tangent = call.tangent(x)
    return (x.conj() * tangent).real() / call.out if x.is_complex() else tangent * paddle.sign(x)


@register_rule("hardsigmoid")
def hardsigmoid(call: Call, x: Tensor, slope: float, offset: float) -> Tensor:
    """slope x + offset, clipped to [0, 1]."""
    return call.tangent(x) * ((call.out > 0) & (call.out < 1)).astype(x.dtype) * slope


@register_rule("leaky_relu")
def leaky_relu(call: Call, x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x, or slope * x for negative x."""
    tangent = call.tangent(x)
    return paddle.where(x > 0, tangent, negative_slope * tangent)


@register_rule("prelu")
def prelu(call: Call, x: Tensor, alpha: Tensor, data_format: str = "NCHW", mode: str = "all") -> Tensor:
    """leaky_relu with a slope for every channel, or for all."""
    dx, slope = call.tangent(x), alpha
    if mode == "channel":
        slope = alpha.reshape([1, -1] + [1] * (x.ndim - 2) if data_format == "NCHW" else [1] * (x.ndim - 1) + [-1])
    if call.tangent(alpha) is not None or mode not in ("all", "channel"):
        raise UserError("jvp: prelu takes a tangent in x only, with one slope or one for each channel")
    return paddle.where(x > 0, dx, slope * dx)


@register_rule("elu")
def elu(call: Call, x: Tensor, alpha: float = 1.0) -> Tensor:
    """x, or alpha (exp(x) - 1) for negative x."""
    tangent = call.tangent(x)
    return paddle.where(x > 0, tangent, (call.out + alpha) * tangent)


@register_rule("softplus")
def softplus(call: Call, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta x)) / beta, and x where beta x is above the threshold."""
    tangent = call.tangent(x)
    return paddle.where(beta * x > threshold, tangent, F.sigmoid(beta * x) * tangent)


@register_rule("atan2")
def atan2(call: Call, y: Tensor, x: Tensor) -> Tensor:
    """Angle of the point (x, y)."""
    dy, dx = call.tangent(y), call.tangent(x)
    across = 0.0 if dy is None else x * dy
    return (across if dx is None else across - y * dx) / (x * x + y * y)
