"""The objectives of SANA-Sprint against a restatement in numpy, the teacher's ODE, and Gaussian data."""

from dataclasses import replace

import numpy as np
import paddle
import pytest

from distill.discriminators import LaddDiscriminator
from distill.draws import ReplayDraws, StepDraws
from distill.log_variance import LogVariance
from distill.objectives import trigflow_adversarial, trigflow_consistency, trigflow_regression
from distill.objectives.trigflow import draw_angle
from distill.roles import Roles, adapter_roles
from distill.trainer import frozen
from fast_diffusers import lora
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.models import SanaTransformer2DModel
from fast_diffusers.pipelines.shipped import open_pipeline

ROWS, SHAPE = 6, [6, 2, 3, 3]
NOISE = "noise", "adv.noise", "adv.renoise", "disc.noise", "data.noise"
TAU = "tau", "data.tau", "adv.tau", "adv.renoise_tau", "disc.real_tau", "disc.fake_tau"
SCALES = np.array([4.0, 4.5, 5.0])


def column(t):
    return np.reshape(t, [-1, 1, 1, 1])


class Toy:
    """v = tanh(a·x + b·t + c·level + d·guidance/4), float64, guidance 0 where none is told; `numpy` is the same."""

    def __init__(self, seed, trained=False, embeds_guidance=True):
        self.theta = paddle.to_tensor(np.random.default_rng(seed).normal(size=4), stop_gradient=not trained)
        self.embeds_guidance = embeds_guidance

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        assert (guidance is not None) <= self.embeds_guidance
        assert target_t is None or (target_t == 0).all()
        a, b, c, d = self.theta
        told = c * cond["level"].reshape([-1, 1, 1, 1])
        if guidance is not None:
            told = told + d * guidance.reshape([-1, 1, 1, 1]) / 4
        return paddle.tanh(a * x + b * t.reshape([-1, 1, 1, 1]) + told)

    def features(self, x, t, cond, taps=None, *, guidance=None):
        velocity = self(x, t, cond, guidance=guidance)
        return [[velocity, x * velocity][tap] for tap in ((0, 1) if taps is None else taps)]

    def numpy(self, x, t, level, guidance=None, theta=None):
        a, b, c, d = self.theta.numpy() if theta is None else theta
        told = 0 if guidance is None else d * column(guidance) / 4
        return np.tanh(a * x + b * column(t) + c * column(level) + told)


class ToyHeads:
    def __init__(self, seed):
        self.theta = paddle.to_tensor(np.random.default_rng(seed).normal(size=2), stop_gradient=False)

    def __call__(self, features):
        return [paddle.sin(2 * f + w) for f, w in zip(features, self.theta, strict=False)]


class ToyLogVariance:
    def __init__(self):
        self.theta = paddle.to_tensor(np.array([-1.3, 0.4]), stop_gradient=False)

    def __call__(self, angle):
        return self.theta[0] + self.theta[1] * angle


@pytest.fixture
def roles():
    return Roles(Toy(0, trained=True), Toy(1), discriminator=ToyHeads(2))


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    return {
        "latents": paddle.to_tensor(rng.normal(size=SHAPE)),
        "cond": Cond(level=paddle.to_tensor(rng.normal(size=[ROWS, 1]))),
        "null_cond": Cond(level=paddle.to_tensor(rng.normal(size=[1, 1]))),
        "guidance": paddle.to_tensor(rng.uniform(size=ROWS)),
    }


@pytest.fixture
def draws():
    rng = np.random.default_rng(4)
    arrays = {name: rng.normal(size=SHAPE) for name in NOISE} | {name: rng.normal(size=ROWS) for name in TAU}
    arrays |= {"guidance": rng.integers(0, 3, ROWS), "adv.max_time": np.linspace(0.05, 0.95, ROWS)}
    arrays["data.max_time"] = arrays["adv.max_time"][::-1].copy()
    return ReplayDraws(arrays)


# ---------------------------------------------------------------------------------------------- restatements
class Restated:
    """What a setting means, written out in numpy."""

    def __init__(self, roles, batch, draws, **settings):
        self.s = {"sigma_data": 0.5, "tau_mean": 0.2, "tau_std": 1.6, "guidance_scales": SCALES, **settings}
        self.roles, self.draws, self.data = roles, draws.arrays, batch["latents"].numpy()
        self.level, self.null = batch["cond"]["level"].numpy().ravel(), batch["null_cond"]["level"].item()
        way, scales = self.s.get("teacher_guidance", "cfg"), self.s["guidance_scales"]
        self.w = batch["guidance"].numpy() if scales is None else np.array(scales)[self.draws["guidance"]]
        self.cfg = way == "cfg" and scales is not None
        self.told = self.w if roles.student.embeds_guidance else None

    def angle(self, name, mean="tau_mean", std="tau_std"):
        return np.arctan(np.exp(self.s[mean] + self.s[std] * self.draws[name]) / self.s["sigma_data"])

    def student(self, x, t, theta=None):
        return self.roles.student.numpy(x, t, self.level, self.told, theta)

    def teacher(self, x, t):
        if not self.cfg:
            return self.roles.teacher.numpy(x, t, self.level, self.w)
        given, null = (self.roles.teacher.numpy(x, t, level) for level in (self.level, self.null))
        return null + column(self.w) * (given - null)

    @staticmethod
    def trigflow(velocity, x_hat, t, *args):
        s = np.sin(t) / (np.sin(t) + np.cos(t))
        scale = column(np.sqrt(s**2 + (1 - s) ** 2))
        return (1 - 2 * column(s)) * x_hat + scale * velocity(scale * x_hat, s, *args)

    def consistency(self):
        """(t, x̂, goal F⁻ + g/(‖g‖ + c), norms), with J by sixth-order differences."""
        t, sigma = self.angle("tau"), self.s["sigma_data"]
        cos, sin = column(np.cos(t)), column(np.sin(t))
        x_hat = cos * self.data + sin * self.draws["noise"]
        slope, before = (self.trigflow(each, x_hat, t) for each in (self.teacher, self.student))
        towards_x, towards_t = cos * sin * slope, np.cos(t) * np.sin(t)
        change = 0
        for k, weight in ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60)):
            for sign in (1, -1):
                h = sign * k * 1e-3
                change += sign * weight * self.trigflow(self.student, x_hat + h * towards_x, t + h * towards_t) / 1e-3
        r = self.s.get("tangent_ratio", 1)
        g = -(cos**2) * (sigma * before - sigma * slope) - r * (cos * sin * sigma * x_hat + sigma * change)
        norm = np.sqrt((g**2).sum((1, 2, 3)))
        return t, x_hat, before + g / column(norm + self.s.get("tangent_constant", 0.1)), norm

    def consistency_loss(self, parts, theta, log_variance=(0, 0)):
        t, x_hat, goal, _ = parts
        spread = log_variance[0] + log_variance[1] * t
        error = ((self.trigflow(self.student, x_hat, t, theta) - goal) ** 2).mean((1, 2, 3))
        return (np.exp(-spread) * error / (self.s["sigma_data"] * np.tan(t)) + spread).mean()

    def seen(self, x, name, noise):
        """x at the level of a draw, and its flow time."""
        t = self.angle(name, "renoise_mean", "renoise_std")
        s = np.sin(t) / (np.sin(t) + np.cos(t))
        return (1 - column(s)) * x + column(s) * self.draws[noise], s

    def logits(self, x, s, level, theta, taps):
        told = None if self.cfg else np.resize(self.w, len(s))
        v = self.roles.teacher.numpy(x, s, level, told)
        features = [[v, x * v][tap] for tap in taps]
        return np.concatenate([np.sin(2 * f + w).reshape(len(s), -1) for f, w in zip(features, theta, strict=False)], 1)

    def sample(self, prefix, theta):
        at_noise = self.draws[f"{prefix}.max_time"] < self.s.get("max_time_probability", 0.5)
        t = np.where(at_noise, np.pi / 2, self.angle(f"{prefix}.tau"))
        x_hat = column(np.cos(t)) * self.data + column(np.sin(t)) * self.draws[f"{prefix}.noise"]
        return column(np.cos(t)) * x_hat - column(np.sin(t)) * self.trigflow(self.student, x_hat, t, theta)

    def regression(self, theta):
        return ((self.sample("data", theta) - self.data) ** 2).mean()

    def adversarial(self, side, student_theta, head_theta):
        self.s = {"renoise_mean": -0.6, "renoise_std": 1.0, **self.s}
        taps = self.s.get("taps", (0, 1))
        fake = self.sample("adv", student_theta)
        if side == "generator":
            return -self.logits(*self.seen(fake, "adv.renoise_tau", "adv.renoise"), self.level, head_theta, taps).mean()
        real, real_s = self.seen(self.data, "disc.real_tau", "disc.noise")
        fake, fake_s = self.seen(fake, "disc.fake_tau", "disc.noise")
        bad, bad_s, level = fake, fake_s, self.level
        if self.s.get("misaligned", True):
            bad, bad_s = np.concatenate([fake, np.roll(real, 1, 0)]), np.concatenate([fake_s, np.roll(real_s, 1)])
            level = np.tile(self.level, 2)
        real_logits = self.logits(real, real_s, self.level, head_theta, taps)
        fake_logits = self.logits(bad, bad_s, level, head_theta, taps)
        return 0.5 * (np.maximum(1 - real_logits, 0).mean() + np.maximum(1 + fake_logits, 0).mean())


def slope_of(function, theta):
    steps = 1e-6 * np.eye(len(theta))
    return np.array([(function(theta + step) - function(theta - step)) / 2e-6 for step in steps])


GUIDANCE = {
    "cfg": {},
    "one-scale": {"guidance_scales": (3.0, 3.0, 3.0)},
    "embedded": {"teacher_guidance": "embedded"},
    "unguided": {"guidance_scales": None},
}
CONSISTENCY = GUIDANCE | {
    "warm-up": {"tangent_ratio": 0.3},
    "start": {"tangent_ratio": 0.0, "tangent_constant": 0.5},
    "times": {"sigma_data": 0.8, "tau_mean": -0.4, "tau_std": 1.0},
}
ADVERSARIAL = GUIDANCE | {
    "aligned": {"misaligned": False},
    "one-tap": {"taps": (1,)},
    "times": {"sigma_data": 0.8, "tau_mean": -0.4, "renoise_mean": 0.3, "renoise_std": 0.5},
    "max-time": {"max_time_probability": 1.0},
    "no-max-time": {"max_time_probability": 0.0},
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_is_that_of_the_definition(name, weighted, roles, batch, draws):
    settings, learned = CONSISTENCY[name], ToyLogVariance() if weighted else None
    restated = Restated(roles, batch, draws, **settings)
    parts, theta = restated.consistency(), roles.student.theta.numpy()
    spread = learned.theta.numpy() if weighted else (0, 0)
    loss, metrics = trigflow_consistency(roles, batch, draws, log_variance=learned, **settings)
    assert loss.dtype == paddle.float64
    assert loss.item() == pytest.approx(restated.consistency_loss(parts, theta, spread), rel=1e-9)
    assert metrics["consistency"].item() == loss.item()
    assert metrics["tangent_norm"].item() == pytest.approx(parts[3].mean(), rel=1e-9)
    error = (parts[2] - restated.trigflow(restated.student, parts[1], parts[0])) ** 2
    assert metrics["consistency_error"].item() == pytest.approx(error.mean(), rel=1e-9)
    assert ("log_variance" in metrics) == weighted
    assert all(value.stop_gradient and value.size == 1 for value in metrics.values())
    loss.backward()
    numeric = slope_of(lambda values: restated.consistency_loss(parts, values, spread), theta)
    np.testing.assert_allclose(roles.student.theta.grad.numpy(), numeric, rtol=1e-5, atol=1e-9)
    assert roles.teacher.theta.grad is None and (np.abs(numeric[:3]) > 1e-4).all()
    if weighted:
        numeric = slope_of(lambda values: restated.consistency_loss(parts, theta, values), spread)
        np.testing.assert_allclose(learned.theta.grad.numpy(), numeric, rtol=1e-6)


@pytest.mark.parametrize("side", ["generator", "discriminator"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_is_that_of_the_definition(name, side, roles, batch, draws):
    settings, heads = ADVERSARIAL[name], roles.discriminator
    restated = Restated(roles, batch, draws, **settings)
    thetas = [roles.student.theta.numpy(), heads.theta.numpy()]
    heads.theta.stop_gradient = side == "generator"
    loss, metrics = trigflow_adversarial(roles, batch, draws, side=side, **settings)
    assert loss.dtype == paddle.float64
    assert loss.item() == pytest.approx(restated.adversarial(side, *thetas), rel=1e-9)
    names = {"adversarial"} if side == "generator" else {"discriminator", "logit_real", "logit_fake"}
    extra = {"logit_misaligned"} if side == "discriminator" and settings.get("misaligned", True) else set()
    assert metrics.keys() == names | extra
    assert all(value.stop_gradient and value.size == 1 for value in metrics.values())
    loss.backward()
    trained, other = (roles.student, heads) if side == "generator" else (heads, roles.student)
    assert other.theta.grad is None and roles.teacher.theta.grad is None
    at = 0 if side == "generator" else 1
    used = thetas[at].copy()
    numeric = slope_of(lambda v: restated.adversarial(side, *(v if i == at else thetas[i] for i in (0, 1))), used)
    np.testing.assert_allclose(trained.theta.grad.numpy(), numeric, rtol=1e-5, atol=1e-9)
    assert np.abs(numeric).max() > 1e-4


@pytest.mark.parametrize("name", ["embedded", "unguided", "max-time", "no-max-time"])
def test_regression_is_that_of_the_definition(name, roles, batch, draws):
    settings, theta = ADVERSARIAL[name], roles.student.theta.numpy()
    restated = Restated(roles, batch, draws, **settings)
    loss, metrics = trigflow_regression(roles, batch, draws, **settings)
    assert loss.dtype == paddle.float64
    assert loss.item() == metrics["regression"].item() == pytest.approx(restated.regression(theta), rel=1e-9)
    assert metrics.keys() == {"regression"} and metrics["regression"].stop_gradient
    loss.backward()
    numeric = slope_of(restated.regression, theta)
    np.testing.assert_allclose(roles.student.theta.grad.numpy(), numeric, rtol=1e-5, atol=1e-9)
    assert roles.teacher.theta.grad is None and np.abs(numeric).max() > 1e-4


@pytest.mark.parametrize("objective", [trigflow_consistency, trigflow_adversarial])
def test_a_student_without_guidance_learns_one_scale(objective, roles, batch, draws):
    student = Toy(0, trained=True, embeds_guidance=False)
    roles, one = replace(roles, student=student), ReplayDraws(draws.arrays | {"guidance": np.zeros(ROWS, np.int64)})
    restated = Restated(roles, batch, one, guidance_scales=(4.5,))
    loss, _ = objective(roles, batch, one, guidance_scales=(4.5,))
    theta = student.theta.numpy()
    if objective is trigflow_consistency:
        expected = restated.consistency_loss(restated.consistency(), theta)
    else:
        expected = restated.adversarial("generator", theta, roles.discriminator.theta.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match=r"embeds no guidance: it can learn one of \(4.0, 4.5, 5.0\), not all"):
        objective(roles, batch, draws)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (trigflow_consistency, {}),
        (trigflow_consistency, {"log_variance": LogVariance(18)}),
        (trigflow_adversarial, {}),
        (trigflow_adversarial, {"side": "discriminator"}),
        (trigflow_regression, {}),
    ],
)
def test_step_draws_are_enough(objective, settings, roles, batch):
    losses = [objective(roles, batch, StepDraws(0, step), **settings)[0].item() for step in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses).all()


def test_finite_differences_are_near_the_exact_derivative(roles, batch, draws):
    results = [trigflow_consistency(roles, batch, draws, derivative=mode) for mode in ("exact", "finite_difference")]
    norms = [metrics["tangent_norm"].item() for _, metrics in results]
    assert norms[0] != norms[1] == pytest.approx(norms[0], rel=1e-4)


# ---------------------------------------------------------------------------------------------- the tangent
class Offset:
    """A student's velocity plus zeros that receive the gradient of the loss at its prediction."""

    def __init__(self, velocity, shape):
        self.velocity, self.zeros = velocity, paddle.to_tensor(np.zeros(shape), stop_gradient=False)

    def __call__(self, *args, **kwargs):
        return self.velocity(*args, **kwargs) + self.zeros


def test_tangent_is_the_derivative_of_the_consistency_function_along_the_teachers_path(roles, batch, draws):
    """cos t·df/dt, by central differences along the teacher's ODE, solved by a Runge-Kutta method; σ_d = 0.5."""
    student = Offset(roles.student, SHAPE)
    loss, _ = trigflow_consistency(replace(roles, student=student), batch, draws)
    loss.backward()
    restated = Restated(roles, batch, draws)
    t, sigma = restated.angle("tau"), 0.5
    # The loss's gradient at F is −2·w·g/(‖g‖ + c) / (rows · elements), and an offset of v moves F by λ.
    weight, shrink = column(1 / (sigma * np.tan(t))), column(1 / (np.sin(t) + np.cos(t)))
    normalised = student.zeros.grad.numpy() * ROWS * 18 / (-2 * weight * shrink)
    length = np.sqrt((normalised**2).sum((1, 2, 3)))
    tangent = normalised / column(length) * column(0.1 * length / (1 - length))

    def slope(x, t):
        return sigma * restated.trigflow(restated.teacher, x / sigma, t)

    def moved(x, t, h):
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, t + h / 2)
        k3 = slope(x + h / 2 * k2, t + h / 2)
        k4 = slope(x + h * k3, t + h)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def consistency_function(x, t):
        return column(np.cos(t)) * x - column(np.sin(t)) * sigma * restated.trigflow(restated.student, x / sigma, t)

    x = column(np.cos(t)) * sigma * restated.data + column(np.sin(t)) * sigma * restated.draws["noise"]
    change = 0
    for k, part in ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60)):
        for sign in (1, -1):
            h = sign * k * 1e-3
            change += sign * part * consistency_function(moved(x, t, h), t + h) / 1e-3
    np.testing.assert_allclose(tangent, column(np.cos(t)) * change, rtol=1e-6, atol=1e-9)


S = 0.6


class Exact:
    """Velocity of Gaussian data N(0, S²); `jumps`: the straight way to the data's end of the path instead."""

    def __init__(self, jumps):
        self.jumps = jumps

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        t = t.reshape([-1, 1, 1, 1])
        variance = t**2 + (1 - t) ** 2 * S**2
        return x * ((1 - S / variance.sqrt()) / t if self.jumps else (t - (1 - t) * S**2) / variance)


@pytest.mark.parametrize(("jumps", "vanishes"), [(True, True), (False, False)])
def test_consistency_gradient_vanishes_at_the_exact_consistency_function(jumps, vanishes, batch, draws):
    student = Offset(Exact(jumps), SHAPE)
    loss, metrics = trigflow_consistency(Roles(student, Exact(False)), batch, draws, guidance_scales=None)
    loss.backward()
    assert (np.abs(student.zeros.grad.numpy()).max() < 1e-12) == vanishes
    assert (metrics["tangent_norm"].item() < 1e-12) == vanishes


# ---------------------------------------------------------------------------------------------- times and pairs
def test_angles_stay_below_half_pi():
    """Where the arctangent rounds up to pi/2, tan t would be negative, and so the loss's weight."""
    tau = np.array([-12.0, 0.0, 5.0, 8.0, 20.0, 200.0], np.float32)
    for dtype in ("float32", "float64"):
        angle = draw_angle(ReplayDraws({"tau": tau}), "tau", 6, 0.2, 1.6, 0.5, getattr(paddle, dtype))
        tangent = paddle.tan(angle).numpy()
        assert (tangent > 0).all() and (np.diff(tangent) >= 0).all()
        np.testing.assert_allclose(tangent[:3], np.exp(0.2 + 1.6 * tau[:3].astype(float)) / 0.5, rtol=1e-3)
        assert angle[-1].item() == pytest.approx(np.pi / 2, abs=1.01e-4)


class Recorder(Toy):
    def __init__(self, seed, **settings):
        super().__init__(seed, **settings)
        self.calls, self.seen = [], []

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        self.calls.append((x, t))
        return super().__call__(x, t, cond, target_t=target_t, guidance=guidance)

    def features(self, x, t, cond, taps=None, *, guidance=None):
        self.seen.append((x, t, cond, guidance))
        return super().features(x, t, cond, taps, guidance=guidance)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_max_time_is_pure_noise_and_only_for_adversarial_samples(probability, roles, batch, draws):
    student = Recorder(0, trained=True)
    roles = replace(roles, student=student)
    trigflow_adversarial(roles, batch, draws, max_time_probability=probability)
    ((x, t),) = student.calls
    pure = draws.arrays["adv.max_time"] < probability
    assert ((t == 1).numpy() == pure).all() and (t.numpy()[~pure] < 1).all()
    np.testing.assert_array_equal(x.numpy()[pure], draws.arrays["adv.noise"][pure])
    student.calls.clear()
    trigflow_consistency(roles, batch, draws)
    assert all((t < 1).all() for _, t in student.calls)


def test_student_runs_twice_for_consistency_and_the_teacher_once(roles, batch, draws):
    student, teacher = Recorder(0, trained=True), Recorder(1)
    trigflow_consistency(replace(roles, student=student, teacher=teacher), batch, draws)
    assert [len(x) for x, _ in student.calls] == [ROWS] * 2
    assert [len(x) for x, _ in teacher.calls] == [2 * ROWS]


@pytest.mark.parametrize("rows", [1, ROWS])
def test_heads_see_real_fake_and_misaligned_rows(rows, roles, batch, draws):
    """Real rows keep their order and prompts; times of real and fake rows are drawn apart."""
    teacher = Recorder(1)
    draws = ReplayDraws({name: array[:rows] for name, array in draws.arrays.items()})
    batch = {**batch, "latents": batch["latents"][:rows], "cond": batch["cond"].mask(list(range(rows)))}
    settings = {"side": "discriminator", "teacher_guidance": "embedded"}
    trigflow_adversarial(replace(roles, teacher=teacher), batch, draws, **settings)
    ((x, t, cond, guidance),) = teacher.seen
    parts = 3 if rows > 1 else 2
    assert len(x) == parts * rows
    restated = Restated(roles, batch, draws, renoise_mean=-0.6, renoise_std=1.0, **settings)
    real, time = restated.seen(batch["latents"].numpy(), "disc.real_tau", "disc.noise")
    np.testing.assert_allclose(x[:rows].numpy(), real, rtol=1e-12)
    np.testing.assert_allclose(t[:rows].numpy(), time, rtol=1e-12)
    np.testing.assert_allclose(t[rows : 2 * rows].numpy(), restated.seen(real, "disc.fake_tau", "disc.noise")[1])
    for k in range(parts):
        part = slice(k * rows, (k + 1) * rows)
        np.testing.assert_array_equal(cond["level"][part].numpy(), batch["cond"]["level"].numpy())
        np.testing.assert_array_equal(guidance[part].numpy(), restated.w)
    if rows > 1:
        np.testing.assert_array_equal(x[2 * rows :].numpy(), np.roll(x[:rows].numpy(), 1, axis=0))
        np.testing.assert_array_equal(t[2 * rows :].numpy(), np.roll(t[:rows].numpy(), 1))


def test_conditioning_may_be_empty(batch):
    class Plain(Exact):
        def features(self, x, t, cond, taps=None, *, guidance=None):
            return [x * self(x, t, cond)] * 2

    roles = Roles(Plain(True), Plain(False), discriminator=ToyHeads(0))
    batch = {"latents": batch["latents"], "cond": {}}
    for side in ("generator", "discriminator"):
        loss, _ = trigflow_adversarial(roles, batch, StepDraws(0, 0), side=side, guidance_scales=None)
        assert np.isfinite(loss.item())


# ---------------------------------------------------------------------------------------------- networks
def small_sana(dtype="float32", **changes):
    """8×8 gray, two blocks, with dense times."""
    paddle.seed(0)
    model = SanaTransformer2DModel(
        in_channels=1,
        out_channels=1,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=10,
        sample_size=8,
        patch_size=2,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
        **changes,
    )
    for parameter in model.parameters():  # the zero-initialised output would hide everything behind it
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    return model.to(dtype=dtype)


def sana_batch(rows, dtype="float32"):
    mask = paddle.to_tensor([[1.0, 1.0, 0.0]]).astype(dtype)
    text = paddle.randn([rows, 3, 10]).astype(dtype)
    return {
        "latents": paddle.randn([rows, 1, 8, 8]).astype(dtype),
        "cond": Cond(prompt_embeds=text, prompt_attention_mask=mask.expand([rows, 3])),
        "null_cond": Cond(prompt_embeds=0 * text[:1], prompt_attention_mask=mask),
    }


@pytest.fixture
def sana_roles():
    teacher = small_sana()
    student = SanaTransformer2DModel.from_transformer(teacher, guidance_embeds=True)
    lora.freeze(teacher)
    return Roles(denoiser_for(student), denoiser_for(teacher), discriminator=LaddDiscriminator(16, 2))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_guidance_embedder_of_a_new_student_has_a_gradient(sana_roles):
    for objective in (trigflow_consistency, trigflow_adversarial):
        student = sana_roles.student.transformer
        loss, _ = objective(sana_roles, sana_batch(4), StepDraws(0, 0))
        loss.backward()
        found = gradients(student)
        assert found.keys() == dict(student.named_parameters()).keys()
        assert all(np.isfinite(each.numpy()).all() for each in found.values())
        assert found["time_embed.guidance_embedder.linear_2.weight"].abs().max().item() > 0
        assert gradients(sana_roles.teacher.transformer) == {}
        for parameter in student.parameters():
            parameter.clear_gradient(False)


def test_derivative_of_a_sana_is_exact():
    """In float64 against differences, with guidance, prompts and masks held."""
    student, teacher = (small_sana("float64", guidance_embeds=guided) for guided in (True, False))
    roles = Roles(denoiser_for(student), denoiser_for(teacher))
    batch = sana_batch(3, "float64")
    results = [
        trigflow_consistency(roles, batch, StepDraws(0, 0), derivative=mode)[1]["tangent_norm"]
        for mode in ("exact", "finite_difference")
    ]
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 9, 17])
def test_sides_train_their_own_weights_for_any_batch_size(rows, sana_roles):
    student, heads = sana_roles.student.transformer, sana_roles.discriminator
    batch, vectors = sana_batch(rows), {name: each.numpy() for name, each in heads.named_buffers()}
    with frozen(heads):
        loss, _ = trigflow_adversarial(sana_roles, batch, StepDraws(0, 0))
    loss.backward()
    assert gradients(student) and not gradients(heads) and not gradients(sana_roles.teacher.transformer)
    assert all((each.numpy() == vectors[name]).all() for name, each in heads.named_buffers())
    for parameter in student.parameters():
        parameter.clear_gradient(False)
    loss, _ = trigflow_adversarial(sana_roles, batch, StepDraws(0, 1), side="discriminator")
    loss.backward()
    found = gradients(heads)
    assert found.keys() == dict(heads.named_parameters()).keys() and not gradients(student)
    assert all(np.isfinite(each.numpy()).all() for each in found.values())


@pytest.mark.parametrize("side", ["consistency", "generator", "discriminator"])
def test_adapter_of_flux_learns_embedded_guidance(side, tiny_teacher):
    pipe = open_pipeline(tiny_teacher)
    lora.freeze(pipe.transformer)
    adapter = lora.inject(pipe.transformer, 2, 2, ["to_q", "to_out.0", "proj_out"], name="student")
    heads = LaddDiscriminator(pipe.denoiser.feature_channels, 2)
    roles = adapter_roles(pipe.denoiser, pipe.transformer, "student", discriminator=heads)
    batch = {"latents": paddle.randn([3, 1, 8, 8]), "cond": flux_cond(pipe.transformer.config, 3)}
    settings = {"guidance_scales": (3.0, 3.5), "teacher_guidance": "embedded"}
    if side == "consistency":
        loss, _ = trigflow_consistency(roles, batch, StepDraws(0, 0), log_variance=LogVariance(64), **settings)
    else:
        with frozen(heads if side == "generator" else None):
            loss, _ = trigflow_adversarial(roles, batch, StepDraws(0, 0), side=side, **settings)
    loss.backward()
    trained = {p.name for p in (heads.parameters() if side == "discriminator" else adapter)}
    everything = [*pipe.transformer.parameters(), *heads.parameters()]
    found = {p.name for p in everything if p.grad is not None}
    assert found == trained and np.isfinite(loss.item())


def flux_cond(config, rows):
    return Cond(
        prompt_embeds=paddle.randn([rows, 1, config.joint_attention_dim]),
        pooled_prompt_embeds=paddle.randn([rows, config.pooled_projection_dim]),
    )


# ---------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (trigflow_consistency, {"tangent_ratio": 1.5}, r"tangent_ratio must lie in \[0, 1\], got 1.5"),
        (trigflow_consistency, {"derivative": "jvp"}, "derivative is 'exact' or 'finite_difference', not 'jvp'"),
        (trigflow_consistency, {"teacher_guidance": "none"}, "teacher_guidance is 'cfg' or 'embedded', not 'none'"),
        (trigflow_consistency, {"guidance_scales": ()}, "guidance_scales is empty"),
        (trigflow_adversarial, {"side": "both"}, "side is 'generator' or 'discriminator', not 'both'"),
        (trigflow_adversarial, {"max_time_probability": 1.57}, r"max_time_probability must lie in \[0, 1\], got 1.57"),
        (trigflow_regression, {"max_time_probability": -0.5}, r"max_time_probability must lie in \[0, 1\], got -0.5"),
    ],
)
def test_bad_settings_are_named(objective, settings, message, roles, batch):
    with pytest.raises(ValueError, match=message):
        objective(roles, batch, StepDraws(0, 0), **settings)


@pytest.mark.parametrize("objective", [trigflow_consistency, trigflow_adversarial])
def test_classifier_free_guidance_needs_a_null_condition(objective, roles, batch):
    del batch["null_cond"]
    with pytest.raises(ValueError, match="'cfg' needs batch"):
        objective(roles, batch, StepDraws(0, 0))
