import subprocess
import sys

import numpy as np
import paddle
import ppdiffusers
import pytest

import fast_diffusers
from fast_diffusers import UnifiedSampler
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import unified
from fast_diffusers.schedulers import UnifiedScheduler
from fast_diffusers.target_time import TargetTime, attach
from fast_diffusers.unified_sampler import good_settings

PROMPTS = ["3", "7"]


@pytest.fixture(scope="module")
def pipe():
    pipe = open_pipeline("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def told(pipe):
    """The pipeline with a model that is shown t - target_t / 2."""
    attach(pipe.transformer, TargetTime("shortcut"))
    yield pipe
    attach(pipe.transformer, None)


@pytest.fixture
def scheduled(pipe):
    """Gives the pipeline a UnifiedScheduler with some settings."""
    before = pipe.scheduler

    def schedule(**settings):
        pipe.scheduler = UnifiedScheduler.from_config(before.config, **settings)
        return pipe

    yield schedule
    pipe.scheduler = before


def latents_of(pipe, steps, seed=0):
    return pipe(PROMPTS, num_inference_steps=steps, generator=Generator(seed), output_type="latent").images


def sampled(pipe, velocity_of, **settings):
    """What the sampler makes of the same noise; `velocity_of(x, t, target_t, cond, guidance)`."""
    cond, generator = pipe.conditioning(PROMPTS), Generator(0)
    noise = randn([2, 1, 8, 8], generator)
    guidance = paddle.full([2], 3.5)
    return unified(
        lambda x, t, target_t: velocity_of(x, t, target_t, cond, guidance), noise, generator=generator, **settings
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"style": "mul"},
        {"style": "few", "stochasticity": 1.0, "gap": (0.001, 0.5)},
        {"style": "mul", "order": 2, "correction": "balanced"},
    ],
    ids=str,
)
def test_a_call_is_the_sampler(pipe, scheduled, settings):
    def velocity(x, t, target_t, cond, guidance):
        return pipe.denoiser(x, t, cond, guidance=guidance)

    expected = sampled(pipe, velocity, steps=5, **settings)
    made = latents_of(scheduled(**settings), 5)
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=2e-5)
    assert paddle.equal_all(latents_of(pipe, 5), made), "same generator, same image"


@pytest.mark.parametrize("order", [1, 2])
def test_a_pipeline_tells_its_model_the_target_time(told, scheduled, order):
    def velocity(x, t, target_t, cond, guidance):
        return told.denoiser(x, t, cond, target_t=target_t, guidance=guidance)

    settings = {"style": "any", "order": order, "gap": (0.1, 0.0)}
    expected = sampled(told, velocity, steps=5, **settings)
    np.testing.assert_allclose(latents_of(scheduled(**settings), 5).numpy(), expected.numpy(), atol=2e-5)


def test_the_scheduler_can_take_the_shortcut_for_the_model(pipe, scheduled, request):
    by_scheduler = latents_of(scheduled(style="any", time_input="shortcut"), 4)
    told = request.getfixturevalue("told")
    by_model = latents_of(scheduled(style="any"), 4)
    np.testing.assert_allclose(by_scheduler.numpy(), by_model.numpy(), atol=2e-5)
    with pytest.raises(UserError, match='use time_input "pair"'):
        latents_of(scheduled(style="any", time_input="shortcut"), 4)
    assert told is pipe


def test_style_any_needs_a_target_time(pipe, scheduled):
    with pytest.raises(UserError, match='style "any" needs a model that is told its target time'):
        latents_of(scheduled(style="any"), 2)
    with pytest.raises(UserError, match='style "any" needs a model'):
        UnifiedSampler(model=pipe, steps=2, style="any").sample(prompt="3")


@pytest.mark.parametrize(("order", "steps"), [(2, 2), (1, 2), (1, 4), (2, 4), (1, 8), (2, 9)])
def test_samples_images_and_leaves_the_pipeline_as_it_was(pipe, order, steps):
    before, config = pipe.scheduler, dict(pipe.config)
    sampler = UnifiedSampler(model=pipe, order=order, steps=steps, random_aug=True)
    first, again = (sampler.sample(prompt=PROMPTS, generator=Generator(3), output_type="np") for _ in range(2))
    assert np.array_equal(first, again) and first.shape == (2, 8, 8, 1)
    assert 0.2 < first.mean() < 0.45, "about the grey of the digits"
    assert pipe.scheduler is before and dict(pipe.config) == config
    with pytest.raises(UserError, match="labels"):
        sampler.sample(prompt="cat")
    assert pipe.scheduler is before


def test_images_are_pil_by_default(pipe):
    [image] = UnifiedSampler(model=pipe, order=2, steps=2, random_aug=True).sample(prompt="3")
    assert image.size == (8, 8)


def test_random_aug_puts_fresh_noise_between_the_steps(pipe):
    latents = randn([1, 1, 8, 8], Generator(0))

    def made(seed, **settings):
        sampler = UnifiedSampler(model=pipe, steps=2, **settings)
        return sampler.sample(prompt="3", generator=Generator(seed), latents=latents, output_type="latent")

    assert not paddle.equal_all(made(1), made(2))
    assert paddle.equal_all(made(1, random_aug=False), made(2, random_aug=False))
    assert not paddle.equal_all(made(1, random_aug=False, stochasticity=0.5), made(2, stochasticity=0.5))


def test_settings_follow_the_number_of_evaluations(pipe, request):
    def settings(**arguments):
        return UnifiedSampler(model=pipe, **arguments).settings

    assert settings(steps=2).items() >= {"style": "few", "stochasticity": 1.0, "gap": (0.001, 0.6)}.items()
    assert settings(steps=4)["gap"] == (0.001, 0.5)
    assert settings(steps=30).items() >= {"style": "mul", "time_warp": (1.17, 0.8, 1.1)}.items()
    assert settings(steps=8)["style"] == "mul" and settings(steps=8, time_input="shortcut")["style"] == "any"
    request.getfixturevalue("told")
    assert settings(steps=8)["style"] == "any"
    assert settings(steps=2, gap=(0.1, 0.2), stochasticity=0.3, style="mul").items() >= {
        "gap": (0.1, 0.2),
        "stochasticity": 0.3,
        "style": "mul",
    }.items()  # fmt: skip
    assert (
        settings(steps=4, order=2)["stochasticity"] == 0 and settings(steps=2, random_aug=False)["stochasticity"] == 0
    )
    assert good_settings(1, False)["stochasticity"] == 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"steps": "two"}, "integer, got str"),
        ({"gap": (0, 1)}, "gap must be"),
        ({"style": "many"}, "few, any, mul"),
        ({"model": "digits"}, "must be a pipeline, got str"),
    ],
)
def test_bad_settings(pipe, settings, message):
    with pytest.raises(UserError, match=message):
        UnifiedSampler(**{"model": pipe} | settings)


def test_importing_the_package_does_not_import_the_pipelines():
    program = "import sys, fast_diffusers; print('fast_diffusers.pipelines' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'Sampler'"):
        _ = fast_diffusers.Sampler


@pytest.fixture(scope="module")
def sd3():
    """A random pipeline of ppdiffusers itself, without text encoders."""
    paddle.seed(0)
    transformer = ppdiffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    transformer.eval()
    vae = ppdiffusers.AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    scheduler = ppdiffusers.FlowMatchEulerDiscreteScheduler()
    pipe = ppdiffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, *[None] * 6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("settings", [{"style": "mul"}, {"style": "mul", "order": 2, "gap": (0.1, 0.0)}], ids=str)
def test_pipelines_of_ppdiffusers(sd3, settings):
    prompt, pooled, noise = (
        randn([1, 3, 16], Generator(0)),
        randn([1, 16], Generator(1)),
        randn([1, 4, 8, 8], Generator(2)),
    )

    def velocity(x, t, target_t):
        options = {"encoder_hidden_states": prompt, "pooled_projections": pooled, "return_dict": False}
        return sd3.transformer(hidden_states=x, timestep=1000 * t, **options)[0]

    sampler = UnifiedSampler(model=sd3, steps=5, **{"gap": (0.0, 0.0)} | settings)
    made = sampler.sample(
        prompt=None,
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        latents=noise,
        guidance_scale=1.0,
        height=8,
        width=8,
        output_type="latent",
    )
    correction = {"correction": "balanced"}
    expected = unified(velocity, noise, steps=5, **{"gap": (0.0, 0.0)} | settings | correction)
    np.testing.assert_allclose(made.numpy(), expected.numpy(), atol=1e-5)
    with pytest.raises(UserError, match="needs a pipeline that tells its model the target time"):
        UnifiedSampler(model=sd3, style="any")
