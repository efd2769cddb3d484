import shutil

import numpy as np
import paddle
import pytest
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as PPDiffusersTransformer

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import Pipeline, StableDiffusion3Pipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler
from fast_diffusers.schedulers import UnifiedScheduler

PROMPTS = ["a cat", "an oil painting of three horses"]
T5_PARTS = ("text_encoder_3", "tokenizer_3")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rebuilt(pipe, **parts):
    return quiet(type(pipe)(**pipe.components | parts))


def generate(pipe, prompt="a cat", seed=0, **options):
    options = dict(height=16, width=24, num_inference_steps=2, output_type="latent", max_sequence_length=16) | options
    if "generator" not in options:
        options["generator"] = Generator(seed)
    return pipe(prompt, **options).images


def same(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() < tolerance)


def equal(a, b):
    return bool((a == b).all())


def test_text_is_two_clips_beside_each_other_and_t5_behind(sd3):
    embeds, pooled = sd3.encode_prompt(PROMPTS, max_sequence_length=16)
    first = sd3.text_encoder(sd3.tokenizer(PROMPTS))
    second = sd3.text_encoder_2(sd3.tokenizer_2(PROMPTS))
    t5 = sd3.text_encoder_3(sd3.tokenizer_3(PROMPTS, 16)).last_hidden_state
    assert embeds.shape == [2, 77 + 16, 32] and pooled.shape == [2, 24]
    assert same(embeds[:, :77, :8], first.hidden_states[-2]) and same(embeds[:, :77, 8:24], second.hidden_states[-2])
    assert equal(embeds[:, :77, 24:], paddle.zeros([2, 77, 8])) and same(embeds[:, 77:], t5)
    assert same(pooled[:, :12], first.text_embeds) and same(pooled[:, 12:], second.text_embeds)
    skipped, _ = sd3.encode_prompt(PROMPTS, max_sequence_length=16, clip_skip=1)
    assert same(skipped[:, :77, :8], first.hidden_states[-3])


def test_without_t5_its_embeddings_are_zeros(sd3):
    pipe = rebuilt(sd3, **dict.fromkeys(T5_PARTS))
    embeds, pooled = pipe.encode_prompt("a cat", max_sequence_length=16)
    whole, same_pooled = sd3.encode_prompt("a cat", max_sequence_length=16)
    assert equal(embeds[:, 77:], paddle.zeros([1, 16, 32])) and equal(embeds[:, :77], whole[:, :77])
    assert equal(pooled, same_pooled)
    assert not same(generate(pipe), generate(sd3), 1e-4)


def test_each_encoder_has_its_prompt(sd3):
    embeds, pooled = sd3.encode_prompt("a cat", "a dog", "a horse", max_sequence_length=16)
    alone = {name: sd3.encode_prompt(f"a {name}", max_sequence_length=16) for name in ("cat", "dog", "horse")}
    assert same(embeds[:, :77, :8], alone["cat"][0][:, :77, :8]) and same(pooled[:, :12], alone["cat"][1][:, :12])
    assert same(embeds[:, :77, 8:], alone["dog"][0][:, :77, 8:]) and same(pooled[:, 12:], alone["dog"][1][:, 12:])
    assert same(embeds[:, 77:], alone["horse"][0][:, 77:])
    given = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert same(generate(sd3, None, **given), generate(sd3, prompt_2="a dog", prompt_3="a horse"))
    plain = generate(sd3, negative_prompt="a dog")
    assert not same(plain, generate(sd3, negative_prompt="a dog", negative_prompt_3="a horse"), 1e-5)


def test_classifier_free_guidance(sd3):
    """The whole path against its parts: v_u + w (v_c - v_u) at 1000 t, Euler's method with the scheduler's shift."""
    text, null = (sd3.encode_prompt(each, max_sequence_length=16) for each in ("a cat", ""))

    def velocity(x, t, _):
        with_text, without = (
            sd3.transformer(x, embeds, pooled, 1000 * t.reshape([-1]).expand([1])).sample
            for embeds, pooled in (text, null)
        )
        return without + 4.0 * (with_text - without)

    truth = euler(velocity, randn([1, 4, 4, 6], Generator(0)), steps=3, mu=np.log(3.0))
    assert same(generate(sd3, guidance_scale=4.0, num_inference_steps=3), truth, 3e-5)
    assert equal(generate(sd3, guidance_scale=1.0), generate(sd3, guidance_scale=1.0, negative_prompt="a dog"))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_runs_and_repeats(sd3, steps):
    first, second = (generate(sd3, num_inference_steps=steps, output_type="np") for _ in range(2))
    assert first.shape == (1, 16, 24, 3) and np.array_equal(first, second)
    assert np.isfinite(first).all() and first.std() > 0


def test_images_of_a_prompt_are_neighbours(sd3):
    noise = randn([4, 4, 4, 6], Generator(3))
    both = generate(sd3, PROMPTS, num_images_per_prompt=2, latents=noise)
    for row, prompt in enumerate(np.repeat(PROMPTS, 2)):
        assert same(both[row : row + 1], generate(sd3, str(prompt), latents=noise[row : row + 1]), 1e-4), row


def test_images_to_latents_and_back(sd3):
    images = paddle.tanh(randn([2, 3, 16, 24], Generator(1)))
    posterior = sd3.vae.encode(images).latent_dist
    assert same(sd3.encode_images(images), (posterior.mean - 0.0609) * 1.5305)
    noise = randn(posterior.mean.shape, Generator(2))
    assert same(sd3.encode_images(images, Generator(2)), (posterior.mean + posterior.std * noise - 0.0609) * 1.5305)
    assert same(sd3.decode_latents(sd3.encode_images(images)), sd3.vae.decode(posterior.mean).sample, 1e-4)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
@pytest.mark.parametrize("with_t5", [True, False])
def test_round_trip_is_exact(sd3, layout, with_t5, tmp_path):
    pipe = sd3 if with_t5 else rebuilt(sd3, **dict.fromkeys(T5_PARTS))
    pipe.save_pretrained(tmp_path, layout=layout)
    assert (tmp_path / "text_encoder_3").is_dir() == with_t5
    again = quiet(Pipeline.from_pretrained(tmp_path))
    assert type(again) is StableDiffusion3Pipeline
    assert equal(generate(again), generate(pipe))


@pytest.mark.parametrize("fixture", ["sd3", "sd35"])
def test_opens_what_diffusers_writes(sd3, fixtures_dir, fixture, tmp_path):
    sd3.save_pretrained(tmp_path, layout="diffusers")
    shutil.rmtree(tmp_path / "transformer")
    shutil.copytree(fixtures_dir / fixture, tmp_path / "transformer")
    pipe = quiet(StableDiffusion3Pipeline.from_pretrained(tmp_path))
    images = generate(pipe, PROMPTS, output_type="np")
    assert images.shape == (2, 16, 24, 3) and np.isfinite(images).all() and images.std() > 0


def test_schedulers_are_swappable(sd3):
    pipe = rebuilt(sd3, scheduler=UnifiedScheduler())
    assert not same(generate(pipe, num_inference_steps=3), generate(sd3, num_inference_steps=3), 1e-4)


def test_runs_the_transformer_of_ppdiffusers(sd3, sd3_config, tmp_path):
    theirs = PPDiffusersTransformer(**sd3_config)
    for name, weight in sd3.transformer.state_dict().items():
        theirs.state_dict()[name].set_value(weight)
    theirs.eval()
    pipe = rebuilt(sd3, transformer=theirs)
    assert same(generate(pipe), generate(sd3), 1e-4)
    with pytest.raises(UserError, match="of ppdiffusers runs in this pipeline but is not saved with it"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


EMBEDS, POOLED = paddle.zeros([1, 20, 32]), paddle.zeros([1, 24])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=None), "pass either prompt or prompt_embeds$"),
        (dict(prompt=None, prompt_embeds=EMBEDS), "prompt_embeds and pooled_prompt_embeds belong together"),
        (
            dict(prompt=None, prompt_embeds=EMBEDS, pooled_prompt_embeds=POOLED, prompt_3="a"),
            "prompt_2 and prompt_3 need prompt",
        ),
        (
            dict(prompt=None, prompt_embeds=EMBEDS, pooled_prompt_embeds=POOLED[:, :5]),
            r"pooled_prompt_embeds must have shape \[1, 24\] for this call, got \[1, 5\]",
        ),
        (dict(prompt_2=["a", "b"]), "got 2 prompts for another encoder, expected 1 or 1"),
        (dict(clip_skip=2), r"clip_skip must lie in 0\.\.1, got 2"),
        (dict(negative_prompt=["a", "b"]), "got 2 negative prompts for 1 prompts"),
        (dict(height=20), "height must be a positive multiple of 8, got 20"),
    ],
)
def test_bad_arguments_are_one_message(sd3, options, message):
    with pytest.raises(UserError, match=message):
        generate(sd3, **{"prompt": "a cat"} | options)


def test_parts_that_belong_together(sd3):
    with pytest.raises(UserError, match="text_encoder_3 and tokenizer_3 belong together"):
        rebuilt(sd3, tokenizer_3=None)
    with pytest.raises(UserError, match="prompts need tokenizer_2, which this pipeline is without"):
        generate(rebuilt(sd3, tokenizer_2=None))
