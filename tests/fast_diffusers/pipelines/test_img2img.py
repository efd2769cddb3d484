"""Image to image, in every pipeline that does it and with every scheduler."""

import json

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import FlowMatchEulerDiscreteScheduler as PPDiffusersScheduler

from fast_diffusers import pipelines
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import FluxImg2ImgPipeline, FluxLabelPipeline, FluxPipeline, Pipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.schedulers import (
    FlowMatchEulerDiscreteScheduler,
    PhasedConsistencyScheduler,
    SCMScheduler,
    UnifiedScheduler,
)

FAMILIES = {"pipe": "Flux", "sd3": "StableDiffusion3", "qwen": "QwenImage", "z": "ZImage"}
PIXELS = np.random.default_rng(0).integers(0, 256, [3, 16, 32, 3], dtype=np.uint8)
PICTURES = [Image.fromarray(each) for each in PIXELS]
DIGIT = Image.fromarray(PIXELS[0, :8, :8, 0])


def tensor(pixels):
    """[B, H, W, C] as an image tensor in [-1, 1]."""
    return paddle.to_tensor(pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)


POINT = tensor(PIXELS[:1, :8, :8, :1])
"""The digit."""

EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
DETERMINISTIC = {
    "euler": EULER,
    "terminal": FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    "phased": PhasedConsistencyScheduler(),
    "few": UnifiedScheduler(),
    "any": UnifiedScheduler(style="any"),
    "warped": UnifiedScheduler(style="mul", time_warp=(1.2, 0.8, 1.1), gap=(0.0, 0.1)),
    "second order": UnifiedScheduler(style="any", order=2, correction="balanced"),
}
STOCHASTIC = {
    "phased stochastic": PhasedConsistencyScheduler(stochastic=True),
    "scm": SCMScheduler(),
    "sde": UnifiedScheduler(stochasticity="sde"),
}
SCHEDULERS = DETERMINISTIC | STOCHASTIC


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.getfixturevalue(request.param)


def generate(pipe, prompt="a cat", seed=0, **options):
    options = dict(num_inference_steps=3, output_type="latent", generator=Generator(seed)) | options
    if not isinstance(pipe, FluxLabelPipeline):
        options = dict(max_sequence_length=60) | options
    return pipe(prompt, **options).images


def equal(a, b):
    return list(a.shape) == list(b.shape) and bool((a == b).all())


def close(a, b, tolerance=1e-5):
    return list(a.shape) == list(b.shape) and float((a - b).abs().max()) < tolerance


# ---- every pipeline --------------------------------------------------------------------------------------------------


def test_full_strength_is_text_to_image(family):
    plain = generate(family, height=16, width=32)
    assert equal(generate(family, image=PICTURES[0], strength=1.0), plain)
    assert equal(generate(family, image=PICTURES[0], strength=0.99), plain), "all steps run"
    assert not close(generate(family, image=PICTURES[0]), plain, 1e-3)


def test_no_strength_is_the_image(family):
    """As it comes back from the autoencoder."""
    latents = family.encode_images(tensor(PIXELS[:1]))
    assert close(generate(family, image=PICTURES[0], strength=0), latents)
    image = generate(family, image=PICTURES[0], strength=0, output_type="pd")
    assert close(image, (family.decode_latents(latents) / 2 + 0.5).clip(0, 1))
    assert close(generate(family, image=PICTURES[0], strength=0.0005, num_inference_steps=2000), latents, 0.1)


def test_repeats_and_depends_on_the_image_and_the_noise(family):
    first = generate(family, image=PICTURES[0])
    assert equal(first, generate(family, image=PICTURES[0], strength=0.6))
    assert not close(first, generate(family, image=PICTURES[1]), 1e-3)
    assert not close(first, generate(family, image=PICTURES[0], seed=1), 1e-3)
    noise = randn(first.shape, Generator(0))
    assert equal(first, generate(family, image=PICTURES[0], latents=noise, generator=None))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(strength=1.5), "strength must be a number from 0 to 1, got 1.5"),
        (dict(strength="much"), "strength must be a number from 0 to 1, got 'much'"),
        (dict(image=None, strength=0.5), "strength needs an image to begin from"),
        (dict(image="cat.png"), "image must be PIL images, arrays or a tensor, got str"),
        (dict(image=[]), "image is an empty list"),
        (dict(image=PICTURES[:2]), "got 2 images for 1 prompts: pass 1, or one a prompt"),
        (dict(image=PIXELS[0, :, :, :2]), r"image must have shape \[16, 32, 3\], got \[16, 32, 2\]"),
        (dict(image=PIXELS[0, :9]), r"image must have shape \[\d+, 32, 3\], got \[9, 32, 3\]"),
        (dict(image=PIXELS[0], height=32), r"image must have shape \[32, 32, 3\], got \[16, 32, 3\]"),
        (dict(image=PICTURES[0], height=17), "height must be a positive multiple of (8|16), got 17"),
        (dict(latents=paddle.zeros([1, 4, 2, 2])), r"latents must have shape \[1, 4, \d, \d\] for this call"),
    ],
)
def test_bad_arguments_are_one_message(family, options, message):
    with pytest.raises(UserError, match=message):
        generate(family, **dict(image=PICTURES[0]) | options)


def test_an_image_needs_an_autoencoder(family):
    bare = type(family)(**family.components | {"vae": None})
    with pytest.raises(UserError, match="no vae, which turns images into latents"):
        generate(bare, image=PICTURES[0])


def test_classes_for_images(family, tmp_path, request):
    name = FAMILIES[request.node.callspec.params["family"]] + "Img2ImgPipeline"
    cls = getattr(pipelines, name)
    family.save_pretrained(tmp_path / "plain", layout="diffusers")
    pipe = cls.from_pretrained(tmp_path / "plain")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is cls
    assert equal(generate(pipe, image=PICTURES[0], strength=0.4), generate(family, image=PICTURES[0], strength=0.4))
    for image in ({}, {"image": None}):
        with pytest.raises(UserError, match=f"{name} needs an image to begin from"):
            generate(pipe, **image)
    pipe.save_pretrained(tmp_path / "again")
    index = tmp_path / "again" / "model_index.json"
    entries = json.loads(index.read_text())
    assert entries["_class_name"] == type(family).__name__
    index.write_text(json.dumps(entries | {"_class_name": name}))  # as ppdiffusers and diffusers write it
    assert type(cls.from_pretrained(tmp_path / "again")) is cls
    assert type(Pipeline.from_pretrained(tmp_path / "again")) is type(family)


def test_a_class_for_images_opens_no_other_family(digits, tmp_path):
    digits.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds a FluxLabelPipeline, expected a pipeline of class FluxPipeline$"):
        FluxImg2ImgPipeline.from_pretrained(tmp_path)


# ---- what images a call takes ----------------------------------------------------------------------------------------


def test_images_and_prompts_stay_paired(pipe):
    noise = randn([4, 4, 2, 4], Generator(3))
    prompts = ["a cat", "a dog"]
    both = generate(pipe, prompts, image=PICTURES[:2], num_images_per_prompt=2, latents=noise)
    for row, (prompt, picture) in enumerate(zip(np.repeat(prompts, 2), np.repeat([0, 1], 2), strict=True)):
        alone = generate(pipe, str(prompt), image=PICTURES[picture], latents=noise[row : row + 1])
        assert close(both[row : row + 1], alone), row
    assert close(
        generate(pipe, prompts, image=PICTURES[0], latents=noise[:2]),
        generate(pipe, prompts, image=[PICTURES[0]] * 2, latents=noise[:2]),
    )


def test_kinds_of_images(pipe):
    truth = generate(pipe, image=PICTURES[0])
    for image in (PIXELS[0], PIXELS[:1], [PIXELS[0]], (PICTURES[0],), PIXELS[0] / np.float64(255), tensor(PIXELS[:1])):
        assert close(generate(pipe, image=image), truth)


def test_size_is_the_images_own_unless_given(pipe):
    photo = PICTURES[0].resize((50, 39))
    assert generate(pipe, image=photo, output_type="np").shape == (1, 32, 48, 3)
    assert generate(pipe, image=[photo], height=16, output_type="np").shape == (1, 16, 48, 3)
    assert generate(pipe, image=PICTURES[0].resize((5, 20)), output_type="np").shape == (1, 16, 16, 3)
    assert equal(generate(pipe, image=photo), generate(pipe, image=photo, height=32, width=48))


def test_gray_images_of_a_label_pipeline(digits):
    for image in (DIGIT, DIGIT.convert("RGB"), np.asarray(DIGIT)[..., None], POINT):
        assert close(generate(digits, "3", image=image, strength=0), POINT)
    assert equal(generate(digits, "3", image=DIGIT, strength=1), generate(digits, "3"))
    assert not close(generate(digits, "3", image=DIGIT), generate(digits, "3"), 1e-3)


# ---- every scheduler -------------------------------------------------------------------------------------------------


class Model:
    """A denoiser around `velocity(x, t, target_t)`, which counts its calls."""

    embeds_guidance = False
    takes_target_time = True

    def __init__(self, velocity):
        self.velocity, self.calls = velocity, 0

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        self.calls += 1
        return self.velocity(x, t, target_t)


class Digits(FluxLabelPipeline):
    """A label pipeline of any velocity."""

    model: Model

    @property
    def denoiser(self):
        return self.model


@pytest.fixture
def with_velocity(digits):
    def make(scheduler, velocity):
        pipe = Digits(**digits.components | {"scheduler": scheduler}, sample_size=8)
        pipe.set_progress_bar_config(disable=True)
        pipe.__dict__["model"] = Model(velocity)
        return pipe

    return make


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_starting_late_lands_where_the_full_trajectory_does(with_velocity, scheduler, steps):
    """Data of one point, the image: all of the trajectory lies on the line from the noise to it."""
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append((float(timestep), tensors["latents"]))

    full = None
    for strength in (1, 0.7, 0.5, 0.1):
        seen.clear()
        pipe = with_velocity(scheduler, lambda x, t, target_t: (x - POINT) / t)
        options = dict(image=DIGIT, strength=strength, num_inference_steps=steps, callback_on_step_end=record)
        assert close(generate(pipe, "3", **options), POINT, 2e-5)
        assert pipe.model.calls == len(seen) == len(scheduler.timesteps[scheduler.begin_index :])
        full = full or list(seen)
        late = full[len(full) - len(seen) :]
        assert [t for t, _ in seen] == [t for t, _ in late]
        if scheduler in DETERMINISTIC.values():
            assert all(close(x, y, 2e-5) for (_, x), (_, y) in zip(seen, late, strict=True))


@pytest.mark.parametrize("name", ["euler", "terminal", "phased", "any"])
@pytest.mark.parametrize("strength", [1.0, 0.6, 0.2])
def test_a_perfect_model_solves_the_rest_exactly(with_velocity, gaussian, name, strength):
    """Gaussian data: the flow from the noised image to time 0 is known, and the chord to the next level follows it."""
    scheduler = DETERMINISTIC[name]

    def chord(x, t, target_t):
        if target_t is None:
            done = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index
            target_t = scheduler.sigmas[done + 1]
        return gaussian.chord(x, t, target_t)

    found = generate(with_velocity(scheduler, chord), "3", image=DIGIT, strength=strength, num_inference_steps=5)
    s = float(scheduler.sigmas[scheduler.begin_index])
    state = (1 - s) * POINT + s * randn([1, 1, 8, 8], Generator(0))
    np.testing.assert_allclose(found, gaussian.flow(state, s, 0.0), atol=2e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_full_strength_is_text_to_image_with_every_scheduler(with_velocity, scheduler):
    """Where the scheduler begins at pure noise, as all do with one step."""
    pipe = with_velocity(scheduler, lambda x, t, target_t: paddle.sin(x + t))
    steps = 1 if isinstance(scheduler, SCMScheduler) else 4
    options = dict(num_inference_steps=steps)
    assert equal(generate(pipe, "3", image=DIGIT, strength=1, **options), generate(pipe, "3", **options))


def test_a_schedule_that_begins_below_pure_noise_keeps_some_of_the_image(with_velocity):
    """SCM's published angles begin at arctan 400, so that even at strength 1 a little of the image is left."""
    states = []

    def still(x, t, target_t):
        states.append(x)
        return 0 * x

    pipe = with_velocity(SCMScheduler(), still)
    generate(pipe, "3", image=DIGIT, strength=1, num_inference_steps=2)
    s = float(pipe.scheduler.sigmas[0])
    assert 0.99 < s < 1
    np.testing.assert_allclose(states[0], (1 - s) * POINT + s * randn([1, 1, 8, 8], Generator(0)), atol=1e-6)


def test_custom_levels_start_late_too(with_velocity):
    pipe = with_velocity(EULER, lambda x, t, target_t: 0 * x)
    noised = generate(pipe, "3", image=DIGIT, strength=0.5, sigmas=[0.9, 0.6, 0.4, 0.3])
    assert pipe.model.calls == 2
    s = 1.2 / (1 + 0.8)  # 0.4, shifted by 3
    np.testing.assert_allclose(noised, (1 - s) * POINT + s * randn([1, 1, 8, 8], Generator(0)), atol=1e-6)


def test_ppdiffusers_own_scheduler_starts_late_too(pipe):
    theirs = FluxPipeline(**pipe.components | {"scheduler": PPDiffusersScheduler(shift=1.0)})
    theirs.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=4, strength=0.5, image=PICTURES[0])
    found = generate(theirs, **options)
    levels = theirs.scheduler.sigmas.numpy()[:-1].astype(np.float64)
    ours = FluxPipeline(**pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler()})
    ours.set_progress_bar_config(disable=True)
    assert close(found, generate(ours, **options | {"sigmas": levels}), 1e-4)
    assert close(generate(theirs, **options | {"strength": 0}), pipe.encode_images(tensor(PIXELS[:1])))


def test_the_progress_bar_counts_the_steps_that_run(digits, capsys):
    try:
        digits.set_progress_bar_config(disable=False)
        generate(digits, "3", image=DIGIT, strength=0.5, num_inference_steps=8)
    finally:
        digits.set_progress_bar_config(disable=True)
    assert "4/4" in capsys.readouterr().err
