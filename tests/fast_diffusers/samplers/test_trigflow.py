import math

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import trigflow
from fast_diffusers.samplers.trigflow import trigflow_angles
from fast_diffusers.transports import angle_of

SHAPE = [2, 3, 4, 4]
MOST = math.atan(400)  # 1.568296
SCHEDULES = [
    [math.pi / 2, 0],
    [MOST, 1.3, 0],
    [1.57, 1.2, 0.5, 0],
    [MOST, 1.3, 1.1, 0.6, 0],
    [0.9, 0.2, 0],
]


@pytest.mark.parametrize("angles", [SCHEDULES[0], SCHEDULES[1], SCHEDULES[3]], ids=["1", "2", "4"])
def test_published_schedules(angles):
    np.testing.assert_array_equal(trigflow_angles(len(angles) - 1), angles)


@given(st.integers(1, 60))
def test_schedules_of_any_length(steps):
    angles = trigflow_angles(steps)
    assert angles.shape == (steps + 1,) and angles.dtype == np.float64
    assert np.all(np.diff(angles) < 0) and MOST <= angles[0] <= math.pi / 2 and angles[-1] == 0
    if steps > 4 and steps % 4 == 0:
        np.testing.assert_allclose(angles[:: steps // 4], trigflow_angles(4), atol=1e-12)


@given(st.integers(1, 60))
def test_other_angles_are_a_curve(steps):
    curve = [1.5, 1.1, 0.6, 0.3, 0]
    angles = trigflow_angles(steps, curve)
    assert angles.shape == (steps + 1,) and np.all(np.diff(angles) < 0)
    np.testing.assert_array_equal(trigflow_angles(1, curve), [1.5, 0])
    np.testing.assert_allclose(trigflow_angles(2, curve), [1.5, 0.6, 0], rtol=1e-15)
    np.testing.assert_array_equal(trigflow_angles(4, curve), curve)


def reference(velocity, noise, fresh, angles, sigma_data=0.5):
    """The published loop, in TrigFlow's own states and angles (float64): the model only where F needs it."""
    x = sigma_data * noise
    for t, u, z in zip(angles[:-1], angles[1:], fresh, strict=True):
        s, scale = math.sin(t) / (math.sin(t) + math.cos(t)), 1 / (math.sin(t) + math.cos(t))
        v = velocity(paddle.to_tensor(scale * x / sigma_data), paddle.full([x.shape[0]], s, "float64")).numpy()
        f = (1 - 2 * s) * x / sigma_data + scale * v
        data = math.cos(t) * x - math.sin(t) * sigma_data * f
        x = math.cos(u) * data + math.sin(u) * sigma_data * z
    return x / sigma_data


@pytest.mark.parametrize("angles", SCHEDULES, ids=str)
def test_replays_the_published_loop(angles):
    def velocity(x, t, target_t=None):
        return paddle.sin(2 * x + 3 * t.reshape([-1, 1, 1, 1]))

    steps = len(angles) - 1
    noise, *fresh = (randn(SHAPE, Generator(seed)) for seed in range(steps + 1))
    replay = iter(fresh[:-1])
    made = trigflow(velocity, noise, steps=steps, angles=angles, noise_sampler=lambda shape: next(replay))
    expected = reference(velocity, np.float64(noise), [np.float64(z) for z in fresh], angles)
    np.testing.assert_allclose(made.numpy(), expected, atol=5e-6)
    assert next(replay, None) is None, "one draw a step, none on the last"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_steps_aim_at_data_and_tell_flow_times(gaussian, steps):
    asked, seen = [], []

    def velocity(x, t, target_t):
        asked.append((t.tolist(), target_t.tolist()))
        return gaussian.velocity(x, t)

    result = trigflow(
        velocity, randn(SHAPE, Generator(0)), steps=steps, callback=lambda i, t, x: seen.append((i, t, x))
    )
    angles = trigflow_angles(steps)
    assert [angle_of(t[0]) for t, _ in asked] == pytest.approx(list(angles[:-1]), abs=1e-6)
    assert all(t[0] == t[1] and target == [0, 0] for t, target in asked)
    assert [angle_of(t) for _, t, _ in seen] == pytest.approx(list(angles[1:]), abs=1e-6)
    assert [i for i, _, _ in seen] == list(range(steps)) and paddle.equal_all(seen[-1][2], result)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_one_data_point_is_found_exactly(steps):
    """The optimal velocity of a data set of one image points to it from anywhere."""
    point = randn([1, *SHAPE[1:]], Generator(1))

    def velocity(x, t, target_t):
        return (x - point) / t.reshape([-1, 1, 1, 1])

    result = trigflow(velocity, randn(SHAPE, Generator(0)), steps=steps, generator=Generator(2))
    np.testing.assert_allclose(result.numpy(), np.broadcast_to(point.numpy(), SHAPE), atol=1e-5)


def test_an_exact_consistency_function_samples_the_data_distribution(gaussian):
    """Its velocity points to the end of the flow; every step then has the exact distribution of its level."""
    shape, seen = [5000, 1, 4, 4], []
    trigflow(
        gaussian.chord,
        randn(shape, Generator(0)),
        steps=4,
        angles=[math.pi / 2, 1.3, 1.1, 0.6, 0],
        generator=Generator(1),
        callback=lambda i, t, x: seen.append((t, float(x.mean()), float(x.std()))),
    )
    for t, mean, std in seen:
        exact = gaussian.variance(t) ** 0.5
        assert mean == pytest.approx((1 - t) * gaussian.mean, abs=4 * exact / 80_000**0.5)
        assert std == pytest.approx(exact, abs=4 * exact / 160_000**0.5)


def test_generators(gaussian):
    noise = randn(SHAPE, Generator(0))

    def sample(generator, noise=noise):
        return trigflow(gaussian.velocity, noise, steps=4, generator=generator)

    assert paddle.equal_all(sample(Generator(3)), sample(Generator(3)))
    assert not paddle.equal_all(sample(Generator(3)), sample(Generator(4)))
    rows = sample([Generator(6), Generator(7)])
    assert paddle.equal_all(rows[1:], sample([Generator(7)], noise[1:])), "independent of the batch"
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        sample([Generator(6)])
    paddle.seed(5)
    first = sample(None)
    paddle.seed(5)
    assert paddle.equal_all(first, sample(None))


def test_one_step_draws_nothing(gaussian):
    noise = randn(SHAPE, Generator(0))
    made = trigflow(gaussian.velocity, noise, steps=1, noise_sampler=lambda shape: pytest.fail("no noise is needed"))
    t = paddle.ones([2])
    np.testing.assert_allclose(made.numpy(), (noise - gaussian.velocity(noise, t)).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2, "angles": [0]}, r"expected at least 2 angles, the final 0 included, got shape \[1\]"),
        ({"steps": 2, "angles": [1.5, 1.5, 0]}, "descend strictly"),
        ({"steps": 2, "angles": [1.5, 1.0, 0.1]}, r"at most pi/2 to 0, got \[1.5, 1.0, 0.1\]"),
        ({"steps": 1, "angles": [1.6, 0]}, "at most pi/2"),
    ],
)
def test_bad_settings(gaussian, settings, message):
    with pytest.raises(ValueError, match=message):
        trigflow(gaussian.velocity, paddle.zeros(SHAPE), **settings)


def test_a_velocity_of_another_shape():
    with pytest.raises(ValueError, match=r"returned shape \[2, 1, 4, 4\] for a state \[2, 3, 4, 4\]"):
        trigflow(lambda x, t, target_t: x[:, :1], paddle.zeros(SHAPE), steps=2)
