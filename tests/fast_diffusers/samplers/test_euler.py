import numpy as np
import paddle
import pytest

from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler
from fast_diffusers.samplers.euler import euler_sigmas
from fast_diffusers.time_grids import shift_sigma

SHAPE = [2, 3, 4, 4]


def test_levels():
    np.testing.assert_allclose(euler_sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(euler_sigmas(4, mu=1.15), [1, 0.9045, 0.7595, 0.5128, 0], atol=5e-5)
    np.testing.assert_allclose(euler_sigmas(2, [0.8, 0.3]), [0.8, 0.3, 0])
    np.testing.assert_allclose(euler_sigmas(2, [0.8, 0.3], mu=0.5), [*shift_sigma(np.array([0.8, 0.3]), 0.5), 0], 1e-6)
    assert euler_sigmas(3).dtype == np.float32


@pytest.mark.parametrize("mu", [None, 1.0])
def test_converges_to_the_exact_flow_with_first_order(gaussian, mu):
    noise = randn(SHAPE, Generator(0))
    exact = gaussian.flow(noise, 1.0, 0.0)
    counts = [16, 32, 64, 128]
    errors = [float((euler(gaussian.velocity, noise, steps=n, mu=mu) - exact).abs().max()) for n in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)
    assert errors[-1] < 0.03


def test_a_chord_model_is_exact_in_any_number_of_steps(gaussian):
    noise = randn(SHAPE, Generator(0))
    exact = gaussian.flow(noise, 1.0, 0.0).numpy()
    for steps in (1, 2, 5):
        np.testing.assert_allclose(euler(gaussian.chord, noise, steps=steps).numpy(), exact, atol=1e-5)


def test_what_the_model_and_the_callback_see():
    asked, reported = [], []

    def velocity(x, t, target_t):
        assert x.dtype == t.dtype == target_t.dtype == paddle.float32 and x.shape == SHAPE
        assert t.shape == target_t.shape == [2] and x.stop_gradient
        asked.append((t.tolist(), target_t.tolist()))
        return paddle.ones(SHAPE, dtype="bfloat16")

    result = euler(
        velocity,
        paddle.ones(SHAPE, dtype="float16"),
        steps=2,
        callback=lambda i, t, x: reported.append((i, t, float(x.mean()))),
    )
    assert asked == [([1, 1], [0.5, 0.5]), ([0.5, 0.5], [0, 0])]
    assert reported == [(0, 0.5, 0.5), (1, 0.0, 0.0)]
    assert result.dtype == paddle.float32


def test_keeps_no_gradient():
    weight = paddle.to_tensor([1.0], stop_gradient=False)
    assert euler(lambda x, t, target_t: weight * x, paddle.ones(SHAPE), steps=2).stop_gradient


def test_rows_do_not_depend_on_the_batch(gaussian):
    noise = randn(SHAPE, Generator(0))
    together = euler(gaussian.velocity, noise, steps=3)
    assert paddle.equal_all(together[1:], euler(gaussian.velocity, noise[1:], steps=3))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, "at least 1, got 0"),
        ({"steps": -3}, ValueError, "at least 1, got -3"),
        ({"steps": 2.0}, TypeError, "integer, got float"),
        ({"steps": 2, "sigmas": [1.0]}, ValueError, "2 steps need 2 sigmas"),
        ({"steps": 2, "sigmas": [0.5, 0.7]}, ValueError, "descend strictly"),
        ({"steps": 2, "sigmas": [0.5, 0.0]}, ValueError, "descend strictly"),
        ({"steps": 1, "sigmas": [1.5]}, ValueError, "descend strictly"),
    ],
)
def test_bad_settings(gaussian, settings, error, message):
    with pytest.raises(error, match=message):
        euler(gaussian.velocity, paddle.zeros(SHAPE), **settings)


def test_a_velocity_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"returned shape \[2, 3, 4\] for a state \[2, 3, 4, 4\]"):
        euler(lambda x, t, target_t: x[..., 0], paddle.zeros(SHAPE), steps=1)
