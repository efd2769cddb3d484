import math

import numpy as np
import paddle
import pytest

from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler, unified
from fast_diffusers.samplers.unified import UnifiedRule
from fast_diffusers.transports import LinearPath, Relinear, TrigFlow

SHAPE = [2, 1, 2, 3]
PATHS = [LinearPath(), TrigFlow(), Relinear()]


def path_name(value):
    return type(value).__name__ if value in PATHS else None


def gaussian_velocity(path, mean=0.7, std=0.4):
    """E[F | x_t = x] for data N(mean, std^2) on any path, as a sampler asks for it; the target time is ignored."""

    def velocity(x, t, target_t):
        t = t.reshape([-1, 1, 1, 1])
        alpha, gamma = path.alpha(t), path.gamma(t)
        centred = (x - gamma * mean) / (alpha**2 + (gamma * std) ** 2)
        return path.gamma_slope(t) * (mean + gamma * std**2 * centred) + path.alpha_slope(t) * alpha * centred

    return velocity


def restated(velocity, noise, fresh, path, *, n, g, warp, order, rho, kappa, style, balanced):
    """UCGM's algorithm 2 in plain numpy: every quantity written out, order 2 guarded at gamma = 0 or balanced.

    `velocity(x, t, target)` takes and gives arrays; `fresh` is a list of arrays; path is the name of one.
    """
    alpha, gamma, slopes, time = {
        "linear": (lambda t: t, lambda t: 1 - t, lambda t: (1, -1), lambda u: u),
        "reversed": (lambda t: 1 - t, lambda t: t, lambda t: (-1, 1), lambda u: 1 - u),
        "trig": (math.sin, math.cos, lambda t: (math.cos(t), -math.sin(t)), lambda u: u * math.pi / 2),
    }[path]
    steps = (n + 1) // 2 if order == 2 else n
    tau = [
        g[0] + i * ((1 - g[0]) / steps if g[1] == 0 else (1 - g[1] - g[0]) / max(steps - 1, 1)) for i in range(steps)
    ]
    times = [time(1 - (1 - (1 - s ** warp[0]) ** warp[1]) ** warp[2]) for s in tau] + [time(0)]

    def predict(x, t, target):
        f = velocity(x, t, target)
        da, dg = slopes(t)
        d = alpha(t) * dg - gamma(t) * da
        return (f * alpha(t) - x * da) / d, (x * dg - f * gamma(t)) / d

    x, fresh, before = noise, iter(fresh), None
    for i in range(steps):
        t, s = times[i], times[i + 1]
        x_hat, z_hat = predict(x, t, {"few": times[-1], "any": s, "mul": t}[style])
        raw = x_hat, z_hat
        if kappa and i > 1:
            x_hat, z_hat = x_hat + kappa * (x_hat - before[0]), z_hat + kappa * (z_hat - before[1])
        before = raw
        last = i == steps - 1
        share = 0 if last else min(abs(s - t) * 2 * alpha(t) / alpha(s) ** 2, 1) if rho == "sde" else rho
        mixed = math.sqrt(1 - share) * z_hat + math.sqrt(share) * (next(fresh) if share else 0)
        after = gamma(s) * x_hat + alpha(s) * mixed
        if order == 2 and not last:
            x_end, z_end = predict(after, s, times[-1] if style == "few" else s)
            if gamma(t) <= (alpha(t) if balanced else 1e-9):
                slope = alpha(s) / alpha(t)
                after = slope * x + (gamma(s) - slope * gamma(t)) * (x_hat + x_end) / 2
            else:
                slope = gamma(s) / gamma(t)
                after = slope * x + (alpha(s) - slope * alpha(t)) * (z_hat + z_end) / 2
        x = after
    assert next(fresh, None) is None, "one draw a step, none on the last"
    return x


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 1},
        {"gap": (0.001, 0.5)},
        {"gap": (0.1, 0.0)},
        {"time_warp": (1.17, 0.8, 1.1), "gap": (0.001, 0.0)},
        {"style": "any"},
        {"style": "mul"},
        {"stochasticity": 1.0, "gap": (0.001, 0.5)},
        {"stochasticity": 0.3, "style": "any"},
        {"stochasticity": "sde", "style": "mul"},
        {"extrapolation": 0.5, "style": "mul"},
        {"order": 2, "steps": 7, "style": "mul"},
        {"order": 2, "steps": 7, "style": "any", "gap": (0.01, 0.1)},
        {"order": 2, "steps": 8, "gap": (0.2, 0.3), "stochasticity": 0.4},
        {"order": 2, "steps": 9, "stochasticity": "sde", "extrapolation": 0.3, "style": "any", "gap": (0.1, 0)},
        {"order": 2, "steps": 2},
        {"order": 2, "steps": 11, "style": "mul", "correction": "balanced"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("transport", "name"), list(zip(PATHS, ["linear", "trig", "reversed"], strict=True)), ids=path_name
)
def test_replays_the_restated_algorithm(settings, transport, name):
    options = {"steps": 4, "order": 1, "stochasticity": 0.0, "extrapolation": 0.0} | settings
    count = (options["steps"] + 1) // 2 if options["order"] == 2 else options["steps"]
    fresh = [randn(SHAPE, Generator(9 + i)) for i in range(count - 1)] if options["stochasticity"] else []
    noise, replay = randn(SHAPE, Generator(0)).astype("float64"), iter(fresh)

    def velocity(x, t, target_t):  # of everything that the sampler passes
        t, target_t = (each.reshape([-1, 1, 1, 1]) for each in (t, target_t))
        return paddle.sin(x + 2 * t) + target_t * x + target_t**2

    expected = restated(
        lambda x, t, target_t: np.sin(x + 2 * t) + target_t * x + target_t**2,
        noise.numpy(),
        [each.numpy().astype("float64") for each in fresh],
        name,
        n=options["steps"],
        g=options.get("gap", (0, 0)),
        warp=options.get("time_warp", (1, 1, 1)),
        order=options["order"],
        rho=options["stochasticity"],
        kappa=options["extrapolation"],
        style=options.get("style", "few"),
        balanced=options.get("correction") == "balanced",
    )
    made = unified(velocity, noise, transport=transport, noise_sampler=lambda shape: next(replay), **options)
    assert made.dtype == paddle.float64
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert next(replay, None) is None


def slope_of_error(path, counts, mean=0.7, std=1.0, gap=(0.0, 0.0), time_warp=(1, 1, 1), order=1, **settings):
    """Exponent of the error after as many steps, started from a state of the path's distribution."""
    start = float(UnifiedRule(gap=gap, time_warp=time_warp, transport=path).times(1)[0])
    scale = math.hypot(path.alpha(start), path.gamma(start) * std)
    unit = randn(SHAPE, Generator(0)).astype("float64")
    noise, exact = path.gamma(start) * mean + scale * unit, mean + std * unit
    errors = []
    for n in counts:
        steps = 2 * n - 1 if order == 2 else n
        options = {"order": order, "gap": gap, "time_warp": time_warp, "transport": path} | settings
        made = unified(gaussian_velocity(path, mean, std), noise, steps=steps, **options)
        errors.append(float((made - exact).abs().max()))
    return np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("style", ["any", "mul"])
@pytest.mark.parametrize("path", PATHS, ids=path_name)
@pytest.mark.parametrize(
    ("order", "settings"),
    [
        (1, {}),
        (1, {"time_warp": (1.2, 1.2, 1.1)}),
        (2, {"gap": (0.2, 0.0)}),
        (2, {"gap": (0.2, 0.0), "time_warp": (1.0, 1.2, 1.1)}),
        (2, {"gap": (0.001, 0.0), "correction": "balanced"}),
    ],
    ids=str,
)
def test_converges_to_the_exact_flow_with_its_order(path, order, style, settings):
    slope = slope_of_error(path, [32, 64, 128, 256], order=order, style=style, **settings)
    assert slope == pytest.approx(-order, abs=0.15)


@pytest.mark.parametrize("path", PATHS, ids=path_name)
@pytest.mark.parametrize("correction", ["published", "balanced"])
def test_order_two_from_pure_noise(path, correction):
    """Nearly of second order: the published correction, singular at gamma = 0, costs a factor of log(1/h) there."""
    slope = slope_of_error(path, [32, 64, 128, 256], order=2, style="mul", correction=correction)
    assert -2.25 < slope < -1.6


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_chord_model_is_exact_in_any_number_of_steps(gaussian, steps):
    noise = randn(SHAPE, Generator(0)).astype("float64")
    exact = gaussian.flow(noise, 1.0, 0.0).numpy()
    np.testing.assert_allclose(unified(gaussian.chord, noise, steps=steps, style="any").numpy(), exact, rtol=1e-9)
    np.testing.assert_allclose(unified(gaussian.chord, noise, steps=1, style="few").numpy(), exact, rtol=1e-9)


def test_order_one_in_style_mul_is_euler(gaussian):
    noise = randn(SHAPE, Generator(0))
    made = unified(gaussian.velocity, noise, steps=5, style="mul")
    np.testing.assert_allclose(made.numpy(), euler(gaussian.velocity, noise, steps=5).numpy(), atol=1e-6)


def test_time_directions_are_mirror_images(gaussian):
    noise = randn(SHAPE, Generator(0)).astype("float64")

    def mirrored(x, t, target_t):
        return -gaussian.chord(x, 1 - t, 1 - target_t)

    settings = {"steps": 4, "gap": (0.01, 0.3), "time_warp": (1.2, 0.8, 1.1), "style": "any", "stochasticity": 0.5}
    ours = unified(gaussian.chord, noise, generator=Generator(1), **settings)
    theirs = unified(mirrored, noise, transport=Relinear(), generator=Generator(1), **settings)
    np.testing.assert_allclose(theirs.numpy(), ours.numpy(), rtol=1e-9, atol=1e-9)


def test_times():
    np.testing.assert_allclose(UnifiedRule().times(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(UnifiedRule(gap=(0.001, 0.6)).times(2), [0.999, 0.6, 0])
    np.testing.assert_allclose(
        UnifiedRule(gap=(0.001, 0.5)).times(4), [0.999, 0.999 - 0.499 / 3, 0.5 + 0.499 / 3, 0.5, 0]
    )
    np.testing.assert_allclose(UnifiedRule(gap=(0.2, 0.5)).times(1), [0.8, 0])
    np.testing.assert_allclose(UnifiedRule(time_warp=(2, 3, 0.5)).times(2), [1, 1 - math.sqrt(1 - 0.75**3), 0])
    np.testing.assert_allclose(UnifiedRule(order=2).times(5), [1, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(UnifiedRule(transport=Relinear()).times(2), [0, 0.5, 1])
    np.testing.assert_allclose(UnifiedRule(transport=TrigFlow()).times(2), [math.pi / 2, math.pi / 4, 0])


@pytest.mark.parametrize(
    ("style", "first", "second"),
    [
        ("few", [(1, 0), (0.5, 0)], [(1, 0), (0.5, 0), (0.5, 0)]),
        ("any", [(1, 0.5), (0.5, 0)], [(1, 0.5), (0.5, 0.5), (0.5, 0)]),
        ("mul", [(1, 1), (0.5, 0.5)], [(1, 1), (0.5, 0.5), (0.5, 0.5)]),
    ],
)
def test_what_the_model_and_the_callback_see(style, first, second):
    for order, expected in ((1, first), (2, second)):
        asked, reported, trajectory = [], [], []

        def velocity(x, t, target_t, asked=asked):
            assert x.dtype == t.dtype == target_t.dtype == paddle.float32 and x.shape == SHAPE
            assert t.shape == target_t.shape == [2] and x.stop_gradient
            asked.append((float(t[1]), float(target_t[0])))
            return paddle.ones(SHAPE, dtype="bfloat16")

        result = unified(
            velocity,
            paddle.ones(SHAPE, dtype="float16"),
            steps=2 if order == 1 else 3,
            order=order,
            style=style,
            callback=lambda i, t, x, reported=reported: reported.append((i, t, float(x.mean()))),
            trajectory=trajectory,
        )
        assert asked == expected
        assert reported == [(0, 0.5, 0.5), (1, 0.0, 0.0)], "once a step"
        assert [float(x.mean()) for x in trajectory] == [1, 0.5, 0]
        assert result.dtype == trajectory[0].dtype == paddle.float32


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, "sde"])
def test_renoising_keeps_the_variance_of_the_path(share):
    """Where data 2 and the noise are predicted exactly, the state has mean 2 gamma and standard deviation alpha.

    The covariance of the state with the old noise tells how much of it is fresh.
    """
    count, states = 200_000, []
    noise = randn([count, 1, 1, 1], Generator(0))
    unified(
        lambda x, t, target_t: (x - 2) / t.reshape([-1, 1, 1, 1]),
        noise,
        steps=2,
        stochasticity=share,
        gap=(0.0, 0.6),
        generator=Generator(1),
        trajectory=states,
    )
    rho = min(2 * 1 * 0.4 / 0.6**2, 1) if share == "sde" else share
    state, bound = states[1].numpy().ravel(), 4 / count**0.5
    assert state.mean() == pytest.approx(0.4 * 2, abs=0.6 * bound)
    assert state.std() == pytest.approx(0.6, abs=0.6 * bound)
    assert np.mean(state * noise.numpy().ravel()) == pytest.approx(0.6 * math.sqrt(1 - rho), abs=6 * bound)


def test_sde_share_is_computed_anew_at_every_step():
    rule = UnifiedRule(stochasticity="SDE")
    shares = [rule.noise_share(t, s) for t, s in [(1.0, 0.9), (0.9, 0.8), (0.4, 0.2), (0.2, 0.0)]]
    assert shares == pytest.approx([0.2 / 0.81, 0.18 / 0.64, 1.0, 0.0])


@pytest.mark.parametrize("settings", [{"stochasticity": 0.7}, {"stochasticity": "sde", "order": 2, "gap": (0.1, 0.1)}])
def test_generators(gaussian, settings):
    noise = randn(SHAPE, Generator(0))

    def sample(generator, noise=noise):
        return unified(gaussian.velocity, noise, steps=5, style="mul", generator=generator, **settings)

    assert paddle.equal_all(sample(Generator(3)), sample(Generator(3)))
    assert not paddle.equal_all(sample(Generator(3)), sample(Generator(4)))
    rows = sample([Generator(6), Generator(7)])
    assert paddle.equal_all(rows[1:], sample([Generator(7)], noise[1:])), "independent of the batch"
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        sample([Generator(6)])


def test_keeps_no_gradient():
    weight = paddle.to_tensor([1.0], stop_gradient=False)
    assert unified(lambda x, t, target_t: weight * x, paddle.ones(SHAPE), steps=3, order=2).stop_gradient


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, "at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "integer, got float"),
        ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
        ({"gap": (0, 1)}, ValueError, r"gap must be .* got \(0, 1\)"),
        ({"gap": (-0.1, 0)}, ValueError, "gap must be"),
        ({"gap": (0.5, 0.6)}, ValueError, "sum below 1"),
        ({"gap": 0.5}, ValueError, "gap must be"),
        ({"gap": (0.1, 0.1, 0.1)}, ValueError, "gap must be"),
        ({"gap": (math.nan, 0.1)}, ValueError, "gap must be"),
        ({"stochasticity": 1.5}, ValueError, r'stochasticity must be .* or "sde", got 1.5'),
        ({"stochasticity": -0.1}, ValueError, "stochasticity must be"),
        ({"stochasticity": "ode"}, ValueError, "got 'ode'"),
        ({"extrapolation": -1}, ValueError, "extrapolation must be"),
        ({"time_warp": (1, 0, 1)}, ValueError, "three positive numbers"),
        ({"time_warp": (1, 1)}, ValueError, "three positive numbers"),
        ({"style": "many"}, ValueError, "few, any, mul, got 'many'"),
        ({"correction": "none"}, ValueError, "published, balanced, got 'none'"),
    ],
)
def test_bad_settings(gaussian, settings, error, message):
    with pytest.raises(error, match=message):
        unified(gaussian.velocity, paddle.zeros(SHAPE), **({"steps": 2} | settings))


def test_style_any_needs_a_target_time():
    def velocity(x, t, target_t):
        return x

    velocity.takes_target_time = False
    unified(velocity, paddle.zeros(SHAPE), steps=1, style="few")
    with pytest.raises(ValueError, match="needs a model that takes a target time"):
        unified(velocity, paddle.zeros(SHAPE), steps=1, style="any")


def test_a_velocity_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"returned shape \[2, 2, 3\] for a state \[2, 1, 2, 3\]"):
        unified(lambda x, t, target_t: x[:, 0], paddle.zeros(SHAPE), steps=1)
