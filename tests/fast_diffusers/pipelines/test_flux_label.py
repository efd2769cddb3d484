import re

import numpy as np
import paddle
import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import FluxLabelPipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler


def test_conditioning_is_one_hot(digits):
    cond = digits.conditioning(["3", "", "0"])
    expected = np.zeros([3, 10], dtype=np.float32)
    expected[0, 3] = expected[2, 0] = 1
    assert np.array_equal(cond["pooled_prompt_embeds"].numpy(), expected)
    assert np.array_equal(cond["prompt_embeds"].numpy(), expected[:, None])
    embeds, pooled = digits.encode_prompt("3", num_images_per_prompt=2)
    assert embeds.shape == [2, 1, 10] and pooled.shape == [2, 10]


def test_a_call_is_eulers_method_on_the_denoiser(digits):
    cond = digits.conditioning(["3", "7"])
    noise = randn([2, 1, 8, 8], Generator(0))
    x = euler(lambda x, t, _: digits.denoiser(x, t, cond), noise, steps=3)
    latents = digits(["3", "7"], num_inference_steps=3, generator=Generator(0), output_type="latent").images
    assert latents.shape == [2, 1, 8, 8]
    assert float((latents - x).abs().max()) < 1e-5


def test_grey_and_colour_images(digits, make_label_pipeline):
    [image] = digits("1", num_inference_steps=1, generator=Generator(0)).images
    assert image.mode == "L" and image.size == (8, 8)
    [image] = make_label_pipeline(channels=3)("1", height=6, width=10, num_inference_steps=1).images
    assert image.mode == "RGB" and image.size == (10, 6)


def test_latents_are_pixels(digits):
    images = paddle.linspace(-1, 1, 64).reshape([1, 1, 8, 8])
    assert paddle.equal_all(digits.decode_latents(digits.encode_images(images)), images)
    still = dict(latents=images, num_inference_steps=1, callback_on_step_end=lambda *_: {"latents": images})
    array = digits("1", output_type="np", **still).images
    assert np.allclose(array[0, :, :, 0], np.linspace(0, 1, 64).reshape(8, 8), atol=1e-6)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip(digits, layout, tmp_path):
    digits.save_pretrained(tmp_path, layout=layout)
    again = FluxLabelPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (again.config.num_classes, again.config.sample_size) == (10, 8)
    options = dict(num_inference_steps=4, output_type="np")
    images = [pipe(["2", ""], generator=Generator(0), **options).images for pipe in (digits, again)]
    assert np.array_equal(*images)
    assert FluxLabelPipeline.from_pretrained(tmp_path, sample_size=16).default_size == 16


def test_components(digits):
    assert set(digits.components) == {"scheduler", "transformer"}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt="10"), "the labels 0 to 9 (or '' for none), got '10'"),
        (dict(prompt=["1", "cat"]), "the labels 0 to 9 (or '' for none), got 'cat'"),
        (dict(prompt="-1"), "the labels 0 to 9 (or '' for none), got '-1'"),
        (dict(prompt=7), "prompt must be a string or a non-empty list of strings, got 7"),
        (dict(height=7), "height must be a positive multiple of 2, got 7"),
        (dict(num_inference_steps=0), "num_inference_steps must be a positive integer, got 0"),
        (dict(control_image=np.zeros([8, 8, 1])), "FluxLabelPipeline has no ControlNet that could read control_image"),
    ],
)
def test_bad_arguments(digits, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        digits(**dict(prompt="1") | options)


def test_number_of_classes_must_fit_the_transformer(digits):
    with pytest.raises(UserError, match="12 classes need joint_attention_dim = pooled_projection_dim = 12"):
        FluxLabelPipeline(digits.scheduler, digits.transformer, num_classes=12)
