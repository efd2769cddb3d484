import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

import fast_diffusers.compat  # noqa: F401  (defines F.scaled_dot_product_attention_)
from fast_diffusers.forward_ad import central_difference, jvp

INDEX = paddle.to_tensor([2, 0, 2])
COLUMNS = paddle.to_tensor([[0], [1], [2], [0]])
MASK = paddle.to_tensor([True, False, True, True])


def in_place(name, *args):
    """x.name(*args) on a copy of the first tensor."""

    def apply(x, *others):
        x = x * 1.0
        returned = getattr(x, name)(*others, *args)
        assert returned is x
        return x

    return apply


def set_item(item):
    def apply(x, value):
        x = x * 1.0
        x[item] = value
        return x

    return apply


def fill_constant(x):
    out = paddle.zeros([4, 3], "float64")
    out[1:3] = x[:2]
    out[:, 0] = 7.0
    return out


def with_out(x):
    out = paddle.empty_like(x)
    paddle.assign(x * x, out)
    return out


def augmented(x, y):
    z = x * 1.0
    z += y
    z *= x
    z -= 2.0
    z /= y
    z **= 2
    return z


def copied(x, y):
    z = x * 1.0
    z.copy_(y * y, True)
    return z, x


def attention(causal=False, mask=None, function="scaled_dot_product_attention"):
    return lambda q, k, v: getattr(F, function)(q, k, v, attn_mask=mask, is_causal=causal)


def complex_turn(x, y):
    turned = paddle.as_complex(x) * paddle.complex(y[..., 0].cos(), y[..., 0].sin())
    return paddle.as_real(turned), turned.real(), turned.imag() * 2, turned.conj().abs()


def layer(build, **inputs):
    """A layer with random float64 parameters as a function of its input and all parameters."""

    def apply(x):
        paddle.seed(5)
        module = build()
        module.to(dtype="float64")
        module.eval()
        for parameter in module.parameters():
            parameter.set_value(paddle.rand(parameter.shape).astype("float64"))
        return module(x)

    return apply


X = [4, 3]
IMAGE = [2, 4, 6, 6]
HEADS = [2, 5, 3, 4]

UNARY_NAMES = "abs atan asinh cos cosh erf exp expm1 sigmoid sin sinh square tan tanh reciprocal neg"
POSITIVE_NAMES = "log log10 log1p log2 rsqrt sqrt"
ACTIVATION_NAMES = """
    relu relu6 silu swish gelu mish elu leaky_relu softplus softsign hardswish hardsigmoid log_sigmoid tanhshrink
    softmax log_softmax normalize
"""
UNARY = {name: getattr(paddle, name) for name in UNARY_NAMES.split()}
POSITIVE = {name: getattr(paddle, name) for name in POSITIVE_NAMES.split()}
UNIT = {name: getattr(paddle, name) for name in ("acos", "asin", "atanh")}
ACTIVATIONS = {name: getattr(F, name) for name in ACTIVATION_NAMES.split()}

CASES = {
    # name: (function, shapes of its arguments)
    **{name: (f, [X]) for name, f in (UNARY | ACTIVATIONS).items()},
    **{name: (lambda x, f=f: f(x.abs() + 0.5), [X]) for name, f in POSITIVE.items()},
    **{name: (lambda x, f=f: f(x.tanh() * 0.9), [X]) for name, f in UNIT.items()},
    "acosh": (lambda x: paddle.acosh(x.abs() + 1.5), [X]),
    "atan2": (paddle.atan2, [X, X]),
    "gelu tanh": (lambda x: F.gelu(x, approximate=True), [X]),
    "softplus beta": (lambda x: F.softplus(30 * x, beta=2.0, threshold=15.0), [X]),
    "prelu": (lambda x: F.prelu(x, paddle.to_tensor([0.3], "float64")), [X]),
    "prelu channels": (lambda x: F.prelu(x, paddle.to_tensor([0.3, 0.1, 0.2], "float64")), [X]),
    "clip": (lambda x: x.clip(-0.5, 0.5), [X]),
    "clip one side": (lambda x: (x.clip(min=-0.2), paddle.clip(x, max=0.2)), [X]),
    "add scalars": (lambda x: 1.5 + x + 2 - (3.0 - x) * 2 - 1, [X]),
    "divide scalars": (lambda x: (x / 3.0, 2.0 / x, 1 / (x * x)), [X]),
    "broadcast sum": (lambda x, y: (x + y, x - y, y - x), [X, [3]]),
    "broadcast product": (lambda x, y: (x * y, x / y, y / x), [X, [4, 1]]),
    "same tensor twice": (lambda x: (x * x, x + x, x - x, x / x, x @ x.T), [X]),
    "constants": (lambda x: (x * paddle.ones(X, "float64"), paddle.full([4, 1], 2.0, "float64") / x), [X]),
    "powers": (lambda x: (x**2, x**3, x**-1, x**0, x.pow(3), 2.0**x, x.abs() ** 0.5, x.abs() ** -1.5), [X]),
    "power of tensors": (lambda x, y: (x.abs() ** y, paddle.pow(x.abs(), y)), [X, X]),
    "remainder": (lambda x, y: (x % 0.7, x % y.abs(), paddle.floor(x) * x, x // 0.3 * x), [X, X]),
    "lerp": (lambda x, y, w: paddle.lerp(x, y, w), [X, X, X]),
    "scale": (lambda x: (paddle.scale(x, 2.0, 1.0), paddle.scale(x, 2.0, 1.0, bias_after_scale=False)), [X]),
    "comparisons": (lambda x: (x * (x > 0).astype(x.dtype), (x >= 0.1) & (x != 1), x.argmax(-1)), [X]),
    "cast": (lambda x: x.astype("int32").astype("float64") * x + x.cast("float64") + x.to("float64"), [X]),
    "clone": (lambda x: (x.clone(), paddle.assign(x), x.contiguous(), x.cpu(), paddle.to_tensor(x)), [X]),
    "assign to": (with_out, [X]),
    "where": (lambda x, y: (paddle.where(x > 0, x, y), paddle.where(x > 0, x, 0.0)), [X, X]),
    "masked_fill": (lambda x: x.masked_fill(x > 0, 2.0), [X]),
    "maximum": (lambda x, y: (paddle.maximum(x, y), paddle.minimum(x, y), paddle.fmax(x, y)), [X, X]),
    "max": (lambda x: (x.max(), x.max(0), x.min(-1, keepdim=True), paddle.amax(x, axis=[0, 1]), x.amin(1)), [X]),
    "sort": (lambda x: (paddle.sort(x, axis=0), x.sort(descending=True), x.topk(2)[0], x.argsort()), [X]),
    "sum": (lambda x: (x.sum(), x.sum(-1), x.sum([0, 1], keepdim=True), paddle.sum(x, axis=0)), [X]),
    "mean": (lambda x: (x.mean(), x.mean(-1), x.mean([0], keepdim=True), paddle.mean(x, axis=[0, 1])), [X]),
    "spread": (lambda x: (x.std(), x.var(-1), x.std(0, keepdim=True)), [X]),
    "norms": (lambda x: (x.norm(), paddle.linalg.norm(x, axis=-1), x.norm(p=4, axis=0, keepdim=True)), [X]),
    "prod": (lambda x: (x.prod(), x.prod(0), x.prod(-1, keepdim=True)), [X]),
    "cumsum": (lambda x: (x.cumsum(0), x.cumsum()), [X]),
    "logsumexp": (lambda x: (x.logsumexp(), x.logsumexp(-1), paddle.logsumexp(x, [0, 1], keepdim=True)), [X]),
    "softmax axis": (lambda x: (F.softmax(x, axis=0), paddle.nn.Softmax(axis=1)(x), F.softmax(x.T, 0)), [X]),
    "losses": (lambda x, y: (F.mse_loss(x, y), F.l1_loss(x, y, reduction="none")), [X, X]),
    "reshape": (lambda x: (x.reshape([2, 6]), x.flatten(), x.reshape([-1, 1, 3]), x.view([3, 4]), x.numel() * x), [X]),
    "transpose": (lambda x: (x.T, x.transpose([1, 0]), paddle.transpose(x, [1, 0]), x.mT, x.swapaxes(0, 1)), [X]),
    "permute": (lambda x: (x.permute(1, 2, 0), paddle.moveaxis(x, 0, 2)), [[2, 3, 4]]),
    "squeeze": (lambda x: (x.unsqueeze(1).squeeze(1), x.unsqueeze([0, 3]), x[:1].squeeze()), [X]),
    "index": (lambda x: (x[0], x[:, 1:], x[..., 0], x[1:3, ::2], x[:, None], x[-1], x[::-1]), [X]),
    "index by tensors": (lambda x: (x[INDEX], x[MASK], x[:, INDEX], x[INDEX, paddle.to_tensor([0, 1, 2])]), [X]),
    "iterate": (lambda x: sum(row * i for i, row in enumerate(x)), [X]),
    "gather": (
        lambda x: (x.gather(INDEX), paddle.index_select(x, INDEX, 1), x.take_along_axis(INDEX.reshape([3, 1]), 0)),
        [X],
    ),
    "gather_nd": (lambda x: paddle.gather_nd(x, paddle.to_tensor([[0, 1], [3, 2]])), [X]),
    "scatter": (lambda x, y: paddle.scatter(x, INDEX[:2], y), [X, [2, 3]]),
    "put_along_axis": (
        lambda x, y: paddle.put_along_axis(x, paddle.to_tensor([[0], [1], [2], [0]]), y, 1),
        [X, [4, 1]],
    ),
    "index_put": (lambda x, y: x.index_put([paddle.to_tensor([0, 2])], y), [X, [2, 3]]),
    "concat": (lambda x, y: (paddle.concat([x, y], axis=0), paddle.concat([y, x, y], -1)), [X, X]),
    "concat constant": (lambda x: paddle.concat([paddle.ones(X, "float64"), x], axis=0), [X]),
    "stack": (lambda x, y: (paddle.stack([x, y], axis=1), paddle.stack([x, x]), paddle.add_n([x, y])), [X, X]),
    "split": (lambda x: (x.split(2), x.split([1, -1], axis=-1), x.chunk(3, axis=1), x.unbind(0)), [X]),
    "tensor_split": (lambda x: (paddle.unstack(x, 1), paddle.tensor_split(x, 3)), [X]),
    "expand": (lambda x: (x.expand([2, 4, 3]), x[:, :1].expand_as(x), x.broadcast_to([2, 4, 3]), x.tile([2, 1])), [X]),
    "expand_as dual": (lambda x, y: y.expand_as(x), [X, [1, 3]]),
    "repeat_interleave": (lambda x: (x.repeat_interleave(2, axis=0), x.repeat_interleave(INDEX[:3], axis=1)), [X]),
    "flip": (lambda x: (x.flip(0), x.roll(1, 1), paddle.rot90(x), paddle.tril(x), x.diagonal(), paddle.diag(x)), [X]),
    "meshgrid": (lambda x, y: paddle.meshgrid(x, y), [[3], [4]]),
    "pad": (
        lambda x: (
            F.pad(x, [1, 2, 0, 1], value=3.0),
            F.pad(x, [1, 1, 1, 1], "reflect"),
            F.pad(x, [1, 1, 1, 1], "replicate"),
        ),
        [IMAGE],
    ),
    "pad any": (lambda x: F.pad(x, [1, 2, 0, 1], value=3.0), [X]),
    "complex": (complex_turn, [[2, 3, 2], [2, 3, 2]]),
    "fft": (lambda x: (paddle.fft.rfft(x).abs(), paddle.fft.fft2(x).real(), paddle.fft.irfft(paddle.fft.rfft(x))), [X]),
    "matmul": (lambda x, y: (x @ y, paddle.matmul(y, x), paddle.matmul(x, y.T, transpose_y=True)), [X, [3, 4]]),
    "matmul broadcast": (lambda x, y: (x @ y, y.T @ x.mT), [[2, 4, 3], [3, 4]]),
    "bmm": (lambda x, y: (paddle.bmm(x, y), paddle.mm(x[0], y[0]), x[0].mv(y[0, :, 0])), [[2, 4, 3], [2, 3, 4]]),
    "dot": (lambda x, y: (paddle.dot(x, y), paddle.outer(x, y), paddle.inner(x, y), paddle.cross(x, y)), [[3], [3]]),
    "addmm": (lambda z, x, y: paddle.addmm(z, x, y, beta=0.5, alpha=2.0), [[4, 4], X, [3, 4]]),
    "baddbmm": (lambda z, x, y: paddle.baddbmm(z, x, y, beta=0.5), [[2, 4, 4], [2, 4, 3], [2, 3, 4]]),
    "einsum": (lambda x, y: (paddle.einsum("ij,jk->ik", x, y), paddle.einsum("ij,ji->", x, y)), [X, [3, 4]]),
    "einsum batched": (lambda x, y: paddle.einsum("blhd,bshd->bhls", x, y), [HEADS, HEADS]),
    "linear": (F.linear, [[2, 5, 3], [3, 4], [4]]),
    "linear layer": (layer(lambda: nn.Linear(3, 5)), [X]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [IMAGE, [3, 4, 3, 3], [3]]),
    "conv2d grouped": (lambda x, w: F.conv2d(x, w, groups=2, padding="SAME"), [IMAGE, [6, 2, 3, 3]]),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, groups=4, padding=1, dilation=2), [IMAGE, [4, 1, 3, 3]]),
    "conv2d channels last": (lambda x, w: F.conv2d(x, w, data_format="NHWC"), [[2, 6, 6, 4], [3, 4, 3, 3]]),
    "conv2d transpose": (lambda x, w: F.conv2d_transpose(x, w, stride=2, output_padding=1), [IMAGE, [4, 3, 3, 3]]),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), [[2, 4, 6], [3, 4, 3]]),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, padding=1), [[1, 2, 3, 4, 4], [3, 2, 3, 3, 3], [3]]),
    "unfold": (lambda x: F.unfold(x, 3, paddings=1), [IMAGE]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, [3], w, b), [[2, 5, 3], [3], [3]]),
    "layer_norm two axes": (lambda x, w: (F.layer_norm(x, [5, 3], w), F.layer_norm(x, [3])), [[2, 5, 3], [15]]),
    "layer_norm weights only": (lambda w, b: F.layer_norm(paddle.eye(6).astype("float64"), [6], w, b), [[6], [6]]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, weight=w, bias=b), [IMAGE, [4], [4]]),
    "group_norm plain": (lambda x: (F.group_norm(x, 2), F.group_norm(x, 3, data_format="NHWC")), [IMAGE]),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [IMAGE, [4], [4]]),
    "batch_norm": (layer(lambda: nn.BatchNorm2D(4)), [IMAGE]),
    "spectral layers": (layer(lambda: nn.Sequential(nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 2), nn.Tanh())), [X]),
    "attention": (attention(), [HEADS, HEADS, HEADS]),
    "attention causal": (attention(causal=True), [HEADS, HEADS, HEADS]),
    "attention masked": (attention(mask=paddle.to_tensor([[[[0.0, -1, 2, 0, 0.5]]]] * 2, "float64")), [HEADS] * 3),
    "attention boolean mask": (attention(mask=paddle.ones([2, 1, 5, 5], "bool").tril()), [HEADS] * 3),
    "attention of ppdiffusers": (attention(function="scaled_dot_product_attention_"), [HEADS] * 3),
    "multi-head attention": (layer(lambda: nn.MultiHeadAttention(4, 2)), [[2, 5, 4]]),
    "encoder layer": (layer(lambda: nn.TransformerEncoderLayer(4, 2, 8, activation="gelu")), [[2, 5, 4]]),
    "dropout off": (
        lambda x: (
            F.dropout(x, 0.5, training=False),
            F.dropout(x, 0.5, training=False, mode="downscale_in_infer"),
            F.dropout(x, 0.0),
        ),
        [X],
    ),
    "average pool": (lambda x: (F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, 4)), [IMAGE]),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), [IMAGE]),
    "bilinear": (lambda x: F.interpolate(x, size=[9, 5], mode="bilinear", align_corners=False), [IMAGE]),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic"), [IMAGE]),
    "pixel_shuffle": (lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.channel_shuffle(x, 2)), [IMAGE]),
    "in place add": (in_place("add_"), [X, X]),
    "in place add constant": (in_place("add_", paddle.to_tensor(2.0, dtype="float64")), [X]),
    "in place subtract": (in_place("subtract_"), [X, X]),
    "in place multiply": (in_place("multiply_"), [X, X]),
    "in place multiply broadcast": (in_place("multiply_"), [X, [3]]),
    "in place divide": (in_place("divide_"), [X, X]),
    "in place scale": (in_place("scale_", 2.0, 1.0), [X]),
    "in place exp": (in_place("exp_"), [X]),
    "in place tanh": (in_place("tanh_"), [X]),
    "in place clip": (in_place("clip_", -0.5, 0.5), [X]),
    "in place reshape": (in_place("reshape_", [2, 6]), [X]),
    "in place unsqueeze": (in_place("unsqueeze_", 1), [X]),
    "in place zero": (lambda x: x * in_place("zero_")(x) + in_place("fill_", 2.0)(x) * x, [X]),
    "in place relu": (lambda x: F.relu_(x * 1.0), [X]),
    "in place softmax": (lambda x: F.softmax_(x * 1.0), [X]),
    "augmented assignment": (augmented, [X, X]),
    "set item": (set_item(slice(1, 3)), [X, [2, 3]]),
    "set item by tensor": (set_item(INDEX[:2]), [X, [2, 3]]),
    "set item by mask": (set_item(MASK), [X, [3, 3]]),
    "set constant item": (lambda x: set_item(0)(x, 5.0), [X]),
    "set item of constant": (fill_constant, [X]),
    "copy_": (copied, [X, X]),
}


def leaves(value):
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("case", CASES)
def test_against_central_differences(case):
    fn, shapes = CASES[case]
    paddle.seed(3)
    primals = [paddle.randn(shape).astype("float64") for shape in shapes]
    tangents = [paddle.randn(shape).astype("float64") for shape in shapes]
    with paddle.no_grad():
        plain = leaves(fn(*primals))
        expected = leaves(central_difference(fn, primals, tangents, 1e-5, order=6))
    for given in [tangents] + [[v if i == j else None for j, v in enumerate(tangents)] for i in range(len(shapes))]:
        outputs, slopes = jvp(fn, primals, given)
        if given is not tangents:
            with paddle.no_grad():
                expected = leaves(central_difference(fn, primals, given, 1e-5, order=6))
        for x, out, slope, numeric in zip(plain, leaves(outputs), leaves(slopes), expected, strict=True):
            assert out.dtype == x.dtype and (out == x).all()
            assert (slope is None) == (numeric is None)
            if slope is not None:
                assert slope.shape == x.shape and slope.dtype == x.dtype
                size = max(numeric.abs().max().item(), 1e-2)
                assert (slope - numeric).abs().max().item() / size < 1e-7
