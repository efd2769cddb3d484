"""`jvp`: the value and the directional derivative of a function of tensors."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import paddle
from paddle import Tensor

from fast_diffusers import compat
from fast_diffusers.errors import UserError
from fast_diffusers.forward_ad.differences import central_difference
from fast_diffusers.forward_ad.structure import map_leaves
from fast_diffusers.forward_ad.tape import Tape, differentiable


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor] | Tensor,
    tangents: Sequence[Tensor | None] | Tensor,
    *,
    mode: Literal["exact", "finite_difference"] = "exact",
    eps: float = 3e-3,
) -> tuple[Any, Any]:
    """`fn(*primals)` and its derivative along `tangents`, in one forward pass without gradients or graph.

    Everything that `fn` reads besides its arguments is constant. Integer and boolean results, `detach()` and operators
    that are flat almost everywhere (`floor`, `sign`) end a tangent, and so does the constructor
    `paddle.Tensor(x)`. `fn` may call `jvp`.

    Args:
        fn: function of tensors; it returns a tensor, or tuples, lists and dictionaries of them.
        primals: its arguments, floating-point; one tensor stands for a sequence of one.
        tangents: a direction for each, of its shape and dtype; None is zero.
        mode: "finite_difference" takes (fn(p + eps t) - fn(p - eps t)) / (2 eps) instead, for functions that use
            operators without a rule; it costs three forwards and is good to about three digits in float32.
        eps: the step of that difference.

    Returns:
        (outputs, output_tangents), the second of the structure of the first: zeros for what does not depend on the
        primals, None for what cannot have a tangent.

    Raises:
        UserError: primals and tangents do not match, an operator has no rule, a value that depends on the primals
            leaves Paddle (`numpy()`, `item()`), or an in-place operator would lose a tangent.
    """
    primals = [primals] if isinstance(primals, Tensor) else list(primals)
    tangents = [tangents] if isinstance(tangents, Tensor) else list(tangents)
    _check(primals, tangents, mode)
    with paddle.no_grad():
        if mode == "finite_difference":
            return fn(*primals), central_difference(fn, primals, tangents, eps)
        return _exact(fn, primals, tangents)


def _exact(fn: Callable[..., Any], primals: list[Tensor], tangents: list[Tensor | None]) -> tuple[Any, Any]:
    tape = Tape()
    try:
        inputs = [x.clone() for x in primals]  # other objects: what fn reads otherwise stays constant
        for x, tangent in zip(inputs, tangents, strict=True):
            tape.set(x, tangent)
        with compat.intercepted_operators(tape.handle):
            outputs = fn(*inputs)
        return outputs, map_leaves(lambda x: _tangent_or_zero(tape, x), outputs)
    finally:
        tape.clear()


def _check(primals: list[Tensor], tangents: list[Tensor | None], mode: str) -> None:
    if mode not in ("exact", "finite_difference"):
        raise UserError(f"jvp: mode must be 'exact' or 'finite_difference', got {mode!r}")
    if len(primals) != len(tangents):
        raise UserError(f"jvp: {len(primals)} primals, but {len(tangents)} tangents")
    for index, (x, tangent) in enumerate(zip(primals, tangents, strict=True)):
        if not differentiable(x):
            raise UserError(f"jvp: primal {index} must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
        if tangent is not None and (tangent.shape != x.shape or tangent.dtype != x.dtype):
            raise UserError(
                f"jvp: tangent {index} is {tangent.dtype} {list(tangent.shape)}, "
                f"its primal {x.dtype} {list(x.shape)}; they must agree"
            )


def _tangent_or_zero(tape: Tape, x: Any) -> Tensor | None:
    if not differentiable(x):
        return None
    tangent = tape.tangent(x)
    return paddle.zeros_like(x) if tangent is None else tangent
