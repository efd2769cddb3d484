import numpy as np
import paddle
import pytest
from ppdiffusers import DDIMScheduler

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.image_start import check_strength, first_index, state_at
from fast_diffusers.random import Generator, randn
from fast_diffusers.schedulers import (
    FlowMatchEulerDiscreteScheduler,
    PhasedConsistencyScheduler,
    SCMScheduler,
    UnifiedScheduler,
)


def planned(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    "steps, strength, left_out",
    [  # what get_timesteps of diffusers' FLUX, SD3, Qwen-Image and Z-Image pipelines answers
        (50, 0.6, 20),
        (28, 0.6, 11),
        (4, 1.0, 0),
        (4, 0.99, 0),
        (4, 0.75, 1),
        (4, 0.74, 1),
        (4, 0.5, 2),
        (4, 0.1, 3),
        (4, 1e-6, 3),
        (4, 0.0, 4),
        (1, 0.3, 0),
        (20, 0.55, 9),
        (30, 0.7, 9),
        (7, 0.35, 4),
    ],
)
def test_the_rule_of_diffusers(steps, strength, left_out):
    assert first_index(planned(FlowMatchEulerDiscreteScheduler(), steps), strength) == left_out


@pytest.mark.parametrize("strength, begin", [(1, 0), (0.7, 0), (0.6, 2), (0.4, 2), (0.3, 4), (1e-6, 4), (0, 5)])
def test_second_order_steps_begin_with_their_first_evaluation(strength, begin):
    """Five evaluations are three steps, at 0, 2 and 4."""
    scheduler = planned(UnifiedScheduler(order=2), 5)
    assert len(scheduler.timesteps) == 5
    assert first_index(scheduler, strength) == begin
    data, noise = (randn([1, 2, 2, 2], Generator(seed)) for seed in (0, 1))
    s = {0: 1.0, 2: 2 / 3, 4: 1 / 3, 5: 0.0}[begin]
    np.testing.assert_allclose(state_at(scheduler, begin, data, noise), (1 - s) * data + s * noise, atol=1e-6)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        PhasedConsistencyScheduler(stochastic=True),
        SCMScheduler(),
        UnifiedScheduler(gap=(0.01, 0.3)),
        UnifiedScheduler(style="any", time_input="shortcut"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_state_has_the_noise_of_its_level(scheduler):
    """That of the state, which is not always the time that the model is told."""
    planned(scheduler, 4)
    data, noise = (randn([2, 3, 2, 2], Generator(seed)) for seed in (0, 1))
    for index, sigma in enumerate(scheduler.sigmas.tolist()):
        scheduler.set_timesteps(4)
        state = state_at(scheduler, index, data, noise)
        assert state.dtype == paddle.float32
        np.testing.assert_allclose(state, (1 - sigma) * data + sigma * noise, atol=1e-6)


def test_pure_noise_is_the_noise_itself():
    data, noise = (randn([2, 3, 4, 4], Generator(seed)) for seed in (0, 1))
    for cls in (FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler, UnifiedScheduler):
        assert paddle.equal_all(state_at(planned(cls(), 3), 0, data, noise), noise)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "0.5", None, True, 2])
def test_bad_strength(strength):
    with pytest.raises(UserError, match="strength must be a number from 0 to 1, got"):
        check_strength(strength)


def test_a_scheduler_without_levels():
    with pytest.raises(UserError, match="DDIMScheduler cannot begin from an image: it has no scale_noise; use FlowMat"):
        state_at(planned(DDIMScheduler(), 4), 1, paddle.zeros([1, 1, 2, 2]), paddle.ones([1, 1, 2, 2]))
