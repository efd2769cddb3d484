"""Rules of normalisations, softmax and attention, in closed form."""

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from fast_diffusers.errors import UserError
from fast_diffusers.forward_ad.products import total
from fast_diffusers.forward_ad.tape import Call, register_rule


def standardised(x: Tensor, dx: Tensor | None, axes: list[int], epsilon: float) -> tuple[Tensor, Tensor | None]:
    """z = (x - mean) / sqrt(variance + epsilon) over `axes`, and its tangent (dx - mean(dx) - z mean(z dx)) / std."""
    centred = x - x.mean(axes, keepdim=True)
    rate = paddle.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    z = centred * rate
    if dx is None:
        return z, None
    slope = (z * dx).mean(axes, keepdim=True)
    return z, (dx - dx.mean(axes, keepdim=True) - z * slope) * rate


def _affine(call: Call, z: Tensor, dz: Tensor | None, weight: Any, bias: Any, shape: list[int]) -> Tensor | None:
    """Tangent of z * weight + bias, the latter two given in another shape, or None."""
    dw, db = (None if y is None else y.reshape(shape) for y in (call.tangent(weight), call.tangent(bias)))
    if dz is not None and weight is not None:
        dz = dz * weight.reshape(shape)
    return total(dz, None if dw is None else z * dw, db)


@register_rule("layer_norm")
def layer_norm(call: Call, x: Tensor, scale: Any, bias: Any, epsilon: float, begin_norm_axis: int) -> Tensor | None:
    """Over the axes from begin_norm_axis on; returns (out, mean, variance)."""
    z, dz = standardised(x, call.tangent(x), list(range(begin_norm_axis, x.ndim)), epsilon)
    return _affine(call, z, dz, scale, bias, x.shape[begin_norm_axis:])


@register_rule("group_norm")
def group_norm(
    call: Call, x: Tensor, scale: Any, bias: Any, epsilon: float, groups: int, data_format: str = "NCHW"
) -> Tensor | None:
    """Over the channels of a group and all positions; returns (out, mean, variance)."""
    return _group_norm(call, x, scale, bias, epsilon, groups, data_format)


@register_rule("instance_norm")
def instance_norm(call: Call, x: Tensor, scale: Any, bias: Any, epsilon: float, *args: Any) -> Tensor | None:
    """Over all positions of a channel."""
    return _group_norm(call, x, scale, bias, epsilon, x.shape[1], "NCHW")


def _group_norm(
    call: Call, x: Tensor, scale: Any, bias: Any, epsilon: float, groups: int, data_format: str
) -> Tensor | None:
    dx, last = call.tangent(x), not data_format.startswith("NC")
    channels = x.shape[-1] if last else x.shape[1]
    split = [x.shape[0], -1, groups, channels // groups] if last else [x.shape[0], groups, -1]
    z, dz = standardised(x.reshape(split), None if dx is None else dx.reshape(split), [1, 3] if last else [2], epsilon)
    shape = [1] * (x.ndim - 1) + [channels] if last else [1, channels] + [1] * (x.ndim - 2)
    return _affine(call, z.reshape(x.shape), None if dz is None else dz.reshape(x.shape), scale, bias, shape)


@register_rule("batch_norm", "batch_norm_")
def batch_norm(
    call: Call,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Any,
    bias: Any,
    is_test: bool,
    momentum: float,
    epsilon: float,
    data_format: str,
    use_global_stats: bool,
    *args: Any,
) -> Tensor | None:
    """With stored statistics; in training they are those of the batch, and their running means would be dual."""
    if not (is_test or use_global_stats):
        raise UserError("jvp: batch_norm in training mode changes its buffers; call eval() on the layer")
    shape = [1, -1] + [1] * (x.ndim - 2) if data_format.startswith("NC") else [1] * (x.ndim - 1) + [-1]
    rate = paddle.rsqrt(variance + epsilon).reshape(shape)
    dx = call.tangent(x)
    z = (x - mean.reshape(shape)) * rate
    return _affine(call, z, None if dx is None else dx * rate, scale, bias, shape)


@register_rule("rms_norm")
def rms_norm(call: Call, x: Tensor, scale: Any, normalized_shape: Any, epsilon: float, *args: Any) -> Tensor | None:
    """x / rms(x) over the trailing axes `normalized_shape`; returns (out, reciprocal of the rms)."""
    number = len(normalized_shape)
    axes = list(range(x.ndim - number, x.ndim))
    rate = paddle.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)
    z, dx = x * rate, call.tangent(x)
    dz = None if dx is None else (dx - z * (z * dx).mean(axes, keepdim=True)) * rate
    return _affine(call, z, dz, scale, None, x.shape[x.ndim - number :])


@register_rule("softmax")
def softmax(call: Call, x: Tensor, axis: int = -1) -> Tensor:
    """p (dx - sum(p dx)); as this is symmetric in both directions, it is what Paddle's gradient kernel computes."""
    return paddle._C_ops.softmax_grad(call.out, call.tangent(x), axis)


@register_rule("log_softmax")
def log_softmax(call: Call, x: Tensor, axis: int = -1) -> Tensor:
    """dx - sum(p dx)."""
    tangent = call.tangent(x)
    return tangent - (call.out.exp() * tangent).sum(axis, keepdim=True)


@register_rule("logsumexp")
def logsumexp(call: Call, x: Tensor, axis: Any = None, keepdim: bool = False, reduce_all: bool = False) -> Tensor:
    """sum(p dx) with the softmax p."""
    axis = axis if isinstance(axis, int) else None if reduce_all or not axis else list(axis)
    weights = paddle.exp(x - paddle.logsumexp(x, axis=axis, keepdim=True))
    return paddle.sum(weights * call.tangent(x), axis=axis, keepdim=keepdim)


@register_rule("p_norm")
def p_norm(
    call: Call, x: Tensor, porder: float, axis: int, epsilon: float, keepdim: bool, as_vector: bool = False
) -> Tensor:
    """sum(x |x|^(p-2) dx) / norm^(p-1), for finite p."""
    axes = list(range(x.ndim)) if as_vector else axis
    slopes = x if porder == 2 else x.sign() * x.abs() ** (porder - 1)
    return paddle.sum(slopes * call.tangent(x), axis=axes, keepdim=keepdim) / call.out ** (porder - 1)


@register_rule("flash_attn")
def flash_attn(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Any = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *args: Any,
) -> Tensor:
    """[B, L, H, D]; the weights, which the kernel does not return, are computed again."""
    return attention(call, query, key, value, mask, dropout, causal, query.shape[-1] ** -0.5)


@register_rule("memory_efficient_attention")
def memory_efficient_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    causal_diagonal: Any,
    seqlen_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    causal: bool,
    dropout: float,
    scale: float,
    *args: Any,
) -> Tensor:
    """As `flash_attn`."""
    return attention(call, query, key, value, bias, dropout, causal, scale if scale > 0 else query.shape[-1] ** -0.5)


def attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float,
) -> Tensor:
    """dP V + P dV with the weights P = softmax(Q K' scale + mask), in float32 (float64 for float64)."""
    if dropout or call.tangent(mask) is not None:
        raise UserError(f"jvp: '{call.name}' takes no dropout and no tangent in its mask")

    def heads_first(x: Tensor | None) -> Tensor | None:
        wide = x if x is None or x.dtype == paddle.float64 else x.astype("float32")
        return None if wide is None else wide.transpose([0, 2, 1, 3])

    q, k, v, dq, dk, dv = map(heads_first, (query, key, value, *map(call.tangent, (query, key, value))))
    scores = paddle.matmul(q, k, transpose_y=True) * scale
    if mask is not None:
        scores = scores + mask.astype(scores.dtype)
    if causal:
        scores = scores + paddle.full(scores.shape[-2:], float("-inf"), scores.dtype).triu(1)
    weights = F.softmax(scores, axis=-1)
    moved = total(
        None if dq is None else paddle.matmul(dq, k, transpose_y=True),
        None if dk is None else paddle.matmul(q, dk, transpose_y=True),
    )
    out = total(
        None if moved is None else paddle.matmul(paddle._C_ops.softmax_grad(weights, moved * scale, -1), v),
        None if dv is None else paddle.matmul(weights, dv),
    )
    return out.transpose([0, 2, 1, 3])
