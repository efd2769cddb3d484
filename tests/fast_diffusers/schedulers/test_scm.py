import json
import math

import numpy as np
import paddle
import pytest

from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import trigflow
from fast_diffusers.samplers.trigflow import trigflow_angles
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, SCMScheduler, UnifiedScheduler
from fast_diffusers.transports import flow_time

SHAPE = [2, 3, 4, 4]
PUBLISHED = {
    "_class_name": "SCMScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "num_train_timesteps": 1000,
    "prediction_type": "trigflow",
    "sigma_data": 0.5,
}


def run(scheduler, velocity, noise, generator=None):
    """As a pipeline does."""
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = timestep.expand([x.shape[0]]) / scheduler.config.num_train_timesteps
        x = scheduler.step(velocity(x, t), timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize(
    ("settings", "angles"),
    [
        ({"num_inference_steps": 1}, [math.pi / 2, 0]),
        ({"num_inference_steps": 2}, [math.atan(400), 1.3, 0]),
        ({"num_inference_steps": 4}, [math.atan(400), 1.3, 1.1, 0.6, 0]),
        ({"num_inference_steps": 5}, trigflow_angles(5)),
        ({"timesteps": [1.5, 0.7, 0.2, 0]}, [1.5, 0.7, 0.2, 0]),
        ({"num_inference_steps": 3, "timesteps": [1.5, 0.7, 0.2, 0]}, [1.5, 0.7, 0.2, 0]),
        # The two ways that the published pipeline has.
        ({"num_inference_steps": 2, "max_timesteps": 1.5708, "intermediate_timesteps": 1.3}, [math.pi / 2, 1.3, 0]),
        ({"num_inference_steps": 4, "max_timesteps": 1.5708}, np.linspace(math.pi / 2, 0, 5)),
        # More steps than it takes an intermediate angle for, or fewer.
        ({"num_inference_steps": 4, "intermediate_timesteps": 1.2}, [math.pi / 2, 1.2, 0.8, 0.4, 0]),
        ({"num_inference_steps": 1, "max_timesteps": 1.5, "intermediate_timesteps": 1.2}, [1.5, 0]),
    ],
    ids=str,
)
def test_angles(settings, angles):
    check(SCMScheduler(), settings, angles)


@pytest.mark.parametrize(
    ("settings", "angles"),
    [
        ({"num_inference_steps": 2}, [1.5, 0.6, 0]),
        ({"num_inference_steps": 4}, [1.5, 1.1, 0.6, 0.3, 0]),
        ({"timesteps": [1.4, 0.7, 0]}, [1.4, 0.7, 0]),
    ],
    ids=str,
)
def test_a_students_own_angles(settings, angles, tmp_path):
    SCMScheduler(angles=[1.5, 1.1, 0.6, 0.3, 0]).save_pretrained(str(tmp_path))
    check(SCMScheduler.from_pretrained(str(tmp_path)), settings, angles)


def check(scheduler, settings, angles):
    scheduler.set_timesteps(**settings)
    np.testing.assert_allclose(scheduler.angles.numpy(), angles, atol=5e-6)
    levels = [flow_time(float(angle)) for angle in angles]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), levels, atol=5e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * np.array(levels[:-1]), atol=5e-3)
    assert scheduler.num_inference_steps == len(angles) - 1
    assert {each.dtype for each in (scheduler.angles, scheduler.sigmas, scheduler.timesteps)} == {paddle.float32}
    assert scheduler.init_noise_sigma == pytest.approx(1 / (math.sin(angles[0]) + math.cos(angles[0])), abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_loop_is_the_sampler(gaussian, steps):
    noise = randn(SHAPE, Generator(0))
    scheduler = SCMScheduler.from_config(PUBLISHED)
    scheduler.set_timesteps(steps)
    expected = trigflow(gaussian.velocity, noise, steps=steps, generator=Generator(1))
    made = run(scheduler, gaussian.velocity, noise, Generator(1))
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=1e-6)
    scheduler.set_timesteps(steps)
    again = run(scheduler, gaussian.velocity, noise, [Generator(2), Generator(3)])
    expected = trigflow(gaussian.velocity, noise, steps=steps, generator=[Generator(2), Generator(3)])
    np.testing.assert_allclose(again.numpy(), expected.numpy(), atol=1e-6)


def test_reads_and_writes_diffusers_configuration_files(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(PUBLISHED))
    scheduler = SCMScheduler.from_pretrained(str(tmp_path))
    scheduler.save_pretrained(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "scheduler_config.json").read_text())
    assert {name: saved[name] for name in PUBLISHED if name[0] != "_"} == {
        name: value for name, value in PUBLISHED.items() if name[0] != "_"
    }
    assert saved["_class_name"] == "SCMScheduler"


def test_swaps_by_from_config_and_back():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler = SCMScheduler.from_config(euler.config, sigma_data=0.25)
    scheduler.set_timesteps(2, mu=0.8)
    np.testing.assert_allclose(scheduler.angles.numpy(), trigflow_angles(2), rtol=1e-6, err_msg="no shift")
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert (back.config.shift, back.config.use_dynamic_shifting) == (3.0, True)
    assert SCMScheduler.from_config(back.config).config.sigma_data == 0.25
    assert set(scheduler.compatibles) >= {FlowMatchEulerDiscreteScheduler, SCMScheduler, UnifiedScheduler}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_in_a_pipeline(tiny_teacher, steps):
    """Put into a pipeline that came with another scheduler, it makes the sampler's images."""
    pipe = open_pipeline(tiny_teacher)
    pipe.scheduler = SCMScheduler.from_config(pipe.scheduler.config)
    noise = randn([2, 1, 8, 8], Generator(0))
    made = pipe(
        ["3", "7"],
        num_inference_steps=steps,
        guidance_scale=2.0,
        latents=noise,
        generator=Generator(1),
        output_type="latent",
    ).images
    cond = pipe.conditioning(["3", "7"])
    expected = trigflow(
        lambda x, t, _: pipe.denoiser(x, t, cond, guidance=2.0), noise, steps=steps, generator=Generator(1)
    )
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=1e-5)


def test_custom_angles_in_a_pipeline(tiny_teacher):
    pipe = open_pipeline(tiny_teacher)
    pipe.scheduler = SCMScheduler.from_config(pipe.scheduler.config)
    noise, angles = randn([1, 1, 8, 8], Generator(0)), [1.5, 0.8, 0.3, 0.0]
    options = dict(latents=noise, output_type="latent")
    made = pipe("3", timesteps=angles, generator=Generator(1), **options).images
    cond, guidance = pipe.conditioning(["3"]), pipe.default_guidance
    expected = trigflow(
        lambda x, t, _: pipe.denoiser(x, t, cond, guidance=guidance),
        noise,
        steps=3,
        angles=angles,
        generator=Generator(1),
    )
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=1e-5)


def test_each_image_starts_over(gaussian):
    scheduler, noise = SCMScheduler(), randn(SHAPE, Generator(0))
    made = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        assert scheduler.step_index is None
        made.append(run(scheduler, gaussian.velocity, noise, Generator(1)))
    assert paddle.equal_all(*made)


def test_state_is_float32_and_the_last_step_draws_nothing():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    half = paddle.ones(SHAPE, dtype="bfloat16")
    (x,) = scheduler.step(half, scheduler.timesteps[0], 3 * half, generator="none is asked", return_dict=False)
    assert x.dtype == paddle.float32
    np.testing.assert_array_equal(x.numpy(), np.full(SHAPE, 2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": 0, "max_timesteps": 1.5}, "at least 1, got 0"),
        ({"num_inference_steps": 2, "timesteps": [1.5, 0]}, "3 angles for 2 steps"),
        ({"timesteps": [1.5, 0.5]}, "descend strictly from at most pi/2 to 0"),
        ({"timesteps": [0.0]}, "at least 2 angles"),
        ({"timesteps": [1.5, 0], "max_timesteps": 1.5}, "timesteps are all the angles"),
        ({"num_inference_steps": 2, "max_timesteps": 1.7}, "at most pi/2"),
        ({"num_inference_steps": 3, "max_timesteps": 1.0, "intermediate_timesteps": 1.3}, "descend strictly"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SCMScheduler().set_timesteps(**settings)


def test_other_predictions():
    with pytest.raises(ValueError, match="prediction_type must be \"trigflow\", got 'epsilon'"):
        SCMScheduler(prediction_type="epsilon")


def test_wrong_order_of_calls():
    x, scheduler = paddle.zeros(SHAPE), SCMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep 1 is not one of .*not their indices"):
        scheduler.step(x, 1, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 2 steps are taken"):
        scheduler.step(x, 0.0, x)


def test_own_angles_are_checked():
    with pytest.raises(ValueError, match="angles must descend strictly"):
        SCMScheduler(angles=[1.0, 1.5, 0.0])
