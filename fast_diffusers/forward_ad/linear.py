"""Rules of operators that are linear in a tensor: the tangent goes through the operator itself."""

from typing import Any

import paddle
from paddle import Tensor

from fast_diffusers.errors import UserError
from fast_diffusers.forward_ad.tape import Call, differentiable, register_rule


def only_first(call: Call) -> Tensor:
    """The tangent of the first tensor argument; an error if another argument has one."""
    first = next(path for path, _ in call.tensors())
    if list(call.duals) != [first]:
        raise UserError(f"jvp: the rule of '{call.name}' takes a tangent in its first tensor only, got {[*call.duals]}")
    return call.duals[first]


_IN_FIRST = """
    assign cast reshape view_shape transpose squeeze unsqueeze flatten slice strided_slice split split_with_num
    unbind unstack expand tile flip roll tril triu diagonal diag trace as_strided repeat_interleave
    repeat_interleave_with_tensor_index gather gather_nd index_select index_sample take_along_axis masked_select sum
    mean mean_all reduce_as cumsum as_real as_complex real imag conj fft_c2c fft_r2c fft_c2r pixel_shuffle
    pixel_unshuffle channel_shuffle unfold fold linear_interp bilinear_interp nearest_interp bicubic_interp
    trilinear_interp memcpy_h2d memcpy_d2h share_data Tensor.clone Tensor.contiguous Tensor._copy_to
    Tensor._tensor_use_gpudnn Tensor._getitem_dygraph
"""


@register_rule(*_IN_FIRST.split())
def in_first(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Linear in the first tensor; other tensors are indices or sizes."""
    only_first(call)
    return call.again(dict(call.duals))


@register_rule("expand_as")
def expand_as(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Of the second tensor only the shape is read."""
    tangent = call.tangent(x)
    return None if tangent is None else tangent.expand(call.out.shape)


_JOINTLY = """
    concat stack add_n where meshgrid broadcast_tensors complex index_put index_add scatter scatter_nd_add
"""


@register_rule(*_JOINTLY.split())
def jointly(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Linear in all floating-point tensors together."""
    constants = {path: paddle.zeros_like(x) for path, x in call.tensors() if differentiable(x)}
    return call.again(constants | call.duals)


@register_rule("put_along_axis")
def put_along_axis(call: Call, arr: Tensor, indices: Tensor, values: Tensor, axis: int, reduce: str, *rest: Any) -> Any:
    """Linear where values replace others or are added to them."""
    if reduce not in ("assign", "add"):
        raise UserError(f"jvp: put_along_axis with reduce='{reduce}' has no forward-mode rule")
    return jointly(call)


@register_rule("masked_fill")
def masked_fill(call: Call, x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """`value` where the mask is set, x elsewhere."""
    tangents = (call.tangent(y) for y in (value, x))
    filled, kept = (paddle.zeros([], x.dtype) if y is None else y for y in tangents)
    return paddle.where(mask.expand(call.out.shape), filled, kept)


@register_rule("scale")
def scale(call: Call, x: Tensor, scale: float | Tensor = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    """x * scale + bias."""
    return paddle.scale(only_first(call), scale)


@register_rule("pad")
def pad(call: Call, x: Tensor, paddings: Any, pad_value: float = 0.0, *rest: Any) -> Tensor:
    """The border is constant."""
    return call.operator(only_first(call), paddings, 0.0, *rest)


@register_rule("pad3d")
def pad3d(call: Call, x: Tensor, paddings: Any, mode: str, value: float, data_format: str) -> Tensor:
    """The border is constant, or (reflect, replicate, circular) a copy of values."""
    return call.operator(only_first(call), paddings, mode, 0.0, data_format)


@register_rule("pool2d", "pool3d")
def average_pool(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Average pooling; maximum pooling by the same operator has no rule."""
    if "avg" not in (*args, *kwargs.values()):
        raise UserError(f"jvp: '{call.name}' has a forward-mode rule for average pooling only")
    return in_first(call)


@register_rule("dropout")
def dropout(call: Call, x: Tensor, seed: Any, p: float, is_test: bool, mode: str, *rest: Any) -> Tensor:
    """Out of training only: the operator does not say which elements it dropped."""
    if p and not is_test:
        raise UserError("jvp: dropout is active; call eval() on the layer, or set its probability to 0")
    return in_first(call)


@register_rule("Tensor.copy_")
def copy_(call: Call, x: Tensor, other: Tensor, *args: Any) -> Tensor | None:
    """x takes over the values of another tensor, and their tangent."""
    return _copied(call.tangent(other))


@register_rule("assign_out_")
def assign_out_(call: Call, x: Tensor, output: Tensor) -> Tensor | None:
    """`output` takes over the values of x, and their tangent."""
    return _copied(call.tangent(x))


@register_rule("Tensor._setitem_dygraph")
def setitem(call: Call, x: Tensor, item: Any, value: Any) -> Tensor:
    """x[item] = value."""
    old, new = call.tangent(x), call.tangent(value)
    tangent = paddle.zeros_like(x) if old is None else old.clone()
    tangent._setitem_dygraph(item, 0.0 if new is None else new.astype(tangent.dtype))
    return tangent


_FLAT = """
    floor ceil round trunc sign heaviside zeros_like ones_like full_like one_hot floor_divide elementwise_floordiv
    full_ full_like_ fill fill_ uniform_inplace_ gaussian_inplace_ exponential_ bernoulli_ gaussian randint_like
    Tensor.detach Tensor.__floordiv__ Tensor.__rfloordiv__
"""


@register_rule(*_FLAT.split())
def flat(call: Call, *args: Any, **kwargs: Any) -> None:
    """The result does not change with the values, almost everywhere or by definition."""


@register_rule("Tensor.numpy", "Tensor._getitem_from_offset")
def leaves(call: Call, *args: Any, **kwargs: Any) -> None:
    """What leaves Paddle cannot be followed."""
    raise UserError(
        "jvp: a value that depends on the inputs leaves Paddle (numpy(), item(), float(), tolist(), print). Where it "
        "is meant as a constant, call detach() first"
    )


def _copied(tangent: Tensor | None) -> Tensor | None:
    return None if tangent is None else tangent.clone()
