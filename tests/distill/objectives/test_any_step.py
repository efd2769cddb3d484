"""RCGM and TwinFlow against a restatement in numpy, and against closed forms of Gaussian data."""

from itertools import pairwise

import numpy as np
import paddle
import pytest

from distill.draws import ReplayDraws, StepDraws
from distill.objectives import rcgm, twinflow
from distill.objectives.rcgm import AnyStep, any_step_target, regression
from distill.objectives.twinflow import assign_parts
from distill.roles import Roles
from fast_diffusers.conditioning import Cond

ROWS, SHAPE = 10, [10, 2, 3, 3]
SPLIT = {"e2e": 1, "mul": 1, "any": 1, "one": 1, "adv": 1}


def column(t):
    return np.reshape(t, [-1, 1, 1, 1])


class Toy:
    """v = tanh(a·x + b·t + c·target_t + d) + e·condition·guidance, float64; `numpy` is the same in numpy."""

    def __init__(self, seed, trained=False):
        values = np.random.default_rng(seed).normal(size=5)
        self.theta = paddle.to_tensor(values, stop_gradient=not trained)

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        a, b, c, d, e = self.theta
        t, target_t = (each.astype(x.dtype).reshape([-1, 1, 1, 1]) for each in (t, target_t))
        extra = e * (cond["level"] * guidance.unsqueeze(1)).reshape([-1, 1, 1, 1])
        return paddle.tanh(a * x + b * t + c * target_t + d) + extra

    def numpy(self, x, t, target_t, level, guidance, theta=None):
        a, b, c, d, e = self.theta.numpy() if theta is None else theta
        return np.tanh(a * x + b * column(t) + c * column(target_t) + d) + e * column(level * guidance)


@pytest.fixture
def roles():
    return Roles(Toy(0, trained=True), Toy(1), target=Toy(2))


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    return {
        "latents": paddle.to_tensor(rng.normal(size=SHAPE)),
        "cond": Cond(level=paddle.to_tensor(rng.normal(size=[ROWS, 1]))),
        "null_cond": Cond(level=paddle.zeros([ROWS, 1], dtype="float64")),
        "guidance": paddle.to_tensor(rng.uniform(size=ROWS)),
    }


@pytest.fixture
def draws():
    rng = np.random.default_rng(4)
    arrays = {name: rng.normal(size=SHAPE) for name in ("noise", "fake.noise", "match.noise")}
    arrays |= {name: rng.uniform(size=ROWS) for name in ("t", "target_t", "match.t")}
    arrays["target_t"][:2] = 0, 1e-3  # no way at all, and one shorter than the first piece
    return ReplayDraws(arrays)


class Restated:
    """The terms as written in the papers, in numpy. Each is a list of (x, t, target_t, goal, weight, rows)."""

    def __init__(self, roles, batch, draws, settings):
        self.roles, self.draws, self.s = roles, draws.arrays, AnyStep(**settings)
        self.data, self.guidance = batch["latents"].numpy(), batch["guidance"].numpy()
        self.level = batch["cond"]["level"].numpy().ravel()

    def velocity(self, model, x, t, target_t, rows, null=False):
        level = 0 * self.level[rows] if null else self.level[rows]
        return model.numpy(x, t, target_t, level, self.guidance[rows])

    def base(self, noise, t, target_t, rows, data=None):
        s, reference = self.s, self.roles.target
        data = self.data[rows] if data is None else data
        x = column(t) * noise + column(1 - t) * data
        v = noise - data
        if s.velocity_target == "teacher":
            v = self.velocity(self.roles.teacher, x, t, t, rows)
        low, high = s.enhanced_range
        difference = self.velocity(reference, x, t, t, rows) - self.velocity(reference, x, t, t, rows, null=True)
        v = v + s.enhanced_ratio * column((low <= t) & (t <= high)) * difference
        middle = np.maximum(t - s.delta, target_t)
        state, total = x - s.delta * v, np.zeros_like(x)
        ladder = [middle + (target_t - middle) * n / s.order for n in range(s.order + 1)]
        for now, then in pairwise(ladder):
            f = self.velocity(reference, state, now, then, rows)
            clean, noisy = state - column(now) * f, state + column(1 - now) * f
            state = column(then) * noisy + column(1 - then) * clean
            total += f * column(now - then)
        f = self.velocity(self.roles.student, x, t, target_t, rows)
        near = t < target_t + s.delta  # the published factors, which divide by zero for t = target_t
        left = np.where(near, 1, (t - target_t) / s.delta)
        right = np.where(near, 0, 1 / s.delta)
        error = f * column(left) - total * column(right) - v
        goal = f - (error if s.clamp is None else np.clip(error, -s.clamp, s.clamp))
        weight = np.tan((1 - (np.abs(t) - np.abs(target_t))) * np.pi / 2.5) + 1 if s.time_weighting else np.ones_like(t)
        return x, t, target_t, goal, weight, rows

    def adv(self, fake, noise, t, rows):
        x = column(t) * noise + column(1 - t) * fake
        return x, -t, -t, noise - fake, np.ones_like(t), rows

    def fake(self, noise, rows):
        one = np.ones(len(rows))
        return noise - self.velocity(self.roles.student, noise, one, 0 * one, rows)

    def rectify(self, noise, rows, real):
        t, fresh = self.draws["match.t"][: len(rows)], self.draws["match.noise"][: len(rows)]
        x = column(t) * fresh + column(1 - t) * self.fake(noise, rows)
        twin = self.velocity(self.roles.student, x, -t, -t, rows)
        gap = np.clip(twin - self.velocity(real, x, t, t, rows), -self.s.clamp, self.s.clamp)
        one = np.ones(len(rows))
        return noise, one, 0 * one, noise - self.fake(noise, rows) - gap, one, rows

    def rcgm(self):
        t, data, rows = self.draws["t"], self.data, np.arange(ROWS)
        if self.s.image_free:
            data = self.fake(self.draws["fake.noise"], rows)
        target_t = t - self.draws["target_t"] * t * self.s.consistency_ratio
        return [(1, self.base(self.draws["noise"], t, target_t, rows, data))]

    def whole(self, weights, real):
        t, noise, start, rows = *(self.draws[n] for n in ("t", "noise", "fake.noise")), np.arange(ROWS)
        fake = self.fake(start, rows)
        data = fake if self.s.image_free else self.data
        target_t, one = t - self.draws["target_t"] * t * self.s.consistency_ratio, np.ones(ROWS)
        x, _, _, _, _, _ = self.base(noise, t, t, rows, data)
        v = noise - data
        if self.s.velocity_target == "teacher":
            v = self.velocity(self.roles.teacher, x, t, t, rows)
        end = self.base(start, one, 0 * one, rows, data)
        terms = {
            "base": self.base(noise, t, target_t, rows, data),
            "adv": self.adv(fake, noise, t, rows),
            "rectify": self.rectify(start, rows, real),
            "velocity": (x, t, t, v, one, rows),
            "e2e": (*end[:4], one, rows),
        }
        return [(weights[name], term) for name, term in terms.items() if weights.get(name)]

    def split(self, rectify_weight, real):
        parts = {name: np.arange(2 * i, 2 * i + 2) for i, name in enumerate(SPLIT)}
        noise, draw, one = self.draws["noise"], self.draws, np.ones(2)
        ends = {"e2e": (one, 0 * one), "one": (draw["t"][parts["one"]], 0 * one)}
        for name, ratio in (("mul", min(0.05, self.s.consistency_ratio)), ("any", self.s.consistency_ratio)):
            t = draw["t"][parts[name]]
            ends[name] = t, t - draw["target_t"][parts[name]] * t * ratio
        adv, every = parts["adv"], np.arange(ROWS)
        fake = self.fake(draw["fake.noise"], every)
        data = fake if self.s.image_free else self.data
        terms = [(1, self.base(noise[parts[n]], *ends[n], parts[n], data[parts[n]])) for n in ends]
        terms.append((1, self.adv(fake[adv], noise[adv], draw["t"][adv], adv)))
        rectified = self.rectify(noise[parts["e2e"]], parts["e2e"], real)
        return [*terms, (rectify_weight, rectified)]

    def loss(self, terms, theta):
        """The loss at other parameters of the student, goals and adaptive weights held."""
        total = 0
        for scale, (x, t, target_t, goal, weight, rows) in terms:
            given = x, t, target_t, self.level[rows], self.guidance[rows]
            before = np.mean((self.roles.student.numpy(*given) - goal) ** 2, axis=(1, 2, 3))
            error = np.mean((self.roles.student.numpy(*given, theta) - goal) ** 2, axis=(1, 2, 3))
            adaptive = 1 if self.s.loss == "l2" else ((before / 1e-6 / abs(1 - 2) + 1) ** ((1 - 2) / 2)) / 1e-3
            total += scale * np.sum(error * adaptive * weight) / ROWS
        return total


ALL = {"base": 1, "adv": 0.7, "rectify": 0.4, "velocity": 0.3, "e2e": 0.2}
CASES = {
    "rcgm": (rcgm, {}),
    "rcgm-order2": (rcgm, {"order": 2, "consistency_ratio": 0.5}),
    "rcgm-order3-l2": (rcgm, {"order": 3, "loss": "l2", "time_weighting": False}),
    "rcgm-unclamped": (rcgm, {"clamp": None, "delta": 0.05}),
    "rcgm-enhanced": (rcgm, {"enhanced_ratio": 1.5, "enhanced_range": (0.3, 0.8)}),
    "rcgm-teacher": (rcgm, {"velocity_target": "teacher"}),
    "rcgm-image_free": (rcgm, {"image_free": True}),
    "whole": (twinflow, {"weights": ALL}),
    "whole-published": (twinflow, {"weights": {"base": 1, "adv": 1, "rectify": 0.5}, "order": 2}),
    "whole-teacher": (twinflow, {"weights": ALL, "real_score": "teacher", "velocity_target": "teacher"}),
    "whole-image_free": (twinflow, {"weights": ALL, "image_free": True}),
    "split": (twinflow, {"form": "split", "parts": SPLIT}),
    "split-order2": (twinflow, {"form": "split", "parts": SPLIT, "order": 2, "rectify_weight": 0.75, "loss": "l2"}),
    "split-teacher": (twinflow, {"form": "split", "parts": SPLIT, "real_score": "teacher"}),
    "split-image_free": (twinflow, {"form": "split", "parts": SPLIT, "image_free": True}),
}
every_case = pytest.mark.parametrize("name", CASES)


def given(draws, settings):
    """The draws as a form asks for them: in the split one rectify acts on two rows."""
    if settings.get("form") != "split":
        return draws
    return ReplayDraws(draws.arrays | {name: draws.arrays[name][:2] for name in ("match.t", "match.noise")})


@every_case
def test_loss_and_gradient_are_those_of_the_definition(name, roles, batch, draws):
    objective, settings = CASES[name]
    shared = {
        k: v for k, v in settings.items() if k not in ("form", "weights", "parts", "rectify_weight", "real_score")
    }
    restated = Restated(roles, batch, draws, shared)
    real = getattr(roles, settings.get("real_score", "student"))
    if objective is rcgm:
        terms = restated.rcgm()
    elif settings.get("form") == "split":
        terms = restated.split(settings.get("rectify_weight", 0.5), real)
    else:
        terms = restated.whole(settings["weights"], real)
    loss, metrics = objective(roles, batch, given(draws, settings), **settings)
    theta = roles.student.theta.numpy()
    assert loss.dtype == paddle.float64
    assert loss.item() == pytest.approx(restated.loss(terms, theta), rel=1e-5)  # the factor of time is float32
    loss.backward()
    gradient = roles.student.theta.grad.numpy()
    assert np.abs(gradient).min() > 1e-4
    for i in range(len(theta)):
        step = 1e-6 * np.eye(len(theta))[i]
        numeric = (restated.loss(terms, theta + step) - restated.loss(terms, theta - step)) / 2e-6
        assert gradient[i] == pytest.approx(numeric, rel=1e-5)
    assert roles.teacher.theta.grad is None and roles.target.theta.grad is None
    assert all(value.stop_gradient and value.size == 1 for value in metrics.values())


@every_case
def test_step_draws_are_enough(name, roles, batch):
    objective, settings = CASES[name]
    losses = [objective(roles, batch, StepDraws(0, step), **settings)[0].item() for step in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses).all()


# ---------------------------------------------------------------------------------------------- Gaussian data N(0, s²)
S = 0.6
GAUSS = {"cond": {}, "guidance": None}


def spread(t):
    return np.sqrt(t**2 + (1 - t) ** 2 * S**2)


class Exact:
    """The any-step velocity of Gaussian data on both branches; `scale` spoils it at negative times."""

    def __init__(self):
        self.scale = paddle.to_tensor(1.0, dtype="float64", stop_gradient=False)

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        t, twin = t.numpy().astype(np.float64), (t < 0).numpy()
        start, end = np.abs(t), np.abs(target_t.numpy().astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            jump = (1 - spread(end) / spread(start)) / (start - end)
        slope = (start - (1 - start) * S**2) / spread(start) ** 2
        factor = paddle.to_tensor(column(np.where(start == end, slope, jump)))
        return factor * x * paddle.where(paddle.to_tensor(column(twin)), self.scale, paddle.ones_like(self.scale))


def quadrature():
    """Two independent standard normals, exact for moments of up to third order: [4, 1, 1, 1] each."""
    grid = np.array([(a, b) for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    return column(grid[:, 0]), column(grid[:, 1])


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize(("t", "target_t"), [(1.0, 0.0), (0.9, 0.3), (0.5, 0.2), (0.3, 0.295)])
def test_rcgm_has_its_fixed_point_at_the_exact_any_step_velocity(order, t, target_t):
    """F = k·x makes E[Δ·x] vanish at one k, and that is the exact one up to the first piece's Euler step, O(delta²)."""
    a, b = quadrature()
    x0, noise = paddle.to_tensor(S * a), paddle.to_tensor(b)
    errors = []
    for delta in (0.02, 0.01, 0.005):
        times = [paddle.full([4], each, dtype="float64") for each in (t, target_t)]
        x = t * noise + (1 - t) * x0
        exact = Exact()(x, *times[:1], {}, target_t=times[1]) / x

        def slope(k, x=x, times=times, delta=delta):
            s = AnyStep(order=order, delta=delta, clamp=None)
            correction = k * x - any_step_target(Exact(), GAUSS, x, noise - x0, k * x, *times, s)
            return ((correction * x).sum() / (x * x).sum()).item()

        zero = slope(0.0) / (slope(0.0) - slope(1.0))
        errors.append(zero - exact.mean().item())
        assert abs(errors[-1]) * (t - target_t) < 3 * delta**2
    if t - target_t > 0.02:
        assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([4, 4], rel=0.15)


@pytest.mark.parametrize("form", ["whole", "split"])
def test_self_adversarial_terms_vanish_when_the_samples_are_the_data(form):
    student = Exact()
    a, b = quadrature()
    batch = {"latents": paddle.zeros([4, 1, 1, 1], dtype="float64"), **GAUSS}
    settings = {"loss": "l2", "form": form}
    arrays = {"noise": a, "fake.noise": b, "t": np.full(4, 0.7), "target_t": np.full(4, 0.5)}

    def grown(weights, parts, rectified):
        draws = ReplayDraws(arrays | {"match.t": np.full(rectified, 0.4), "match.noise": a[:rectified]})
        student.scale.clear_grad()
        loss, terms = twinflow(Roles(student, None), batch, draws, weights=weights, parts=parts, **settings)
        if not loss.stop_gradient:
            loss.backward()
        return terms, student.scale.grad

    # Samples s·ε are the data; both branches are exact, so that the expected gradient and Δv are zero.
    if form == "whole":
        terms, _ = grown({"rectify": 1}, {}, 4)
        assert terms["rectify"].item() == 0
    _, gradient = grown({"adv": 1}, {"adv": 1}, 4)
    assert abs(gradient.item()) < 1e-6
    student.scale.set_value(paddle.to_tensor(1.5, dtype="float64"))
    _, gradient = grown({"adv": 1}, {"adv": 1}, 4)
    assert gradient.item() > 0.1
    if form == "whole":
        terms, _ = grown({"rectify": 1}, {}, 4)
        assert terms["rectify"].item() > 1e-3


class TooWide(Exact):
    """One-step samples are the noise itself, plus `offset`; the negative branch knows their velocity."""

    def __init__(self):
        super().__init__()
        self.offset = paddle.to_tensor(np.zeros([4, 1, 1, 1]), stop_gradient=False)

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        if target_t.max().item() == 0:
            return self.offset + 0 * x
        if t.max().item() < 0:
            start = -t.numpy().astype(np.float64)
            return paddle.to_tensor(column((2 * start - 1) / (start**2 + (1 - start) ** 2))) * x
        return super().__call__(x, t, cond, target_t=target_t)


def test_rectify_moves_samples_towards_the_data():
    student, (a, b) = TooWide(), quadrature()
    arrays = {"noise": a, "fake.noise": b, "match.noise": a}
    draws = ReplayDraws(arrays | {name: np.full(4, 0.6) for name in ("t", "target_t", "match.t")})
    batch = {"latents": paddle.zeros([4, 1, 1, 1], dtype="float64"), **GAUSS}
    loss, _ = twinflow(Roles(student, None), batch, draws, weights={"rectify": 1}, loss="l2")
    loss.backward()
    move = student.offset.grad.numpy()  # of a sample by descent, since x_fake = z − F
    assert np.sum(move * b) < -1e-3


# ---------------------------------------------------------------------------------------------- parts and settings
@pytest.mark.parametrize(
    ("size", "parts", "counts"),
    [
        (8, {"e2e": 1, "mul": 1, "any": 1, "adv": 1}, [2, 2, 2, 2]),
        (5, {"e2e": 1, "mul": 1, "any": 1, "adv": 1}, [2, 1, 1, 1]),
        (10, {"e2e": 3, "any": 1, "adv": 1, "one": 0}, [6, 2, 2]),
    ],
)
def test_parts_are_shares_of_the_batch(size, parts, counts):
    rows = assign_parts(ReplayDraws({}), size, parts)
    assert [len(index) for index in rows.values()] == counts
    assert sorted(row for index in rows.values() for row in index) == list(range(size))


def test_a_batch_smaller_than_the_parts_draws_them():
    parts, seen = {"e2e": 1, "mul": 1, "any": 1, "adv": 3}, {}
    for step in range(300):
        for name, index in assign_parts(StepDraws(0, step), 2, parts).items():
            seen[name] = seen.get(name, 0) + len(index)
    assert seen["adv"] / 600 == pytest.approx(0.5, abs=0.07) and seen["e2e"] / 600 == pytest.approx(1 / 6, abs=0.05)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_split_works_for_any_batch_size(size, roles, batch):
    small = {"latents": batch["latents"][:size], "guidance": batch["guidance"][:size]}
    small["cond"] = Cond(batch["cond"]).mask(list(range(size)))
    for step in range(4):
        loss, _ = twinflow(roles, small, StepDraws(0, step), form="split", parts=SPLIT)
        loss.backward()
        assert np.isfinite(loss.item()) and np.isfinite(roles.student.theta.grad.numpy()).all()


def test_a_step_of_no_length_is_finite_and_regresses_the_velocity():
    t = paddle.to_tensor([0.5, 0.0], dtype="float64")
    prediction, velocity = (paddle.full([2, 1, 1, 1], v, dtype="float64") for v in (3.0, 2.5))
    goal = any_step_target(Exact(), GAUSS, prediction, velocity, prediction, t, t, AnyStep())
    np.testing.assert_allclose(goal.numpy(), velocity.numpy())


def test_barron_weight_is_the_general_form_at_alpha_one():
    error = np.array([1e-9, 1e-6, 1e-2, 4.0])
    loss = regression(paddle.to_tensor(np.sqrt(error).reshape(-1, 1)), paddle.zeros([4, 1], dtype="float64"), "barron")
    np.testing.assert_allclose(loss.numpy(), error * (error / 1e-6 / 1 + 1) ** -0.5 / 1e-3)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (rcgm, {"order": 0}, "order must be at least 1, got 0"),
        (rcgm, {"consistency_ratio": 1.5}, r"consistency_ratio must lie in \[0, 1\], got 1.5"),
        (rcgm, {"delta": 0}, r"delta must lie in \(0, 1\), got 0"),
        (rcgm, {"loss": "l1"}, "loss is 'barron' or 'l2', not 'l1'"),
        (rcgm, {"velocity_target": "ema"}, "velocity_target is 'data' or 'teacher', not 'ema'"),
        (twinflow, {"form": "both"}, "form is 'whole' or 'split', not 'both'"),
        (twinflow, {"weights": {"advs": 1}}, "unknown term 'advs'; there are base, adv, rectify, velocity, e2e"),
        (twinflow, {"form": "split", "parts": {"two": 1}}, "unknown term 'two'; there are e2e, mul, any, adv, one"),
        (twinflow, {"form": "split", "parts": {"any": 0}}, "every part of the batch has weight 0"),
        (twinflow, {"real_score": "fake"}, "real_score is 'student' or 'teacher', not 'fake'"),
    ],
)
def test_bad_settings_are_named(objective, settings, message, roles, batch):
    with pytest.raises(ValueError, match=message):
        objective(roles, batch, StepDraws(0, 0), **settings)


def test_enhanced_target_needs_a_null_condition(roles, batch):
    del batch["null_cond"]
    with pytest.raises(ValueError, match="enhanced_ratio needs batch"):
        rcgm(roles, batch, StepDraws(0, 0), enhanced_ratio=1.0)
