import re

import numpy as np
import paddle
import pytest
from PIL import Image

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ClassifierFree, SanaDenoiser
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines import Pipeline, SanaLabelPipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler, trigflow
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, SCMScheduler


def sana_pipeline(scheduler, channels: int = 1, **config) -> SanaLabelPipeline:
    """A tiny one, whose transformer's output is not zero."""
    paddle.seed(0)
    sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    cross = dict(num_cross_attention_heads=2, cross_attention_head_dim=8, caption_channels=10)
    image = dict(in_channels=channels, out_channels=channels, patch_size=2, sample_size=8)
    model = SanaTransformer2DModel(
        **sizes, **cross, **image, qk_norm="rms_norm_across_heads", timestep_scale=0.001, **config
    )
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    model.eval()
    pipe = SanaLabelPipeline(scheduler, model, num_classes=10, sample_size=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def teacher() -> SanaLabelPipeline:
    return sana_pipeline(FlowMatchEulerDiscreteScheduler(shift=1.5))


@pytest.fixture(scope="module")
def student() -> SanaLabelPipeline:
    return sana_pipeline(SCMScheduler(), guidance_embeds=True)


def test_conditioning_is_one_hot(teacher):
    cond = teacher.conditioning(["3", "", "0"])
    expected = np.zeros([3, 1, 10], dtype=np.float32)
    expected[0, 0, 3] = expected[2, 0, 0] = 1
    assert list(cond) == ["prompt_embeds"]
    assert np.array_equal(cond["prompt_embeds"].numpy(), expected)
    assert teacher.encode_prompt("3", num_images_per_prompt=2).shape == [2, 1, 10]


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_teacher_runs_eulers_method_with_classifier_free_guidance(teacher, scale):
    cond, null = teacher.conditioning(["3", "7"]), teacher.conditioning([""])
    noise = randn([2, 1, 8, 8], Generator(0))
    denoiser = ClassifierFree(teacher.denoiser, null)
    x = euler(lambda x, t, _: denoiser(x, t, cond, guidance=scale), noise, steps=3, mu=float(np.log(1.5)))
    options = dict(num_inference_steps=3, generator=Generator(0), output_type="latent")
    latents = teacher(["3", "7"], guidance_scale=scale, **options).images
    assert float((latents - x).abs().max()) < 1e-5
    assert teacher.default_steps == 20


def test_a_student_runs_the_trigflow_sampler_and_is_told_the_guidance(student):
    cond, noise = student.conditioning(["3", "7"]), randn([2, 1, 8, 8], Generator(0))
    fresh = randn([2, 1, 8, 8], Generator(1))

    def velocity(x, t, target_t):
        return student.denoiser(x, t, cond, guidance=4.5)

    x = trigflow(velocity, noise, steps=2, noise_sampler=lambda shape: fresh)
    latents = student(["3", "7"], latents=noise, generator=Generator(1), output_type="latent").images
    assert float((latents - x).abs().max()) < 1e-5
    other = student(["3", "7"], latents=noise, generator=Generator(1), guidance_scale=2.0, output_type="latent").images
    assert float((other - x).abs().max()) > 1e-3


def test_grey_and_colour_images(teacher):
    [image] = teacher("1", num_inference_steps=1, generator=Generator(0)).images
    assert image.mode == "L" and image.size == (8, 8)
    colour = sana_pipeline(FlowMatchEulerDiscreteScheduler(), channels=3)
    [image] = colour("1", height=6, width=10, num_inference_steps=1).images
    assert image.mode == "RGB" and image.size == (10, 6)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_round_trip(role, layout, tmp_path, request):
    pipe = request.getfixturevalue(role)
    pipe.save_pretrained(tmp_path, layout=layout)
    again = Pipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is SanaLabelPipeline and type(again.scheduler) is type(pipe.scheduler)
    assert (again.config.num_classes, again.default_size, again.pixels_per_token) == (10, 8, 2)
    images = [
        each(["2", ""], num_inference_steps=2, generator=Generator(0), output_type="np").images
        for each in (pipe, again)
    ]
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt="10"), "the labels 0 to 9 (or '' for none), got '10'"),
        (dict(height=7), "height must be a positive multiple of 2, got 7"),
        (dict(num_inference_steps=0), "num_inference_steps must be a positive integer, got 0"),
    ],
)
def test_bad_arguments(teacher, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        teacher(**dict(prompt="1") | options)


def test_number_of_classes_must_fit_the_transformer(teacher):
    with pytest.raises(UserError, match="12 classes need caption_channels = 12, this transformer has 10"):
        SanaLabelPipeline(teacher.scheduler, teacher.transformer, num_classes=12)


# ---- control ---------------------------------------------------------------------------------------------------------

EDGES = np.random.default_rng(0).integers(0, 256, [2, 8, 8, 1], dtype=np.uint8)


def controlled(pipe: SanaLabelPipeline, moved: bool = True, **change) -> SanaLabelPipeline:
    """With a ControlNet, which has an effect once it is `moved`."""
    network = SanaControlNetModel.from_transformer(pipe.transformer, 1)
    paddle.seed(1)
    for parameter in network.parameters() if moved else ():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    made = SanaLabelPipeline(pipe.scheduler, pipe.transformer, controlnet=network)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: SanaLabelPipeline, *prompts: str, **options) -> np.ndarray:
    shared = dict(num_inference_steps=1, output_type="latent", generator=[Generator(i) for i in range(len(prompts))])
    return pipe(list(prompts), **shared | options).images.numpy()


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_new_controlnet_changes_no_bit(role, steps, request):
    pipe = request.getfixturevalue(role)
    plain = draw(pipe, "3", "7", num_inference_steps=steps)
    new = controlled(pipe, moved=False)
    assert np.array_equal(draw(new, "3", "7", num_inference_steps=steps, control_image=EDGES), plain)
    assert np.array_equal(draw(new, "3", "7", num_inference_steps=steps), plain)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_control_images(role, request):
    base = request.getfixturevalue(role)
    pipe, plain = controlled(base), draw(base, "3", "7")
    images = draw(pipe, "3", "7", control_image=EDGES)
    assert np.array_equal(draw(pipe, "3", "7"), plain)
    assert np.abs(images - plain).max() > 1e-3
    assert np.allclose(draw(pipe, "3", "7", control_image=EDGES, controlnet_conditioning_scale=0.0), plain, atol=1e-6)
    for row, prompt in enumerate("37"):
        one = draw(pipe, prompt, control_image=EDGES[row], generator=[Generator(row)])
        assert np.allclose(one, images[row : row + 1], atol=1e-5)
    pictures = [Image.fromarray(each[..., 0]) for each in EDGES]
    assert np.array_equal(draw(pipe, "3", "7", control_image=pictures), images)
    tensor = paddle.to_tensor(EDGES.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    assert np.allclose(draw(pipe, "3", "7", control_image=tensor), images, atol=1e-5)
    shared = draw(pipe, "3", "7", control_image=EDGES[0])
    assert np.array_equal(shared, draw(pipe, "3", "7", control_image=EDGES[[0, 0]]))
    wide = draw(pipe, "3", width=12, control_image=pictures[0])
    assert wide.shape == (1, 1, 8, 12)


def test_a_controlled_student_is_the_denoiser_under_the_trigflow_sampler(student):
    pipe, noise = controlled(student), randn([1, 1, 8, 8], Generator(0))
    cond = pipe.conditioning(["3"])
    cond = Cond(cond, control=paddle.to_tensor(EDGES[:1].transpose(0, 3, 1, 2) / np.float32(127.5) - 1))
    denoiser = SanaDenoiser(pipe.transformer, pipe.controlnet, 0.5)
    x = trigflow(lambda x, t, target_t: denoiser(x, t, cond, guidance=4.5), noise, steps=1)
    found = draw(pipe, "3", latents=noise, control_image=EDGES[0], controlnet_conditioning_scale=0.5)
    assert np.abs(found - x.numpy()).max() < 1e-5


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_controlnet_is_saved_and_loaded(role, layout, tmp_path, request):
    pipe = controlled(request.getfixturevalue(role))
    assert set(pipe.components) == {"scheduler", "transformer", "controlnet"}
    pipe.save_pretrained(tmp_path, layout=layout)
    again = Pipeline.from_pretrained(tmp_path)
    assert type(again) is SanaLabelPipeline
    assert np.array_equal(draw(again, "3", control_image=EDGES[0]), draw(pipe, "3", control_image=EDGES[0]))
    assert Pipeline.from_pretrained(tmp_path, controlnet=None).controlnet is None


def test_bad_control_images(teacher):
    with pytest.raises(UserError, match="control_image needs a controlnet: pass controlnet= to the pipeline"):
        draw(teacher, "3", control_image=EDGES[0])
    pipe = controlled(teacher)
    with pytest.raises(UserError, match=r"control_image must have shape \[8, 8, 1\], got \[8, 8\]"):
        draw(pipe, "3", control_image=EDGES[0, ..., 0])
    with pytest.raises(UserError, match="got 2 control images for 3 prompts: pass 1, or one a prompt"):
        draw(pipe, "1", "2", "3", control_image=EDGES)


def test_the_controlnet_must_fit(teacher, student):
    deep = SanaControlNetModel.from_transformer(teacher.transformer, 1)
    deep.register_to_config(num_layers=2)
    with pytest.raises(UserError, match="controlnet does not fit this transformer: it has 2 blocks, expected 1 to 1"):
        SanaLabelPipeline(teacher.scheduler, teacher.transformer, controlnet=deep)
    with pytest.raises(UserError, match="controlnet must be of class SanaControlNetModel"):
        SanaLabelPipeline(teacher.scheduler, teacher.transformer, controlnet=student.transformer)
