import math

import numpy as np
import paddle
import pytest

from distill.log_variance import LogVariance


@pytest.mark.parametrize("num_elements", [1, 64, 32768])
def test_starts_at_the_error_of_a_normalised_tangent(num_elements):
    angles = paddle.to_tensor([1e-6, 0.3, 1.2, math.pi / 2])
    values = LogVariance(num_elements)(angles)
    assert list(values.shape) == [4] and values.dtype == paddle.float32
    np.testing.assert_allclose(values.numpy(), -math.log(num_elements), rtol=1e-6)


def test_learns_a_weighting_that_falls_from_data_to_noise():
    """The minimum of exp(−ℓ)·error + ℓ is at ℓ = ln error; here ln(1 / (64·tan t)), over e^±3 of tan t."""
    layer, tangent = LogVariance(64), paddle.exp(paddle.linspace(-3, 3, 25))
    angle, error = paddle.atan(tangent), 1 / (64 * tangent)
    optimizer = paddle.optimizer.Adam(3e-3, parameters=layer.parameters())
    for _ in range(400):
        spread = layer(angle)
        (paddle.exp(-spread) * error + spread).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    np.testing.assert_allclose(layer(angle).numpy(), np.log(error.numpy()), atol=0.3)


def test_takes_float64_angles():
    assert np.isfinite(LogVariance(8)(paddle.to_tensor([0.5], dtype="float64")).numpy()).all()


def test_needs_elements():
    with pytest.raises(ValueError, match="num_elements must be at least 1, got 0"):
        LogVariance(0)
