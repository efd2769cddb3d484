import json

import numpy as np
import paddle
import pytest

from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler, phased
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler
from fast_diffusers.time_grids import PhaseGrid, dynamic_shift_mu

SHAPE = [2, 3, 4, 4]
CLASSES = [FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler]
FLUX_DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
FLUX_SCHNELL = {**FLUX_DEV, "shift": 1.0, "use_dynamic_shifting": False}


def run(scheduler, velocity, x, generator=None):
    for timestep in scheduler.timesteps:
        t = timestep.expand([x.shape[0]]) / scheduler.config.num_train_timesteps
        x = scheduler.step(velocity(x, t), timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("config", "levels"),
    [(FLUX_DEV, [1, 0.9045, 0.7595, 0.5128, 0]), (FLUX_SCHNELL, [1, 0.75, 0.5, 0.25, 0])],
    ids=["dev", "schnell"],
)
def test_reads_diffusers_configuration_files(cls, config, levels, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = cls.from_pretrained(str(tmp_path))
    scheduler.set_timesteps(4, mu=dynamic_shift_mu(4096))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), levels, atol=5e-5)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * np.array(levels[:-1]), atol=0.05)
    assert scheduler.num_inference_steps == 4 and len(scheduler) == 1000


def test_constant_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    t = np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(scheduler.sigmas.numpy()[:-1], 3 * t / (1 + 2 * t), rtol=1e-6)
    scheduler.set_timesteps(sigmas=[0.8, 0.2])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [2.4 / 2.6, 0.6 / 1.4, 0], rtol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_saves_and_loads(cls, tmp_path):
    cls(shift=2.0, use_dynamic_shifting=True, max_shift=1.3).save_pretrained(str(tmp_path))
    loaded = cls.from_pretrained(str(tmp_path))
    assert type(loaded) is cls
    assert (loaded.config.shift, loaded.config.use_dynamic_shifting, loaded.config.max_shift) == (2.0, True, 1.3)


def test_swaps_by_from_config_without_losing_settings():
    phases = PhasedConsistencyScheduler(shift=2.0, num_cells=60, num_phases=3, stochastic=True)
    plain = FlowMatchEulerDiscreteScheduler.from_config(phases.config)
    assert plain.config.shift == 2.0
    back = PhasedConsistencyScheduler.from_config(plain.config)
    assert (back.config.num_cells, back.config.num_phases, back.config.stochastic) == (60, 3, True)
    assert set(plain.compatibles) >= set(CLASSES)


def test_euler_loop_is_the_sampler(gaussian):
    noise = randn(SHAPE, Generator(0))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX_DEV)
    scheduler.set_timesteps(6, mu=0.8)
    result = run(scheduler, gaussian.velocity, noise)
    np.testing.assert_allclose(result.numpy(), euler(gaussian.velocity, noise, steps=6, mu=0.8).numpy(), atol=1e-6)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_phased_loop_is_the_sampler(gaussian, stochastic, steps):
    noise = randn(SHAPE, Generator(0))
    scheduler = PhasedConsistencyScheduler(use_dynamic_shifting=True, stochastic=stochastic)
    scheduler.set_timesteps(steps, mu=0.8)
    result = run(scheduler, gaussian.velocity, noise, Generator(1))
    expected = phased(
        gaussian.velocity,
        noise,
        steps=steps,
        grid=PhaseGrid(mu=0.8),
        stochastic=stochastic,
        generator=Generator(1),
    )
    np.testing.assert_allclose(result.numpy(), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_state_is_float32_and_tuple_on_request(cls):
    scheduler = cls()
    scheduler.set_timesteps(2)
    half = paddle.ones(SHAPE, dtype="bfloat16")
    (x,) = scheduler.step(half, scheduler.timesteps[0], half, return_dict=False)
    assert x.dtype == paddle.float32
    np.testing.assert_array_equal(x.numpy(), np.full(SHAPE, 0.5))


@pytest.mark.parametrize("begin", ["timestep", "index"])
def test_starts_in_the_middle(begin):
    """As image-to-image does: data noised to a later level, then the remaining steps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    data, noise = randn(SHAPE, Generator(0)), randn(SHAPE, Generator(1))
    x = scheduler.scale_noise(data, scheduler.timesteps[2], noise)
    np.testing.assert_allclose(x.numpy(), (0.5 * data + 0.5 * noise).numpy(), atol=1e-6)
    if begin == "index":
        scheduler.set_begin_index(2)
        assert scheduler.begin_index == 2
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(noise - data, t, x).prev_sample
    np.testing.assert_allclose(x.numpy(), data.numpy(), atol=1e-5)


def test_scale_noise_takes_one_timestep_a_sample():
    data, noise = paddle.zeros(SHAPE), paddle.ones(SHAPE)
    made = FlowMatchEulerDiscreteScheduler().scale_noise(data, paddle.to_tensor([1000.0, 250.0]), noise)
    np.testing.assert_allclose(made.numpy().mean(axis=(1, 2, 3)), [1, 0.25])


def test_each_image_starts_over(gaussian):
    scheduler = PhasedConsistencyScheduler()
    noise = randn(SHAPE, Generator(0))
    scheduler.set_timesteps(4)
    first = run(scheduler, gaussian.velocity, noise)
    scheduler.set_timesteps(2)
    run(scheduler, gaussian.velocity, noise)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    assert paddle.equal_all(run(scheduler, gaussian.velocity, noise), first)


@pytest.mark.parametrize("cls", CLASSES)
def test_wrong_order_of_calls(cls):
    x = paddle.zeros(SHAPE)
    scheduler = cls()
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep 1 is not one of .*not their indices"):
        scheduler.step(x, 1, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 2 steps are taken"):
        scheduler.step(x, 0.0, x)


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), {}, "num_inference_steps or sigmas"),
        (FlowMatchEulerDiscreteScheduler(), {"num_inference_steps": -1}, "at least 1, got -1"),
        (FlowMatchEulerDiscreteScheduler(), {"num_inference_steps": 3, "sigmas": [1.0]}, "3 steps need 3 sigmas"),
        (FlowMatchEulerDiscreteScheduler.from_config(FLUX_DEV), {"num_inference_steps": 4}, "pass mu"),
        (PhasedConsistencyScheduler(), {"sigmas": [1.0, 0.5]}, "phase boundaries"),
        (PhasedConsistencyScheduler(num_cells=8), {"num_inference_steps": 9}, "only 8 cells"),
    ],
)
def test_bad_settings(scheduler, settings, message):
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**settings)
