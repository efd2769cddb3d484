import logging

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import FlowMatchEulerDiscreteScheduler as PPDiffusersScheduler

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import FluxPipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler
from fast_diffusers.time_grids import dynamic_shift_mu

EMBEDS = paddle.zeros([1, 16, 8])
SMALL = dict(height=32, width=48, num_inference_steps=2, output_type="latent", max_sequence_length=16)


def generate(pipe, prompt="a cat", seed=0, **options):
    options = SMALL | options
    if "generator" not in options and "latents" not in options:
        options["generator"] = Generator(seed)
    return pipe(prompt, **options).images


def same(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() < tolerance)


def test_a_call_is_eulers_method_on_the_denoiser(pipe):
    """The whole path against its parts: encoders, dynamic shift, guidance, steps."""
    prompts = ["a cat", "an oil painting of three horses"]
    cond = Cond(
        prompt_embeds=pipe.text_encoder_2(pipe.tokenizer_2(prompts, 16)).last_hidden_state,
        pooled_prompt_embeds=pipe.text_encoder(pipe.tokenizer(prompts)).pooler_output,
    )
    x = euler(
        lambda x, t, _: pipe.denoiser(x, t, cond, guidance=4.0),
        randn([2, 4, 4, 6], Generator(7)),
        steps=3,
        mu=dynamic_shift_mu(2 * 3),
    )
    latents = generate(pipe, prompts, 7, num_inference_steps=3, guidance_scale=4.0)
    assert latents.shape == [2, 4, 4, 6] and latents.dtype == paddle.float32
    assert same(latents, x)


def test_output_types(pipe):
    latents = generate(pipe, ["a cat", "a dog"])
    pd = generate(pipe, ["a cat", "a dog"], output_type="pd")
    array = generate(pipe, ["a cat", "a dog"], output_type="np")
    pil = generate(pipe, ["a cat", "a dog"], output_type="pil")
    decoded = pipe.vae.decode(latents / 0.3611 + 0.1159).sample
    assert pd.shape == [2, 3, 32, 48]
    assert same(pd, (decoded / 2 + 0.5).clip(0, 1))
    assert array.shape == (2, 32, 48, 3) and array.dtype == np.float32
    assert np.array_equal(array, pd.numpy().transpose(0, 2, 3, 1))
    assert [(type(image), image.mode, image.size) for image in pil] == [(Image.Image, "RGB", (48, 32))] * 2
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype(np.uint8))
    [images] = pipe("a cat", generator=Generator(0), return_dict=False, **SMALL)
    assert same(images, generate(pipe))


def test_images_of_a_prompt_are_neighbours(pipe):
    noise = randn([4, 4, 4, 6], Generator(3))
    both = generate(pipe, ["a cat", "a dog"], num_images_per_prompt=2, latents=noise)
    cats = generate(pipe, "a cat", num_images_per_prompt=2, latents=noise[:2])
    assert same(both[:2], cats)
    assert not same(both[2:], generate(pipe, "a cat", num_images_per_prompt=2, latents=noise[2:]), 1e-3)


def test_image_does_not_depend_on_its_batch(pipe):
    pipe_stochastic = FluxPipeline(**pipe.components | {"scheduler": PhasedConsistencyScheduler(stochastic=True)})
    pipe_stochastic.set_progress_bar_config(disable=True)
    for one in (pipe, pipe_stochastic):
        batch = generate(one, ["a", "b", "c"], generator=[Generator(seed) for seed in (1, 2, 3)])
        alone = generate(one, "b", generator=[Generator(2)])
        again = generate(one, "b", seed=2)
        assert same(batch[1:2], alone) and same(alone, again)
    assert not same(generate(pipe, seed=1), generate(pipe, seed=2), 1e-3)


def test_global_generator_without_one(pipe):
    images = []
    for _ in range(2):
        paddle.seed(5)
        images.append(generate(pipe, generator=None))
    assert same(*images) and not same(images[0], generate(pipe, generator=None), 1e-3)


def test_given_latents_are_the_noise(pipe):
    assert same(generate(pipe, latents=randn([1, 4, 4, 6], Generator(0))), generate(pipe))


def test_given_embeddings(pipe):
    embeds, pooled = pipe.encode_prompt(["a cat", "a dog"], max_sequence_length=16)
    given = generate(pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_images_per_prompt=2)
    assert same(given, generate(pipe, ["a cat", "a dog"], num_images_per_prompt=2))
    bare = FluxPipeline(
        **pipe.components | dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    )
    bare.set_progress_bar_config(disable=True)
    again = generate(bare, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_images_per_prompt=2)
    assert same(given, again)
    with pytest.raises(UserError, match="prompts need text_encoder and tokenizer and text_encoder_2 and tokenizer_2"):
        generate(bare)
    with pytest.raises(UserError, match="no vae: ask for output_type='latent'"):
        generate(bare, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, output_type="pil")
    with pytest.raises(UserError, match="no vae, which turns images"):
        bare.decode_latents(given)


def test_distinct_prompts_are_encoded_once(pipe, monkeypatch):
    seen = {"clip": [], "t5": []}
    for kind, name in [("clip", "tokenizer"), ("t5", "tokenizer_2")]:
        tokenizer = getattr(pipe, name)

        def record(texts, *length, kind=kind, tokenizer=tokenizer):
            seen[kind].append(texts)
            return tokenizer(texts, *length)

        monkeypatch.setitem(pipe.__dict__, name, record)
    embeds, pooled = pipe.encode_prompt(["b", "a", "b"], ["x", "x", "y"], num_images_per_prompt=2)
    assert seen == {"clip": [["b", "a"]], "t5": [["x", "y"]]}
    assert embeds.shape == [6, 512, 8] and pooled.shape == [6, 8]
    assert same(pooled[0], pooled[5]) and not same(pooled[0], pooled[2], 1e-3)
    assert same(embeds[0], embeds[3]) and not same(embeds[0], embeds[4], 1e-3)


def test_prompt_2_goes_to_t5(pipe):
    embeds, pooled = pipe.encode_prompt("a cat", "a dog", max_sequence_length=16)
    assert same(embeds, pipe.conditioning(["a dog"], 16)["prompt_embeds"])
    assert same(pooled, pipe.conditioning(["a cat"], 16)["pooled_prompt_embeds"])
    assert not same(generate(pipe, "a cat", prompt_2="a dog"), generate(pipe, "a cat"), 1e-4)


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt("a cat " * 60, max_sequence_length=16)
    assert [record.args[0] for record in caplog.records] == ["CLIPTokenizer", "T5Tokenizer"]


def test_guidance_is_embedded_where_the_model_can(pipe):
    assert not same(generate(pipe, guidance_scale=1.0), generate(pipe, guidance_scale=7.0), 1e-4)
    schnell = FluxPipeline(
        **pipe.components
        | {
            "transformer": type(pipe.transformer).from_config(
                {**pipe.transformer.config, "guidance_embeds": False, "_use_default_values": []}
            )
        }
    )
    schnell.set_progress_bar_config(disable=True)
    assert same(generate(schnell, guidance_scale=1.0), generate(schnell, guidance_scale=7.0))


def test_sigmas(pipe):
    given = generate(pipe, sigmas=[1.0, 0.5])
    assert same(given, generate(pipe, num_inference_steps=2))
    assert not same(given, generate(pipe, sigmas=[1.0, 0.2]), 1e-4)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler does not take timesteps"):
        generate(pipe, timesteps=[1000.0, 500.0])
    with pytest.raises(UserError, match="timesteps or sigmas, not both"):
        generate(pipe, timesteps=[1000.0, 500.0], sigmas=[1.0, 0.5])


def test_schedulers_are_swappable(pipe):
    euler_image = generate(pipe, num_inference_steps=8)
    try:
        config = pipe.scheduler.config
        pipe.scheduler = PhasedConsistencyScheduler.from_config(config)
        phased = generate(pipe, num_inference_steps=4)
        with pytest.raises(ValueError, match="pass num_inference_steps only"):
            generate(pipe, sigmas=[1.0, 0.5])
        pipe.scheduler = PPDiffusersScheduler(shift=1.0)
        foreign = generate(pipe, num_inference_steps=8)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        plain = generate(pipe, num_inference_steps=8)
    finally:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    assert not same(phased, euler_image, 1e-4)
    assert same(foreign, plain, 0.1 * float(plain.std()))  # its timesteps end at 1, ours at 1 / steps
    assert same(euler_image, generate(pipe, num_inference_steps=8))


def test_callback_sees_and_replaces_tensors(pipe):
    seen = []

    def watch(called_pipe, step, timestep, tensors):
        assert called_pipe is pipe
        seen.append((step, float(timestep), set(tensors)))

    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    plain = generate(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert same(plain, generate(pipe))
    assert [(step, names) for step, _, names in seen] == [(0, set(names)), (1, set(names))]
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()

    zero = generate(pipe, callback_on_step_end=lambda *_: {"latents": paddle.zeros([1, 4, 4, 6])})
    assert same(zero, paddle.zeros_like(zero), 1e-9)

    def other_prompt(_, step, timestep, tensors):
        assert set(tensors) == {"prompt_embeds"}
        return {"prompt_embeds": paddle.zeros_like(tensors["prompt_embeds"])}

    changed = generate(pipe, callback_on_step_end=other_prompt, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not same(changed, plain, 1e-5)


def test_images_to_latents_and_back(pipe):
    images = randn([2, 3, 32, 48], Generator(1)).clip(-1, 1)
    posterior = pipe.vae.encode(images).latent_dist
    mode = pipe.encode_images(images)
    assert mode.shape == [2, 4, 4, 6]
    assert same(mode, (posterior.mean - 0.1159) * 0.3611)
    noise = randn(mode.shape, Generator(2))
    assert same(pipe.encode_images(images, Generator(2)), mode + posterior.std * noise * 0.3611)
    assert same(pipe.decode_latents(mode), pipe.vae.decode(posterior.mean).sample)


def test_progress_bar_counts_steps(pipe, capsys):
    try:
        pipe.set_progress_bar_config(disable=False)
        generate(pipe, num_inference_steps=3)
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(height=40), "height must be a positive multiple of 16, got 40"),
        (dict(width=-16), "width must be a positive multiple of 16, got -16"),
        (dict(width=0), "width must be a positive multiple of 16, got 0"),
        (dict(height=32.0), r"height must be a positive multiple of 16, got 32\.0"),
        (dict(num_inference_steps=-1), "num_inference_steps must be a positive integer, got -1"),
        (dict(num_inference_steps=0), "num_inference_steps must be a positive integer, got 0"),
        (dict(num_inference_steps=2.5), r"num_inference_steps must be a positive integer, got 2\.5"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be a positive integer, got 0"),
        (dict(output_type="jpg"), "output_type must be one of pil, np, pd, latent, got 'jpg'"),
        (dict(generator=[Generator(0)] * 2), "got 2 generators for 1 images"),
        (dict(latents=paddle.zeros([1, 4, 6, 4])), r"shape \[1, 4, 4, 6\] for this call, got \[1, 4, 6, 4\]"),
        (dict(prompt=None), "pass either prompt or prompt_embeds$"),
        (dict(prompt_embeds=EMBEDS, pooled_prompt_embeds=EMBEDS[:, 0]), "prompt or prompt_embeds, not both"),
        (dict(prompt=None, prompt_embeds=EMBEDS), "prompt_embeds and pooled_prompt_embeds belong together"),
        (dict(pooled_prompt_embeds=EMBEDS[:, 0]), "prompt_embeds and pooled_prompt_embeds belong together"),
        (dict(prompt=3), "prompt must be a string or a non-empty list of strings, got 3"),
        (dict(prompt=[]), r"prompt must be a string or a non-empty list of strings, got \[\]"),
        (dict(prompt_2=["a", "b"]), "prompt_2 must have as many prompts as prompt, 1, got 2"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), r"not \['noise'\]"),
        (
            dict(joint_attention_kwargs={"ip_adapter": 1}),
            r"joint_attention_kwargs takes only 'scale'.*not \['ip_adapter'\]",
        ),
        (dict(joint_attention_kwargs={"scale": 0.5}), "no LoRA is running in this pipeline"),
        (dict(max_sequence_length=0), "max_length 0 leaves no room"),
    ],
)
def test_bad_arguments(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe(**dict(prompt="a cat") | SMALL | options)


@pytest.mark.parametrize(
    "embeds, pooled, message",
    [
        ([1, 16, 9], [1, 8], r"prompt_embeds must have shape \[N, T, 8\] for this call, got \[1, 16, 9\]"),
        ([16, 8], [1, 8], r"prompt_embeds must have shape"),
        ([2, 16, 8], [1, 8], r"pooled_prompt_embeds must have shape \[2, 8\] for this call, got \[1, 8\]"),
    ],
)
def test_embeddings_of_the_wrong_shape(pipe, embeds, pooled, message):
    with pytest.raises(UserError, match=message):
        pipe(prompt_embeds=paddle.zeros(embeds), pooled_prompt_embeds=paddle.zeros(pooled), **SMALL)


def test_prompt_2_without_prompt(pipe):
    embeds = dict(prompt_embeds=paddle.zeros([1, 16, 8]), pooled_prompt_embeds=paddle.zeros([1, 8]))
    with pytest.raises(UserError, match="prompt_2 needs prompt"):
        pipe(prompt_2="a dog", **embeds, **SMALL)
