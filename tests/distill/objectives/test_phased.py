"""The contract of every phased objective, on closed-form denoisers in float64."""

from dataclasses import replace

import numpy as np
import paddle
import pytest

from distill import objectives
from distill.draws import ReplayDraws, StepDraws
from distill.objectives.consistency import consistency_target
from distill.objectives.phases import Jump, lookup, student_jump
from distill.roles import Roles
from fast_diffusers.time_grids import PhaseGrid
from fast_diffusers.transports import LinearPath

GRID = PhaseGrid(num_cells=12, num_phases=3, mu=0.7)
SHAPE = [6, 2, 4, 4]


class ToyDenoiser:
    """v = tanh(a·x + b·t + c) per channel, with float64 parameters [3, C]."""

    def __init__(self, seed: int):
        values = np.random.default_rng(seed).normal(size=(3, SHAPE[1]))
        self.theta = paddle.to_tensor(values, stop_gradient=False)

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        a, b, c = (p.reshape([1, -1, 1, 1]) for p in self.theta)
        return paddle.tanh(a * x + b * t.astype(x.dtype).reshape([-1, 1, 1, 1]) + c)

    def features(self, x, t, cond, taps=None, *, guidance=None):
        velocity = self(x, t, cond)
        return [velocity, x * velocity]


class ToyHeads:
    def __init__(self, seed: int):
        self.theta = paddle.to_tensor(np.random.default_rng(seed).normal(size=(2, 1)), stop_gradient=False)

    def __call__(self, features):
        return [paddle.sin(2 * f + w) for f, w in zip(features, self.theta, strict=True)]


@pytest.fixture
def roles():
    parts = [ToyDenoiser(seed) for seed in range(4)]
    parts[1].theta.stop_gradient = True  # gradients flow through the teacher's features, not into its weights
    return Roles(*parts, discriminator=ToyHeads(4))


@pytest.fixture
def batch():
    return {"latents": paddle.to_tensor(np.random.default_rng(9).normal(size=SHAPE)), "cond": {}}


@pytest.fixture
def draws():
    rng = np.random.default_rng(10)
    cells = np.arange(SHAPE[0]) * 2 + 1  # two rows in each phase of four cells
    in_phase = GRID.phase_start[cells]
    arrays = {"cell": cells, "noise": rng.normal(size=SHAPE)}
    for name in ("adv.cell", "dmd.cell", "reflow.cell", "fake.cell"):
        arrays[name] = in_phase + rng.integers(1, 4, SHAPE[0])
    for name in ("adv.real_noise", "adv.fake_noise", "dmd.noise", "reflow.noise", "fake.noise"):
        arrays[name] = rng.normal(size=SHAPE)
    return ReplayDraws(arrays)


# name: (objective, settings, the role whose parameters it trains, is the student's jump held fixed?)
OBJECTIVES = {
    "consistency-huber": (objectives.phased_consistency, {}, "student", False),
    "consistency-l2": (objectives.phased_consistency, {"distance": "l2"}, "student", False),
    "generator-hinge": (objectives.adversarial, {}, "student", False),
    "generator-lsgan": (objectives.adversarial, {"gan_loss": "lsgan"}, "student", False),
    "generator-non_saturating": (objectives.adversarial, {"gan_loss": "non_saturating"}, "student", False),
    "heads-hinge": (objectives.adversarial, {"side": "discriminator"}, "discriminator", False),
    "heads-lsgan": (objectives.adversarial, {"side": "discriminator", "gan_loss": "lsgan"}, "discriminator", False),
    "reflow": (objectives.reflow, {}, "student", True),
    "reflow-compat": (objectives.reflow, {"reference_compat": True}, "student", True),
    "fake-score": (objectives.fake_score, {}, "fake", False),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


@every_objective
def test_gradient_matches_finite_differences(name, roles, batch, draws):
    objective, settings, trained, hold_jump = OBJECTIVES[name]
    if hold_jump:  # the loss treats the student's own sample as a constant
        with paddle.no_grad():
            settings = {**settings, "jump": student_jump(roles, batch, draws, GRID)}
    theta = getattr(roles, trained).theta

    def loss_at(values):
        theta.set_value(values)
        return objective(roles, batch, draws, grid=GRID, **settings)[0]

    start = theta.numpy()
    loss = loss_at(start)
    assert loss.dtype == paddle.float64
    loss.backward()
    gradient = theta.grad.numpy()
    assert np.abs(gradient).max() > 1e-4
    for index in np.ndindex(*start.shape):
        step = np.zeros_like(start)
        step[index] = 1e-6
        numeric = (float(loss_at(start + step)) - float(loss_at(start - step))) / 2e-6
        assert gradient[index] == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@every_objective
def test_replayed_draws_repeat_the_loss_and_train_one_role_only(name, roles, batch, draws):
    objective, settings, trained, _ = OBJECTIVES[name]
    losses = [objective(roles, batch, draws, grid=GRID, **settings) for _ in range(2)]
    assert float(losses[0][0]) == float(losses[1][0])
    losses[0][0].backward()
    for role in ("student", "teacher", "target", "fake"):
        gradient = getattr(roles, role).theta.grad
        assert (gradient is not None) == (role == trained), role
    assert all(value.stop_gradient and value.size == 1 for value in losses[0][1].values())


@every_objective
def test_step_draws_are_enough(name, roles, batch, draws):
    objective, settings, _, _ = OBJECTIVES[name]
    loss, _ = objective(roles, batch, StepDraws(0, 5), grid=GRID, **settings)
    again, _ = objective(roles, batch, StepDraws(0, 5), grid=GRID, **settings)
    other, _ = objective(roles, batch, StepDraws(0, 6), grid=GRID, **settings)
    assert float(loss) == float(again) != float(other)


@pytest.mark.parametrize("compat", [False, True])
def test_distribution_matching_gradient(compat, roles, batch, draws):
    """d loss / dθ = (2/n) Σ g·∂x̂/∂θ, with g written out from its definition and ∂x̂/∂θ by finite differences."""
    loss, _ = objectives.distribution_matching(roles, batch, draws, grid=GRID, reference_compat=compat)
    loss.backward()
    theta = roles.student.theta
    gradient, start = theta.grad.numpy(), theta.numpy()
    jump = student_jump(roles, batch, draws, GRID)
    sigma = lookup(GRID.sigma_prev, draws.integers("dmd.cell", 0, 12, [6])).numpy().reshape(-1, 1, 1, 1)
    end, x = jump.sigma_end.numpy().reshape(-1, 1, 1, 1), jump.prediction.numpy()
    scale = (1 - sigma) / (1 - end)
    std = (sigma - end) / (1 - end) if compat else np.sqrt(sigma**2 - scale**2 * end**2)
    noisy = scale * x + std * draws.normal("dmd.noise", SHAPE).numpy()
    at = paddle.to_tensor(sigma.ravel())
    real = roles.teacher(paddle.to_tensor(noisy), at, {}).numpy()
    fake = roles.fake(paddle.to_tensor(noisy), at, {}).numpy()
    axes = (1, 2, 3)
    if compat:
        g = (real - fake) / (np.abs(x - real).mean(axes, keepdims=True) + 1e-5)
    else:
        x_real, x_fake = noisy + (end - sigma) * real, noisy + (end - sigma) * fake
        g = (x_fake - x_real) / (np.abs(x - x_real).mean(axes, keepdims=True) + 1e-5)
    assert float(loss) == pytest.approx((g**2).mean(), rel=1e-5)
    for index in np.ndindex(*start.shape):
        step = np.zeros_like(start)
        step[index] = 1e-6
        theta.set_value(start + step)
        above = student_jump(roles, batch, draws, GRID).prediction.numpy()
        theta.set_value(start - step)
        below = student_jump(roles, batch, draws, GRID).prediction.numpy()
        numeric = 2 * (g * (above - below) / 2e-6).mean()
        assert gradient[index] == pytest.approx(numeric, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("compat", [False, True])
def test_distribution_matching_gradient_vanishes_when_student_is_teacher(compat, roles, batch, draws):
    same = replace(roles, fake=roles.teacher)
    loss, _ = objectives.distribution_matching(same, batch, draws, grid=GRID, reference_compat=compat)
    loss.backward()
    assert float(loss) == 0 and np.abs(roles.student.theta.grad.numpy()).max() == 0


def gaussian_velocity(mean: float, std: float):
    """The exact velocity of N(mean, std²) data: E[ε − x0 | x_t], with x_t ~ N((1−t)·mean, (1−t)²std² + t²)."""

    def velocity(x, t, cond, *, target_t=None, guidance=None):
        t = t.astype(x.dtype).reshape([-1, 1, 1, 1])
        gain = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return gain * (x - (1 - t) * mean) - mean

    return velocity


def phase_end_samples(mean, std, count, cell, noise_seed=0):
    """Exact samples of N(mean, std²) data at the end of the phase of `cell`, as a jump."""
    rng = np.random.default_rng(noise_seed)
    shape = [count, 1, 4, 4]
    cells = paddle.full([count], cell, dtype="int64")
    end = lookup(GRID.sigma_end, cells)
    x0, noise = (paddle.to_tensor(rng.normal(size=shape)) for _ in range(2))
    x = LinearPath.interpolate(mean + std * x0, noise, end)
    x.stop_gradient = False
    return Jump(cells, x, lookup(GRID.sigma, cells), end, x)


def test_distribution_matching_moves_samples_towards_the_teacher():
    jump = phase_end_samples(mean=1.0, std=0.5, count=256, cell=6)
    roles = Roles(None, teacher=gaussian_velocity(-1.0, 0.5), fake=gaussian_velocity(1.0, 0.5))
    batch = {"latents": jump.noisy, "cond": {}}
    loss, _ = objectives.distribution_matching(roles, batch, StepDraws(0, 0), grid=GRID, jump=jump)
    loss.backward()
    assert float(jump.prediction.grad.mean()) > 0  # descent lowers x, towards −1


@pytest.mark.parametrize("cell", [1, 6, 10])
def test_exact_velocity_is_the_fixed_point_of_the_fake_score(cell):
    """Of all scaled and shifted velocities the exact one has the least loss on Gaussian data at the phase's end."""
    jump = phase_end_samples(mean=0.4, std=0.6, count=20000, cell=cell)
    exact = gaussian_velocity(0.4, 0.6)
    batch = {"latents": jump.noisy, "cond": {}}

    def loss(scale, shift):
        def fake(*args, **kwargs):
            return scale * exact(*args, **kwargs) + shift

        return float(
            objectives.fake_score(Roles(None, None, fake=fake), batch, StepDraws(0, 1), grid=GRID, jump=jump)[0]
        )

    best = loss(1.0, 0.0)
    for scale, shift in ((1.05, 0), (0.95, 0), (1, 0.05), (1, -0.05)):
        assert loss(scale, shift) > best


def test_consistency_vanishes_for_the_exact_consistency_function():
    """Data at one point: the velocity ε − x0 is constant along each path, so every jump is exact."""

    def exact(x, t, cond, *, target_t=None, guidance=None):
        return x / t.astype(x.dtype).reshape([-1, 1, 1, 1])  # data at the origin

    roles = Roles(exact, exact, exact)
    batch = {"latents": paddle.zeros(SHAPE, dtype="float64"), "cond": {}}
    loss, _ = objectives.phased_consistency(roles, batch, StepDraws(0, 3), grid=GRID, distance="l2")
    assert float(loss) < 1e-12


def test_consistency_target_is_one_teacher_cell_then_the_target_jump(roles, batch, draws):
    jump = student_jump(roles, batch, draws, GRID)
    sigma, prev, end = (
        table[jump.cell.numpy()].astype(np.float64).reshape(-1, 1, 1, 1)
        for table in (GRID.sigma, GRID.sigma_prev, GRID.sigma_end)
    )
    noisy = (1 - sigma) * batch["latents"].numpy() + sigma * draws.normal("noise", SHAPE).numpy()
    solved = (
        noisy + (prev - sigma) * roles.teacher(paddle.to_tensor(noisy), paddle.to_tensor(sigma.ravel()), {}).numpy()
    )
    velocity = roles.target(paddle.to_tensor(solved), paddle.to_tensor(prev.ravel()), {}).numpy()
    expected = solved + (end - prev) * velocity
    np.testing.assert_allclose(consistency_target(roles, batch, jump, GRID).numpy(), expected, atol=1e-6)


def test_true_guidance_extrapolates_the_teacher(roles, batch, draws):
    jump = student_jump(roles, batch, draws, GRID)

    def conditional_teacher(x, t, cond, *, guidance=None):
        return paddle.full_like(x, cond["level"])

    def target(x, t, cond, *, target_t=None, guidance=None):
        return paddle.zeros_like(x)

    guided = replace(roles, teacher=conditional_teacher, target=target)
    batch = {**batch, "cond": {"level": 2.0}, "null_cond": {"level": 1.0}}
    moved = consistency_target(guided, batch, jump, GRID, cfg_weight=3.0) - jump.noisy
    step = lookup(GRID.sigma_prev, jump.cell) - jump.sigma
    np.testing.assert_allclose(moved.numpy()[:, 0, 0, 0], 5.0 * step.numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match="null_cond"):
        consistency_target(guided, {**batch, "null_cond": None}, jump, GRID, cfg_weight=3.0)


# ---------------------------------- the published behaviour, difference by difference
def renoised_std(compat: bool) -> tuple[float, float]:
    """Standard deviation after carrying pure noise at σ_end up to σ, and the exact value of the noise part."""
    jump = phase_end_samples(mean=0.0, std=0.0, count=4000, cell=6)
    seen = {}

    def teacher(x, t, cond, *, guidance=None):
        seen["std"], seen["sigma"] = float(x.std()), float(t[0])
        return x

    roles = Roles(None, teacher, fake=teacher)
    draws = ReplayDraws(
        {
            "dmd.cell": np.full(4000, 7),
            "dmd.noise": np.random.default_rng(1).normal(size=[4000, 1, 4, 4]),
        }
    )
    batch = {"latents": jump.noisy, "cond": {}}
    objectives.distribution_matching(roles, batch, draws, grid=GRID, jump=jump, reference_compat=compat)
    return seen["std"], seen["sigma"]


def test_renoise_is_variance_exact_and_compat_is_not():
    std, sigma = renoised_std(compat=False)
    assert std == pytest.approx(sigma, rel=0.01)  # 64,000 numbers: sampling error 0.3%
    std, sigma = renoised_std(compat=True)
    assert std < 0.9 * sigma


def test_renoise_published_figures():
    """The published rule gives a total standard deviation of .464 instead of .65 between σ = .513 and .65."""
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(0.513 * rng.normal(size=[100, 1, 50, 50]))
    noise = paddle.to_tensor(rng.normal(size=x.shape))
    start, end = paddle.full([100], 0.513, dtype="float64"), paddle.full([100], 0.65, dtype="float64")
    assert float(LinearPath.renoise(x, start, end, noise).std()) == pytest.approx(0.65, abs=0.002)
    assert float(LinearPath.renoise_published(x, start, end, noise).std()) == pytest.approx(0.464, abs=0.002)


def test_reflow_step_length_is_aligned_and_compat_is_off_by_one_cell(roles, batch, draws):
    """With the exact velocity of a sample the aligned step lands on it; the published one overshoots by a cell."""
    jump = student_jump(roles, batch, draws, GRID)
    jump = replace(jump, prediction=jump.prediction.detach())
    recorded = {}

    def student(x, t, cond, *, target_t=None, guidance=None):
        recorded["t"] = t
        length = (t - jump.sigma_end).reshape([-1, 1, 1, 1])
        return (x - jump.prediction) / length

    exact = replace(roles, student=student)
    aligned, _ = objectives.reflow(exact, batch, draws, grid=GRID, jump=jump)
    shifted, _ = objectives.reflow(exact, batch, draws, grid=GRID, jump=jump, reference_compat=True)
    assert float(aligned) < 1e-8
    assert float(shifted) > 1e-2
    np.testing.assert_array_equal(recorded["t"].numpy(), GRID.sigma_prev[draws.arrays["reflow.cell"]])


@pytest.mark.parametrize(
    "objective, settings, message",
    [
        (objectives.phased_consistency, {"distance": "l1"}, "'huber' or 'l2', not 'l1'"),
        (objectives.adversarial, {"gan_loss": "wgan"}, "hinge, lsgan, non_saturating, not 'wgan'"),
        (objectives.adversarial, {"gan_loss": "wgan", "side": "discriminator"}, "not 'wgan'"),
        (objectives.adversarial, {"side": "both"}, "'generator' or 'discriminator', not 'both'"),
    ],
)
def test_unknown_settings_are_named(objective, settings, message, roles, batch, draws):
    with pytest.raises(ValueError, match=message):
        objective(roles, batch, draws, grid=GRID, **settings)
