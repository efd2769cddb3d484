"""Every objective trains a student of every family."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import paddle
import pytest

from distill import objectives
from distill.config import OptimizerConfig
from distill.draws import StepDraws
from distill.optim import make_optimizer
from distill.trainer import frozen
from fast_diffusers.time_grids import PhaseGrid

GRID = PhaseGrid(num_cells=10, num_phases=2)
OPTIMIZER = OptimizerConfig(lr=1e-4, weight_decay=0.0)


@dataclass(frozen=True)
class Objective:
    """A loss of a player.

    heads: those that it needs, if any. descends: whether it is what its own gradient descends, which it is not where
    the goal of a regression moves with the student. guided: whether it learns guidance itself.
    """

    loss: Callable
    player: str = "student"
    heads: str | None = None
    descends: bool = False
    guided: bool = False


def phased(name: str, **settings: Any) -> Callable:
    return partial(getattr(objectives, name), grid=GRID, **settings)


trigflow_heads = partial(objectives.trigflow_adversarial, side="discriminator")
OBJECTIVES = {
    "phased_consistency": Objective(phased("phased_consistency", cfg_weight=0.5)),
    "adversarial": Objective(phased("adversarial", gan_loss="lsgan"), heads="patch", descends=True),
    "adversarial_heads": Objective(phased("adversarial", side="discriminator"), "patch", "patch", descends=True),
    "distribution_matching": Objective(phased("distribution_matching", cfg_weight=0.5)),
    "fake_score": Objective(phased("fake_score"), "fake", descends=True),
    "reflow": Objective(phased("reflow")),
    "trigflow_consistency": Objective(objectives.trigflow_consistency, guided=True),
    "trigflow_adversarial": Objective(objectives.trigflow_adversarial, heads="ladd", descends=True, guided=True),
    "trigflow_adversarial_heads": Objective(trigflow_heads, "ladd", "ladd", descends=True, guided=True),
    "rcgm": Objective(partial(objectives.rcgm, order=2, enhanced_ratio=0.5)),
    "twinflow_whole": Objective(partial(objectives.twinflow, form="whole", velocity_target="teacher")),
    "twinflow_split": Objective(partial(objectives.twinflow, form="split", real_score="teacher", loss="l2")),
}


def evaluate(family, objective):
    """(loss, metrics) of one step, with gradient to the weights of its player, and none in the heads of others."""
    settings = {}
    if objective.guided:  # a LoRA can learn several strengths only where the model embeds them
        several = family.embeds_guidance
        scales, way = ((4.0, 4.5, 5.0), "embedded") if several else ((4.5,), "cfg")
        settings = dict(guidance_scales=scales, teacher_guidance=way)
    given = family.roles(objective.heads), family.batch, StepDraws(seed=0, step=1)
    if objective.player == "student" and objective.heads:
        with frozen(family.heads[objective.heads]):
            return objective.loss(*given, **settings)
    return objective.loss(*given, **settings)


def reached(family):
    """Which weights have a gradient, by id."""
    return {id(weight) for weight in family.all_weights if weight.grad is not None}


@pytest.fixture
def state(family):
    """A function that puts back all that a test has changed."""
    buffers = [buffer for heads in family.heads.values() for buffer in heads.buffers()]  # of spectral normalisation
    before = [(each, each.clone()) for each in [*family.all_weights, *buffers]]

    @paddle.no_grad()
    def restore():
        for each, value in before:
            each.set_value(value)
            each.clear_gradient(False)

    yield restore
    restore()


@pytest.fixture(scope="session")
def reachable(family):
    """The student's weights that its velocity depends on: text that the last block only writes is for nobody."""
    times = paddle.to_tensor([0.9, 0.4])
    family.velocity(family.latents, times, times / 2).square().sum().backward()
    ids = reached(family)
    for weight in family.all_weights:
        weight.clear_gradient(False)
    return ids


@pytest.mark.support("Objective", "objective")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trains(family, objective, state, reachable):
    objective = OBJECTIVES[objective]
    own = family.weights(objective.player)
    loss, metrics = evaluate(family, objective)
    assert loss.shape == [] and all(bool(paddle.isfinite(each)) for each in [loss, *metrics.values()])

    loss.backward()
    ids = {id(weight) for weight in own.values()}
    assert reached(family) == (reachable if objective.player == "student" else ids)
    gradients = {path: weight.grad.numpy() for path, weight in own.items() if weight.grad is not None}
    assert all(np.isfinite(each).all() for each in gradients.values()) and any(map(np.any, gradients.values()))

    state()
    again, _ = evaluate(family, objective)
    assert np.array_equal(again.numpy(), loss.numpy()), "the same draws, another loss"

    again.backward()
    optimizer = make_optimizer(own, OPTIMIZER, total_steps=1)
    optimizer.step()
    after = float(evaluate(family, objective)[0])
    assert after < float(loss) if objective.descends else after != float(loss)
