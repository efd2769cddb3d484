import math

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

from fast_diffusers.models import layers


def test_sinusoid_is_cosines_then_sines_of_falling_frequencies():
    position = np.array([0.0, 1.0, 730.0], np.float32)
    frequency = np.float32(np.exp(-math.log(10000.0) * np.arange(4) / 4))
    angle = position[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    np.testing.assert_allclose(layers.sinusoid(paddle.to_tensor(position), 8), expected, atol=1e-4)
    assert layers.sinusoid(paddle.to_tensor(position).astype("float16"), 8).dtype == paddle.float32
    assert layers.sinusoid(paddle.to_tensor(position).astype("float64"), 8).dtype == paddle.float64


def test_rope_turns_each_pair_by_position_times_frequency():
    ids = paddle.to_tensor([[0.0, 2.0], [3.0, 5.0]])
    rope = layers.rope_tables(ids, axes=(2, 4))
    x = paddle.randn([1, 2, 3, 6])
    pairs = x.numpy().reshape(1, 2, 3, 3, 2)
    angle = np.array([[0.0, 2.0, 2.0 / 100], [3.0, 5.0, 5.0 / 100]])
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[None, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(1, 2, 3, 6)
    np.testing.assert_allclose(layers.apply_rope(x, rope), expected, atol=1e-6)


def test_rope_takes_positions_of_their_own_for_each_sample():
    ids = paddle.randint(0, 9, [2, 5, 2])
    x = paddle.randn([2, 5, 3, 8])
    turned = layers.apply_rope(x, layers.rope_tables(ids, axes=(4, 4)))
    for i in range(2):
        alone = layers.apply_rope(x[i : i + 1], layers.rope_tables(ids[i], axes=(4, 4)))
        np.testing.assert_allclose(turned[i], alone[0], atol=1e-6)


class Traced(paddle.nn.Layer):
    """A layer or function of tensors, traced with their first two axes free; it takes a list of them."""

    def __init__(self, function, *examples):
        super().__init__()
        self.function = function
        specs = [InputSpec([None, None, *x.shape[2:]], x.dtype) for x in examples]
        paddle.jit.to_static(self, input_spec=[specs], full_graph=True)

    def forward(self, tensors):
        return self.function(*tensors)

    def operators(self):
        return {operator.name() for operator in self.forward.concrete_program.main_program.global_block().ops}


@pytest.fixture(params=["cpu", "gpu"])
def wheel(request, monkeypatch):
    """Programs are traced as by a wheel for this device."""
    if request.param == "gpu":
        monkeypatch.setattr(paddle, "is_compiled_with_cuda", paddle.jit.not_to_static(lambda: True))
    elif paddle.is_compiled_with_cuda():
        pytest.skip("this wheel is for GPUs")
    return request.param


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_rope_is_the_same_in_traced_programs(wheel, samples, dtype, tolerance):
    """One table for all samples, or one each."""
    cos, sin = layers.rope_tables(paddle.randint(0, 9, [samples, 5, 2]), axes=(4, 6), dtype=dtype)
    x = paddle.randn([2, 5, 3, 10], dtype)
    traced = Traced(lambda x, cos, sin: layers.apply_rope(x, (cos, sin)), x, cos, sin)
    np.testing.assert_allclose(traced([x, cos, sin]), layers.apply_rope(x, (cos, sin)), rtol=0, atol=tolerance)
    assert ("pd_op.matmul" in traced.operators()) == (wheel == "cpu")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_rms_norm_is_the_same_in_traced_programs(wheel, dtype, tolerance):
    norm, x = layers.RMSNorm(10), 3 * paddle.randn([2, 5, 3, 10], dtype)
    norm.to(dtype=dtype)
    norm.weight.set_value(paddle.randn([10], dtype))
    traced = Traced(norm, x)
    np.testing.assert_allclose(traced([x]), norm(x), rtol=10 * tolerance, atol=tolerance)
    assert ("pd_op.expand_as" in traced.operators()) == (wheel == "cpu")


def test_rope_keeps_the_input_dtype_and_turns_in_the_tables():
    rope = layers.rope_tables(paddle.zeros([5, 1]) + 1.0, axes=(8,))
    x = paddle.randn([1, 5, 1, 8])
    half = x.astype("float16")
    assert layers.apply_rope(half, rope).dtype == paddle.float16
    expected = layers.apply_rope(half.astype("float32"), rope).astype("float16")
    assert (layers.apply_rope(half, rope) == expected).all()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_rms_norm(dtype, tolerance):
    norm = layers.RMSNorm(6, epsilon=1e-6)
    norm.to(dtype=dtype)
    norm.weight.set_value(paddle.arange(1, 7).astype(dtype))
    x = paddle.randn([3, 6], dtype)
    expected = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6) * np.arange(1, 7)
    np.testing.assert_allclose(norm(x), expected, rtol=10 * tolerance, atol=tolerance)


def test_modulation_and_layer_norm():
    x, shift, scale = paddle.randn([2, 3, 4]), paddle.randn([2, 4]), paddle.randn([2, 4])
    expected = x.numpy() * (1 + scale.numpy()[:, None]) + shift.numpy()[:, None]
    np.testing.assert_allclose(layers.modulate(x, shift, scale), expected, atol=1e-6)
    normed = layers.layer_norm(x).numpy()
    np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(normed.std(-1), 1, atol=1e-3)


def test_attention_against_the_definition():
    query, key, value = (paddle.randn([2, 5, 3, 4], "float64") for _ in range(3))
    logits = np.einsum("blhd,bmhd->bhlm", query.numpy(), key.numpy()) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhlm,bmhd->blhd", weights, value.numpy()).reshape(2, 5, 12)
    np.testing.assert_allclose(layers.attend(query, key, value), expected, atol=1e-12)


def test_attention_with_a_bias_against_the_definition():
    query, key, value = (paddle.randn([2, length, 3, 4], "float64") for length in (5, 6, 6))
    bias = paddle.randn([2, 1, 1, 6], "float64")
    logits = np.einsum("blhd,bmhd->bhlm", query.numpy(), key.numpy()) / 2 + bias.numpy()
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhlm,bmhd->blhd", weights, value.numpy()).reshape(2, 5, 12)
    np.testing.assert_allclose(layers.attend(query, key, value, bias), expected, atol=1e-12)
    traced = paddle.jit.to_static(layers.attend, full_graph=True)
    np.testing.assert_allclose(traced(query, key, value, bias), expected, atol=1e-12)


def test_linear_attention_against_the_definition():
    query, key, value = (paddle.randn([2, 3, 4, length], "float64") for length in (5, 6, 6))
    query[:, :, 0] = key[:, :, 0] = paddle.ones([1], "float64")  # so that every query meets a key
    weights = np.einsum("bhdl,bhdm->bhlm", query.clip(0).numpy(), key.clip(0).numpy())
    expected = np.einsum("bhlm,bhdm->bhdl", weights / weights.sum(-1, keepdims=True), value.numpy())
    np.testing.assert_allclose(layers.relu_attend(query, key, value), expected, atol=1e-12)


def test_linear_attention_without_any_match_is_zero():
    x = paddle.randn([1, 1, 4, 3])
    assert (layers.relu_attend(-x.abs(), x, x) == 0).all()


def test_linear_attention_of_half_precision_is_computed_in_float32():
    query, key, value = (paddle.randn([1, 2, 4, 300]).astype("float16") * 100 for _ in range(3))
    out = layers.relu_attend(query, key, value)  # its sums leave the range of float16
    wide = layers.relu_attend(*(x.astype("float32") for x in (query, key, value)))
    assert out.dtype == paddle.float16
    assert (out == wide.astype("float16")).all()


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (8, 8)])
def test_convolutions_as_matrix_products(monkeypatch, height, width):
    layer = layers.GLUMBConv(4, 2.5)
    layer.to(dtype="float64")
    for weight in layer.parameters():
        weight.set_value(paddle.randn(weight.shape, "float64"))
    tokens = paddle.randn([3, height * width, 4], "float64")
    tokens.stop_gradient = False
    results = []
    for limit in (height * width, 0):
        monkeypatch.setattr(layers, "MAX_DENSE_PIXELS", limit)
        out = layer.on_tokens(tokens, height)
        (out**2).sum().backward()
        results.append([out, tokens.grad, *(weight.grad for weight in layer.parameters())])
        tokens.clear_grad()
        layer.clear_gradients()
    image = layer(tokens.transpose([0, 2, 1]).reshape([3, 4, height, width])).flatten(2).transpose([0, 2, 1])
    for dense, convolved in zip([image, *results[0]], [results[1][0], *results[1]], strict=True):
        np.testing.assert_allclose(dense, convolved, rtol=1e-10, atol=1e-10)


def test_small_images_are_convolved_as_matrix_products():
    layer = layers.GLUMBConv(4, 2.5)
    layer.conv_depth.register_forward_pre_hook(lambda *_: pytest.fail("ran a depthwise convolution"))
    layer.on_tokens(paddle.randn([1, 64, 4]), 8)
    with pytest.raises(pytest.fail.Exception):
        layer.on_tokens(paddle.randn([1, 72, 4]), 8)


def test_embedding_that_starts_at_zero():
    layer = layers.EmbeddingMLP(6, 4, zero=True)
    assert (layer(paddle.randn([2, 6])) == 0).all() and layer.linear_1.weight.abs().max() > 0


def test_only_float16_is_clipped():
    huge = paddle.to_tensor([1e6, -1e6])
    assert (layers.float16_clip(huge) == huge).all()
    if not paddle.is_compiled_with_cuda():
        pytest.skip("Paddle clips float16 on GPU only")
    assert layers.float16_clip(huge.astype("float16")).tolist() == [65504.0, -65504.0]
