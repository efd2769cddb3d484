import json

import numpy as np
import paddle
import pytest

from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler, phased, unified
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler, UnifiedScheduler
from fast_diffusers.time_grids import PhaseGrid, dynamic_shift_mu, scheduler_mu

SHAPE = [2, 3, 4, 4]
SHIFTING = [FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler]
CLASSES = [*SHIFTING, UnifiedScheduler]
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
QWEN_IMAGE = {
    **FLUX_DEV,
    "_diffusers_version": "0.34.0.dev0",
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def run(scheduler, velocity, x, generator=None):
    for timestep in scheduler.timesteps:
        t = timestep.expand([x.shape[0]]) / scheduler.config.num_train_timesteps
        x = scheduler.step(velocity(x, t), timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("cls", SHIFTING)
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


@pytest.mark.parametrize(
    ("num_tokens", "steps", "levels"),
    [
        (4096, 4, [1.0, 0.766709328, 0.455613732, 0.0199999809, 0.0]),
        (
            6889,
            8,
            [1.0, 0.9239344, 0.835335791, 0.730828762, 0.605705559, 0.453198612, 0.263213515, 0.0199999809, 0.0],
        ),
        (256, 2, [1.0, 0.0199999809, 0.0]),
    ],
)
def test_last_level_is_the_terminal_one(num_tokens, steps, levels, tmp_path):
    """What diffusers 0.42's scheduler answers to Qwen-Image's configuration, and the pipeline's sigmas and mu."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(QWEN_IMAGE))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(tmp_path))
    scheduler.set_timesteps(steps, mu=scheduler_mu(scheduler.config, num_tokens))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), levels, atol=3e-7)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * np.array(levels[:-1]), atol=3e-4)


def test_terminal_level_of_given_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [0.943749905, 0.606249988, 0.100000024, 0], atol=3e-7)


def test_a_single_step_begins_at_noise_whatever_the_terminal_level():
    """diffusers divides by zero there."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE)
    scheduler.set_timesteps(1, mu=0.7)
    assert scheduler.sigmas.tolist() == [1, 0]


@pytest.mark.parametrize("terminal", [None, 0, 0.0])
def test_no_terminal_level(terminal):
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=terminal)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("terminal", [1.0, -0.1, 2, float("nan")])
def test_bad_terminal_level(terminal):
    with pytest.raises(ValueError, match=r"shift_terminal must lie in \[0, 1\), got"):
        FlowMatchEulerDiscreteScheduler(shift_terminal=terminal)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("time_shift_type", "linear"),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_karras_sigmas", True),
    ],
)
def test_settings_that_are_not_supported_are_not_ignored(name, value):
    with pytest.raises(ValueError, match=f"^FlowMatchEulerDiscreteScheduler supports {name} = .* only, this one has"):
        FlowMatchEulerDiscreteScheduler.from_config({**QWEN_IMAGE, name: value})
    with pytest.raises(ValueError, match=f"supports {name} = "):
        FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE, **{name: value})
    assert FlowMatchEulerDiscreteScheduler.from_config({**QWEN_IMAGE, name: None}).config.shift_terminal == 0.02


def test_terminal_level_survives_swapping_and_saving(tmp_path):
    flux = FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE)
    phases = PhasedConsistencyScheduler.from_config(flux.config)
    phases.set_timesteps(4, mu=0.7)
    assert float(phases.sigmas[3]) > 0.3, "the phases are those of the training"
    again = FlowMatchEulerDiscreteScheduler.from_config(phases.config)
    again.save_config(str(tmp_path), to_diffusers=True)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["shift_terminal"] == 0.02 and saved["max_image_seq_len"] == 8192


def test_constant_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    t = np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(scheduler.sigmas.numpy()[:-1], 3 * t / (1 + 2 * t), rtol=1e-6)
    scheduler.set_timesteps(sigmas=[0.8, 0.2])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [2.4 / 2.6, 0.6 / 1.4, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        *((cls, {"shift": 2.0, "use_dynamic_shifting": True, "max_shift": 1.3}) for cls in SHIFTING),
        (
            UnifiedScheduler,
            {"order": 2, "stochasticity": "sde", "extrapolation": 0.5, "time_warp": [1.17, 0.8, 1.1]}
            | {"gap": [0.001, 0.5], "style": "any", "time_input": "shortcut", "correction": "balanced"},
        ),
    ],
)
def test_saves_and_loads(cls, settings, tmp_path):
    cls(**settings).save_pretrained(str(tmp_path))
    loaded = cls.from_pretrained(str(tmp_path))
    assert type(loaded) is cls
    assert {name: loaded.config[name] for name in settings} == settings


def test_swaps_by_from_config_without_losing_settings():
    phases = PhasedConsistencyScheduler(shift=2.0, num_cells=60, num_phases=3, stochastic=True)
    plain = FlowMatchEulerDiscreteScheduler.from_config(phases.config)
    assert plain.config.shift == 2.0
    back = PhasedConsistencyScheduler.from_config(plain.config)
    assert (back.config.num_cells, back.config.num_phases, back.config.stochastic) == (60, 3, True)
    assert set(plain.compatibles) >= set(CLASSES)


def test_swaps_to_the_unified_scheduler_and_back():
    flux = FlowMatchEulerDiscreteScheduler.from_config(FLUX_DEV)
    unified_scheduler = UnifiedScheduler.from_config(flux.config, style="mul", gap=(0.0, 0.1))
    unified_scheduler.set_timesteps(2, mu=0.8)
    np.testing.assert_allclose(unified_scheduler.timesteps.numpy(), [1000, 100], err_msg="no shift")
    back = FlowMatchEulerDiscreteScheduler.from_config(unified_scheduler.config)
    assert (back.config.shift, back.config.use_dynamic_shifting) == (3.0, True)
    assert UnifiedScheduler.from_config(back.config).config.gap == (0.0, 0.1)


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


UNIFIED = [
    {"style": "mul"},
    {"style": "few", "stochasticity": 1.0, "gap": (0.001, 0.5)},
    {"style": "any", "stochasticity": "sde", "extrapolation": 0.3, "time_warp": (1.2, 0.8, 1.1)},
    {"style": "mul", "order": 2},
    {"style": "mul", "order": 2, "correction": "balanced"},
    {"style": "any", "order": 2, "stochasticity": 0.5, "gap": (0.2, 0.1), "extrapolation": 0.3},
]


def run_unified(scheduler, velocity, x, generator):
    """As a pipeline that tells its model the target time; the state is rounded to x's dtype after every step."""
    dtype = x.dtype
    for timestep, target in zip(scheduler.timesteps, scheduler.target_times, strict=True):
        t = timestep.expand([x.shape[0]]) / scheduler.config.num_train_timesteps
        v = velocity(x, t, target.expand([x.shape[0]]))
        x = scheduler.step(v, timestep, x, generator=generator, return_dict=False)[0].astype(dtype)
    return x


@pytest.mark.parametrize("settings", UNIFIED, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_unified_loop_is_the_sampler(settings, steps):
    def velocity(x, t, target_t):
        t, target_t = (each.reshape([-1, 1, 1, 1]) for each in (t, target_t))
        return paddle.sin(x + 2 * t) + target_t * x + target_t**2

    noise = randn(SHAPE, Generator(0))
    scheduler = UnifiedScheduler(**settings)
    scheduler.set_timesteps(steps)
    result = run_unified(scheduler, velocity, noise, Generator(1))
    expected = unified(velocity, noise, steps=steps, generator=Generator(1), **settings)
    np.testing.assert_allclose(result.numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)
    again = UnifiedScheduler.from_config(scheduler.config)
    again.set_timesteps(steps)
    assert paddle.equal_all(run_unified(again, velocity, noise, Generator(1)), result)


def test_second_order_visits_the_end_of_each_step_but_the_last():
    scheduler = UnifiedScheduler(order=2, style="any")
    scheduler.set_timesteps(5)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), np.array([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3]) * 1000, rtol=1e-6)
    np.testing.assert_allclose(scheduler.target_times.numpy(), [2 / 3, 2 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [1, 2 / 3, 1 / 3, 0], rtol=1e-6)
    assert scheduler.target_times.dtype == paddle.float32
    assert (scheduler.num_inference_steps, scheduler.order) == (3, 2)


def test_shortcut_shows_one_time_and_finds_its_own_place():
    """Two of these timesteps are equal and one is larger than the one before: no place can be looked up."""
    noise, seen = randn(SHAPE, Generator(0)), []
    scheduler = UnifiedScheduler(order=2, style="any", time_input="shortcut")
    scheduler.set_timesteps(3)
    assert scheduler.target_times is None
    np.testing.assert_allclose(scheduler.timesteps.numpy(), [750, 250, 500])
    x = noise
    for timestep in scheduler.timesteps:
        seen.append(float(timestep) / 1000)
        x = scheduler.step(seen[-1] * x, timestep, x).prev_sample
    expected = unified(
        lambda x, t, target_t: (t - target_t / 2).reshape([-1, 1, 1, 1]) * x, noise, steps=3, order=2, style="any"
    )
    np.testing.assert_allclose(x.numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep 500 is not the first one, 750"):
        scheduler.step(noise, 500.0, noise)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unified_state_survives_the_rounding_of_the_pipeline(dtype):
    """Velocities that do not depend on the state: only the rounding of what the pipeline carries could enter."""
    noise = randn(SHAPE, Generator(0)).astype(dtype)
    scheduler = UnifiedScheduler(style="mul")
    scheduler.set_timesteps(50)
    x = run_unified(scheduler, lambda x, t, target_t: paddle.full(SHAPE, 0.1), noise, None)
    expected = (noise.astype("float64") - 0.1).astype(dtype)
    np.testing.assert_allclose(x.astype("float32").numpy(), expected.astype("float32").numpy(), atol=1e-7)


@pytest.mark.parametrize("changed_at", [0, 1, 2])
def test_unified_goes_on_from_a_state_that_was_changed(changed_at):
    scheduler = UnifiedScheduler(order=2, style="mul")
    scheduler.set_timesteps(5)
    x = paddle.zeros(SHAPE)
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(paddle.zeros(SHAPE), timestep, x).prev_sample
        if i == changed_at:
            x = x + 1
    # Between the evaluations of a step, a change moves only what the second one sees: data and noise become 1 there.
    after_first = (1 / 3) * (0 + 1) / 2
    after_second = (1 / 3 - (2 / 3) * (2 / 3) / (1 / 3)) * (0 + 1) / 2
    assert float(x.mean()) == pytest.approx({0: after_first, 1: 1, 2: after_second}[changed_at])


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
        (UnifiedScheduler(), {"sigmas": [1.0, 0.5]}, "times of gap and time_warp"),
        (UnifiedScheduler(), {}, "pass num_inference_steps"),
        (UnifiedScheduler(), {"num_inference_steps": 0}, "at least 1, got 0"),
    ],
)
def test_bad_settings(scheduler, settings, message):
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"order": 3}, "order must be 1 or 2"), ({"time_input": "both"}, "pair, shortcut, got 'both'")],
)
def test_bad_unified_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        UnifiedScheduler(**settings)


def test_a_correction_needs_its_step():
    scheduler = UnifiedScheduler(order=2)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(1)
    x = paddle.zeros(SHAPE)
    with pytest.raises(ValueError, match="second evaluation of a step comes after its first"):
        scheduler.step(x, scheduler.timesteps[1], x)
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.timesteps[1], x)
    assert scheduler.step_index == 3, "a step begins there too"
