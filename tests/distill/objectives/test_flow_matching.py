import numpy as np
import paddle
import pytest

from distill.draws import ReplayDraws, StepDraws
from distill.objectives.flow_matching import flow_matching
from distill.roles import Roles
from fast_diffusers.conditioning import Cond

SHAPE = [4, 1, 2, 2]
MU = 0.5


class Recorder:
    """A denoiser v = theta·x + level of the condition + t, that remembers its arguments."""

    def __init__(self, theta):
        self.theta = paddle.to_tensor(np.float64(theta), stop_gradient=False)

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        self.cond, self.t = cond["level"].numpy().ravel(), t.numpy()
        self.guidance = None if guidance is None else guidance.numpy()
        return self.theta * x + (cond["level"] + t.unsqueeze(1)).reshape([-1, 1, 1, 1])


@pytest.fixture
def batch():
    level = np.arange(1.0, 5.0).reshape(4, 1)
    latents = np.random.default_rng(0).normal(size=SHAPE)
    return {
        "latents": paddle.to_tensor(latents),
        "cond": Cond(level=paddle.to_tensor(level)),
        "null_cond": Cond(level=paddle.zeros([4, 1], dtype="float64")),
    }


@pytest.fixture
def draws():
    rng = np.random.default_rng(1)
    return ReplayDraws(
        {
            "t": rng.normal(size=4),
            "noise": rng.normal(size=SHAPE),
            "guidance": rng.uniform(size=4).astype(np.float32),
            "drop": np.array([0.0, 0.9, 0.05, 0.5]),
        }
    )


SETTINGS = {"mu": MU, "drop_rate": 0.1, "guided_rate": 0.5, "guidance_range": (2.0, 4.0)}


def test_loss_is_the_definition(batch, draws):
    student, target = Recorder(0.3), Recorder(-0.2)
    loss, _ = flow_matching(Roles(student, None, target), batch, draws, **SETTINGS)
    arrays = draws.arrays
    raw = 1 / (1 + np.exp(-arrays["t"]))
    t = np.exp(MU) / (np.exp(MU) + 1 / raw - 1)
    np.testing.assert_allclose(student.t, t, rtol=1e-6)
    x0, noise = batch["latents"].numpy(), arrays["noise"]
    at = t.reshape(-1, 1, 1, 1)
    noisy = (1 - at) * x0 + at * noise
    guidance = np.where(np.arange(4) < 2, 2 + 2 * arrays["guidance"], 1)
    np.testing.assert_allclose(student.guidance, guidance, rtol=1e-6)
    np.testing.assert_allclose(student.cond, [1, 2, 0, 4])  # row 0 is guided, so it keeps its condition
    difference = np.array([1, 2, 3, 4])  # of the target between condition and no condition
    goal = noise - x0 + ((guidance - 1) * difference).reshape(-1, 1, 1, 1)
    prediction = 0.3 * noisy + (np.array([1, 2, 0, 4]) + t).reshape(-1, 1, 1, 1)
    assert float(loss) == pytest.approx(((prediction - goal) ** 2).mean(), rel=1e-6)


def test_gradient_matches_finite_differences(batch, draws):
    student, target = Recorder(0.3), Recorder(-0.2)
    roles = Roles(student, None, target)
    flow_matching(roles, batch, draws, **SETTINGS)[0].backward()
    gradient = float(student.theta.grad)
    sides = []
    for theta in (0.3 + 1e-5, 0.3 - 1e-5):
        student.theta.set_value(np.array(theta))
        sides.append(float(flow_matching(roles, batch, draws, **SETTINGS)[0]))
    assert gradient == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)
    assert target.theta.grad is None


def test_without_guided_rows_no_target_is_asked(batch):
    loss, metrics = flow_matching(Roles(Recorder(0.3), None, None), batch, StepDraws(0, 0), guided_rate=0.0)
    assert float(loss) == float(metrics["flow_matching"]) > 0


def test_a_model_without_embedded_guidance_is_told_none(batch):
    """It learns what the unguided rows of others learn."""
    told, untold = Recorder(0.3), Recorder(0.3)
    settings = {"mu": MU, "drop_rate": 0.5, "guided_rate": 0.0}
    losses = [
        flow_matching(Roles(student, None), batch, StepDraws(0, 0), embeds_guidance=embeds, **settings)[0]
        for student, embeds in ((told, True), (untold, False))
    ]
    assert untold.guidance is None and np.all(told.guidance == 1)
    assert float(losses[0]) == float(losses[1])
    with pytest.raises(ValueError, match=r"guided_rate is 0\.5, but the model does not embed"):
        flow_matching(Roles(untold, None), batch, StepDraws(0, 0), embeds_guidance=False, guided_rate=0.5)
