import math

import numpy as np
import paddle
import pytest

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


def test_rope_is_the_same_in_traced_programs():
    rope = layers.rope_tables(paddle.arange(10).astype("float32").reshape([5, 2]), axes=(4, 4))
    x = paddle.randn([2, 5, 3, 8])

    def turn(x, cos, sin):
        return layers.apply_rope(x, (cos, sin))

    traced = paddle.jit.to_static(turn, full_graph=True)
    np.testing.assert_allclose(traced(x, *rope), layers.apply_rope(x, rope), rtol=0, atol=1e-6)


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


def test_only_float16_is_clipped():
    huge = paddle.to_tensor([1e6, -1e6])
    assert (layers.float16_clip(huge) == huge).all()
    if not paddle.is_compiled_with_cuda():
        pytest.skip("Paddle clips float16 on GPU only")
    assert layers.float16_clip(huge.astype("float16")).tolist() == [65504.0, -65504.0]
