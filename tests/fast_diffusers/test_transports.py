import math

import numpy as np
import paddle
import pytest

from fast_diffusers.forward_ad import central_difference, jvp
from fast_diffusers.random import Generator, randn
from fast_diffusers.transports import (
    LinearPath,
    Relinear,
    TrigFlow,
    angle_of,
    expand_time,
    flow_time,
    flow_to_trigflow,
    per_sample,
)

TIMES = paddle.to_tensor([0.0, 0.3, 1.0])


@pytest.fixture
def pair():
    return randn([3, 2, 4, 4], Generator(0)), randn([3, 2, 4, 4], Generator(1))


def test_expand_time_broadcasts_over_any_state():
    assert expand_time(TIMES, paddle.zeros([3, 2, 4, 4])).shape == [3, 1, 1, 1]
    assert expand_time(TIMES, paddle.zeros([3, 5])).shape == [3, 1]
    assert expand_time(0.5, paddle.zeros([3, 5])).shape == [1, 1]
    assert expand_time(TIMES, paddle.zeros([3, 5], dtype="bfloat16")).dtype == paddle.float32
    assert expand_time(0.1, paddle.zeros([3, 5], dtype="float64")).item() == 0.1
    with pytest.raises(ValueError, match=r"scalar or \[2\], got shape \[3\]"):
        expand_time(TIMES, paddle.zeros([2, 4]))


def test_per_sample_gives_every_row_its_own():
    like = paddle.zeros([3, 2, 4, 4])
    for value in (2, 2.0, paddle.to_tensor(2.0), paddle.to_tensor([2.0]), paddle.to_tensor([2.0, 2.0, 2.0])):
        made = per_sample(value, like)
        assert made.dtype == paddle.float32 and made.tolist() == [2.0, 2.0, 2.0]
    assert per_sample(TIMES.astype("bfloat16"), like).dtype == paddle.float32
    assert per_sample(TIMES.astype("int64"), like).dtype == paddle.float32
    assert per_sample(paddle.to_tensor(0.1, dtype="float64"), like).tolist() == [0.1] * 3, "float64 is kept"
    assert per_sample(0.1, like.astype("float64")).tolist() == [0.1] * 3
    with pytest.raises(ValueError, match=r"each of 2 samples, got shape \[3\]"):
        per_sample(TIMES, paddle.zeros([2, 4]))


def test_path_and_its_inverses(pair):
    x0, eps = pair
    x, v = LinearPath.interpolate(x0, eps, TIMES), LinearPath.velocity_target(x0, eps)
    assert paddle.equal_all(x[0], x0[0]) and paddle.equal_all(x[2], eps[2])
    np.testing.assert_allclose(x[1].numpy(), (0.7 * x0[1] + 0.3 * eps[1]).numpy(), atol=1e-6)
    np.testing.assert_allclose(LinearPath.x0_from_velocity(x, v, TIMES).numpy(), x0.numpy(), atol=1e-6)
    np.testing.assert_allclose(LinearPath.noise_from_velocity(x, v, TIMES).numpy(), eps.numpy(), atol=1e-6)


def test_velocity_is_the_time_derivative(pair):
    x0, eps = (x.astype("float64") for x in pair)
    slope = (LinearPath.interpolate(x0, eps, 0.4 + 1e-6) - LinearPath.interpolate(x0, eps, 0.4 - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope.numpy(), LinearPath.velocity_target(x0, eps).numpy(), atol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "computed"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_precision(pair, dtype, computed):
    x0, eps = (x.astype(dtype) for x in pair)
    for made in (
        LinearPath.interpolate(x0, eps, TIMES),
        LinearPath.velocity_target(x0, eps),
        LinearPath.x0_from_velocity(x0, eps, TIMES),
        LinearPath.renoise(x0, TIMES * 0.5, TIMES, eps),
    ):
        assert made.dtype == getattr(paddle, computed)


def coefficients(renoise, t_from, t_to) -> tuple[float, float]:
    """Factors of the state and of the noise in a renoising, which is linear in both."""
    one, zero = paddle.ones([1, 1], dtype="float64"), paddle.zeros([1, 1], dtype="float64")
    return renoise(one, t_from, t_to, zero).item(), renoise(zero, t_from, t_to, one).item()


@pytest.mark.parametrize(
    ("t_from", "t_to"), [(0.0, 0.0), (0.0, 0.6), (0.513, 0.65), (0.3, 0.3), (0.2, 1.0), (0.999, 1.0)]
)
def test_renoised_state_has_the_marginal_of_the_path(t_from, t_to):
    scale, std = coefficients(LinearPath.renoise, t_from, t_to)
    assert scale * (1 - t_from) == pytest.approx(1 - t_to, abs=1e-12)
    assert (scale * t_from) ** 2 + std**2 == pytest.approx(t_to**2, abs=1e-12)


def test_renoising_by_sampling():
    count = 200_000
    x0 = 1.5
    state = LinearPath.interpolate(paddle.full([count], x0), randn([count], Generator(0)), 0.513)
    made = LinearPath.renoise(state, 0.513, 0.65, randn([count], Generator(1))).numpy()
    assert made.mean() == pytest.approx(0.35 * x0, abs=4 * 0.65 / count**0.5)
    assert made.std() == pytest.approx(0.65, abs=4 * 0.65 / (2 * count) ** 0.5)
    published = LinearPath.renoise_published(state, 0.513, 0.65, randn([count], Generator(1))).numpy()
    assert published.std() == pytest.approx(0.464, abs=0.004)


def test_two_renoisings_are_one():
    (s1, n1), (s2, n2) = coefficients(LinearPath.renoise, 0.2, 0.5), coefficients(LinearPath.renoise, 0.5, 0.8)
    s, n = coefficients(LinearPath.renoise, 0.2, 0.8)
    assert s1 * s2 == pytest.approx(s, abs=1e-12)
    assert (s2 * n1) ** 2 + n2**2 == pytest.approx(n**2, abs=1e-12)


def test_published_renoising():
    scale, std = coefficients(LinearPath.renoise_published, 0.513, 0.65)
    assert scale == pytest.approx(0.35 / 0.487) and std == pytest.approx((0.65 - 0.513) / 0.487)
    assert ((scale * 0.513) ** 2 + std**2) ** 0.5 == pytest.approx(0.464, abs=5e-4)


def test_renoising_edges(pair):
    x, noise = pair
    for t in (0.0, 0.7, 1.0):
        assert paddle.equal_all(LinearPath.renoise(x, t, t, noise), x), "no step adds no noise"
    assert paddle.isnan(LinearPath.renoise(x, 0.6, 0.5, noise)).all(), "noise cannot be taken away"
    per_sample = LinearPath.renoise(x, TIMES * 0.5, TIMES * 0.8, noise)
    alone = LinearPath.renoise(x[1:2], 0.15, 0.24, noise[1:2])
    np.testing.assert_allclose(per_sample[1:2].numpy(), alone.numpy(), atol=1e-6)


@pytest.mark.parametrize("path", [LinearPath(), TrigFlow(), Relinear()], ids=lambda path: type(path).__name__)
class TestTransport:
    def test_ends(self, path, pair):
        x0, eps = pair
        np.testing.assert_allclose(path.interpolate(x0, eps, path.noise_time).numpy(), eps.numpy(), atol=1e-6)
        assert paddle.equal_all(path.interpolate(x0, eps, path.data_time), x0)

    def test_velocity_is_the_time_derivative(self, path, pair):
        x0, eps = (x.astype("float64") for x in pair)
        slope = (path.interpolate(x0, eps, 0.4 + 1e-6) - path.interpolate(x0, eps, 0.4 - 1e-6)) / 2e-6
        np.testing.assert_allclose(slope.numpy(), path.velocity(x0, eps, 0.4).numpy(), atol=1e-8)

    @pytest.mark.parametrize("sign", [1, -1], ids=["real", "twin"])
    def test_prediction_inverts_the_path(self, path, pair, sign):
        x0, eps = pair
        x, v = path.interpolate(x0, eps, TIMES), path.velocity(x0, eps, TIMES)
        x_hat, z_hat = path.predict(x, v, sign * TIMES)
        np.testing.assert_allclose(x_hat.numpy(), x0.numpy(), atol=2e-6)
        np.testing.assert_allclose(z_hat.numpy(), eps.numpy(), atol=2e-6)
        assert paddle.equal_all(path.interpolate(x0, eps, sign * TIMES), x)

    def test_coefficients_take_numbers_and_tensors(self, path):
        for coefficient in (path.alpha, path.gamma, path.alpha_slope, path.gamma_slope):
            values = coefficient(paddle.to_tensor([0.3, -0.3], dtype="float64")).tolist()
            assert values == pytest.approx([coefficient(0.3), coefficient(-0.3)], abs=1e-12)

    def test_precision(self, path, pair):
        for dtype, computed in (("bfloat16", paddle.float32), ("float64", paddle.float64)):
            x, v = (each.astype(dtype) for each in pair)
            assert [each.dtype for each in path.predict(x, v, 0.5)] == [computed, computed]


def test_linear_shortcuts_are_its_predictions(pair):
    x, v = pair
    for t in (TIMES, -TIMES):
        x_hat, z_hat = LinearPath().predict(x, v, t)
        np.testing.assert_allclose(LinearPath.x0_from_velocity(x, v, t).numpy(), x_hat.numpy(), atol=1e-6)
        np.testing.assert_allclose(LinearPath.noise_from_velocity(x, v, t).numpy(), z_hat.numpy(), atol=1e-6)


# ---------------------------------------------------------------------------------------------- flow model as TrigFlow
ANGLES = [math.pi / 2, math.atan(400), 1.3, 1.0, 0.6, 0.01, 0.0]


@pytest.mark.parametrize(
    ("angle", "s", "scale", "weight"),
    [(1.3, 0.782708, 0.812310, -0.565416), (1.0, 0.608979, 0.723708, -0.217958), (0.6, 0.406224, 0.719436, 0.187552)],
)
def test_published_coefficients(angle, s, scale, weight):
    """F = (1 - 2 s) x_hat + lambda v(lambda x_hat, s)."""
    seen = []

    def velocity(x, t):
        seen.append((float(x[0, 0]), float(t[0])))
        return paddle.ones_like(x)

    model = flow_to_trigflow(velocity)
    one, zero = (paddle.full([1, 1], value, dtype="float64") for value in (1.0, 0.0))
    at_one, at_zero = model(one, angle).item(), model(zero, angle).item()
    assert seen[0] == pytest.approx((scale, s), abs=1e-6)
    assert at_zero == pytest.approx(scale, abs=1e-6) and at_one - at_zero == pytest.approx(weight, abs=1e-6)
    assert flow_time(angle) == pytest.approx(s, abs=1e-6)


def test_times_and_angles_are_inverses():
    assert [flow_time(0.0), flow_time(math.pi / 4), flow_time(math.pi / 2)] == pytest.approx([0, 0.5, 1], abs=1e-15)
    for angle in ANGLES:
        assert angle_of(flow_time(angle)) == pytest.approx(angle, abs=1e-14)
    angles = paddle.to_tensor(ANGLES, dtype="float64")
    np.testing.assert_allclose(flow_time(angles).numpy(), [flow_time(angle) for angle in ANGLES], atol=1e-15)
    np.testing.assert_allclose(angle_of(flow_time(angles)).numpy(), ANGLES, atol=1e-14)


def optimum(x_hat, angle, mean, std):
    """E[cos(t) z - sin(t) x0 | x_hat] for data N(mean, std^2) and noise N(0, 1), in closed form; numbers or tensors."""
    cos, sin = (f(angle).reshape([-1, 1]) for f in (paddle.cos, paddle.sin))
    surprise = (x_hat - cos * mean) / ((cos * std) ** 2 + sin**2)
    return cos * sin * surprise - sin * (mean + cos * std**2 * surprise)


def flow_optimum(x, t, mean, std):
    """E[noise - data | x] on the linear path."""
    t = t.reshape([-1, 1])
    surprise = (x - (1 - t) * mean) / (((1 - t) * std) ** 2 + t**2)
    return t * surprise - (mean + (1 - t) * std**2 * surprise)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4), (-2.0, 3.0)])
class TestFlowToTrigFlowOnGaussianData:
    x_hat = randn([len(ANGLES), 5], Generator(0), "float64")
    angles = paddle.to_tensor(ANGLES, dtype="float64")

    def test_is_the_optimum(self, mean, std):
        made = flow_to_trigflow(flow_optimum)(self.x_hat, self.angles, mean, std=std)
        assert made.dtype == paddle.float64
        np.testing.assert_allclose(
            made.numpy(), optimum(self.x_hat, self.angles, mean, std).numpy(), rtol=0, atol=1e-10
        )

    def test_has_its_derivatives(self, mean, std):
        x_hat, angles = self.x_hat[2:-1], self.angles[2:-1]
        tangents = [randn(x_hat.shape, Generator(1), "float64"), randn(angles.shape, Generator(2), "float64")]
        for given in (tangents, [tangents[0], None], [None, tangents[1]]):
            _, slope = jvp(lambda x, t: flow_to_trigflow(flow_optimum)(x, t, mean, std), [x_hat, angles], given)
            exact = central_difference(lambda x, t: optimum(x, t, mean, std), [x_hat, angles], given, 1e-4, order=6)
            np.testing.assert_allclose(slope.numpy(), exact.numpy(), atol=1e-9 * (1 + float(exact.abs().max())))

    @pytest.mark.parametrize("sigma_data", [0.5, 1.0])
    def test_slope_and_data(self, mean, std, sigma_data):
        """States whose data and noise have deviation sigma_data."""
        model, x = flow_to_trigflow(flow_optimum, sigma_data), sigma_data * self.x_hat
        f = optimum(self.x_hat, self.angles, mean, std)
        np.testing.assert_allclose(model.slope(x, self.angles, mean, std).numpy(), (sigma_data * f).numpy(), atol=1e-10)
        cos, sin = (f(self.angles).unsqueeze(-1) for f in (paddle.cos, paddle.sin))
        expected = sigma_data * (cos * self.x_hat - sin * f)
        np.testing.assert_allclose(model.data(x, self.angles, mean, std).numpy(), expected.numpy(), atol=1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("t_dtype", [None, "bfloat16", "float32", "float64"])
def test_flow_to_trigflow_precision(dtype, t_dtype):
    """Results, and what the model is given, have the state's precision; a model may answer in another one."""
    computed = paddle.float64 if dtype == "float64" else paddle.float32
    t = 1.25 if t_dtype is None else paddle.full([2], 1.25, dtype=t_dtype)

    def velocity(x, s):
        assert (x.dtype, s.dtype, s.shape) == (computed, computed, [2])
        return x.astype("bfloat16")

    assert flow_to_trigflow(velocity)(paddle.ones([2, 3], dtype=dtype), t).dtype == computed


def test_flow_to_trigflow_refuses_other_times():
    with pytest.raises(ValueError, match=r"each of 2 samples, got shape \[3\]"):
        flow_to_trigflow(lambda x, s: x)(paddle.ones([2, 3]), paddle.ones([3]))
