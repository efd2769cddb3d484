"""Qwen-Image and Z-Image: what their pipelines have in common, and what each does in its own way."""

import json
import shutil

import numpy as np
import paddle
import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import Pipeline, QwenImagePipeline
from fast_diffusers.pipelines import qwen_image as qwen_module
from fast_diffusers.pipelines import z_image as z_module
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler
from fast_diffusers.schedulers import UnifiedScheduler

PROMPTS = ["a cat", "an oil painting of three horses"]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rebuilt(pipe, **parts):
    return quiet(type(pipe)(**pipe.components | parts))


@pytest.fixture(params=["qwen", "z"])
def either(request):
    return request.getfixturevalue(request.param)


def generate(pipe, prompt="a cat", seed=0, **options):
    options = dict(height=16, width=24, num_inference_steps=2, output_type="latent") | options
    options = dict(max_sequence_length=60, negative_prompt=" ") | options
    if "generator" not in options:
        options["generator"] = Generator(seed)
    return pipe(prompt, **options).images


def same(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() < tolerance)


def equal(a, b):
    return bool((a == b).all())


def unguided(pipe):
    return {"true_cfg_scale" if isinstance(pipe, QwenImagePipeline) else "guidance_scale": 1.0}


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_runs_and_repeats(either, steps):
    first, second = (generate(either, num_inference_steps=steps, output_type="np") for _ in range(2))
    assert first.shape == (1, 16, 24, 3) and np.array_equal(first, second)
    assert np.isfinite(first).all() and first.std() > 0


def test_prompts_and_masks_stay_paired(either):
    """Prompts of different lengths do not change each other's images, whatever padding they bring along."""
    noise = randn([4, 4, 4, 6], Generator(3))
    both = generate(either, PROMPTS, num_images_per_prompt=2, latents=noise)
    for row, prompt in enumerate(np.repeat(PROMPTS, 2)):
        assert same(both[row : row + 1], generate(either, str(prompt), latents=noise[row : row + 1]), 1e-4), row
    assert not same(both[1:2], generate(either, PROMPTS[1], latents=noise[1:2]), 1e-3)


def test_embeddings_in_place_of_prompts(either):
    bare = rebuilt(either, tokenizer=None, text_encoder=None)
    given = {}
    for prefix, texts in (("", PROMPTS), ("negative_", [" ", " "])):
        embeds, mask = either.encode_prompt(texts, max_sequence_length=60)
        given |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
    assert same(generate(bare, None, negative_prompt=None, **given), generate(either, PROMPTS))
    with pytest.raises(UserError, match="prompts need tokenizer and text_encoder, which this pipeline is without"):
        generate(bare)


def test_guidance(either):
    plain = generate(either, **unguided(either))
    assert equal(plain, generate(either, negative_prompt="a dog", **unguided(either)))
    assert not same(plain, generate(either), 1e-4)
    assert not same(generate(either, negative_prompt="a dog"), generate(either), 1e-5)


def test_images_to_latents_and_back(either):
    images = paddle.tanh(randn([2, 3, 16, 24], Generator(1)))
    latents = either.encode_images(images)
    assert latents.shape == [2, 4, 4, 6]
    z = either.vae.encode(images.unsqueeze(2) if isinstance(either, QwenImagePipeline) else images).latent_dist.mode()
    if isinstance(either, QwenImagePipeline):
        mean, std = (paddle.to_tensor(v).reshape([4, 1, 1]) for v in ((0.1, -0.2, 0.3, 0.0), (1.1, 0.9, 1.2, 1.0)))
        assert same(latents, (z.squeeze(2) - mean) / std)
        back = (latents * std + mean).unsqueeze(2)
        decoded = either.vae.decode(back).sample.squeeze(2)
    else:
        assert same(latents, (z - 0.1159) * 0.3611)
        back = latents / 0.3611 + 0.1159
        decoded = either.vae.decode(back).sample
    assert same(back, z, 1e-6)  # it rounds, which these decoders amplify: so they get the rounded one
    assert same(either.decode_latents(latents), decoded)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(either, layout, tmp_path):
    either.save_pretrained(tmp_path, layout=layout)
    again = quiet(Pipeline.from_pretrained(tmp_path))
    assert type(again) is type(either)
    assert equal(generate(again), generate(either))


def test_schedulers_are_swappable(either):
    pipe = rebuilt(either, scheduler=UnifiedScheduler())
    assert not same(generate(pipe, num_inference_steps=3), generate(either, num_inference_steps=3), 1e-4)


def test_opens_what_diffusers_writes(either, fixtures_dir, tmp_path):
    """The reference models in the folders, under the names that published ones have in their index."""
    either.save_pretrained(tmp_path, layout="diffusers")
    of_qwen = isinstance(either, QwenImagePipeline)
    models = dict(transformer="qwen_image", vae="vae_qwen_image") if of_qwen else dict(transformer="z_image")
    for part, fixture in models.items():
        shutil.rmtree(tmp_path / part)
        shutil.copytree(fixtures_dir / fixture, tmp_path / part)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"][1] = "Qwen2Tokenizer"
    index["text_encoder"][1] = "Qwen2_5_VLForConditionalGeneration" if of_qwen else "Qwen3ForCausalLM"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = quiet(Pipeline.from_pretrained(tmp_path))
    images = generate(pipe, PROMPTS, output_type="np")
    assert images.shape == (2, 16, 24, 3) and np.isfinite(images).all() and images.std() > 0


EMBEDS, MASK = paddle.zeros([1, 12, 24]), paddle.ones([1, 12], dtype="int64")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=None), "pass either prompt or prompt_embeds$"),
        (dict(prompt_embeds=EMBEDS, prompt_embeds_mask=MASK), "prompt or prompt_embeds, not both"),
        (dict(prompt=None, prompt_embeds=EMBEDS), "prompt_embeds and prompt_embeds_mask belong together"),
        (
            dict(prompt=None, prompt_embeds=EMBEDS, prompt_embeds_mask=MASK[:, :5]),
            r"prompt_embeds_mask must have shape \[1, 12\] for this call, got \[1, 5\]",
        ),
        (dict(negative_prompt=["a", "b"]), "got 2 negative prompts for 1 prompts"),
        (dict(negative_prompt_embeds=EMBEDS, negative_prompt_embeds_mask=MASK), "not both"),
        (dict(height=20), "height must be a positive multiple of 8, got 20"),
        (dict(output_type="jpg"), "output_type must be one of"),
        (dict(max_sequence_length=0), "max_"),
    ],
)
def test_bad_arguments_are_one_message(either, options, message):
    with pytest.raises(UserError, match=message):
        generate(either, **{"prompt": "a cat"} | options)


# ---- Qwen-Image ------------------------------------------------------------------------------------------------------


def test_qwen_text_is_what_follows_the_system_message(qwen):
    ids, mask = qwen.tokenizer(PROMPTS, 1024, template=qwen_module.TEMPLATE, padding_side="right")
    start = qwen.tokenizer.count(qwen_module.TEMPLATE[: qwen_module.TEMPLATE.index("{}")])
    states = qwen.text_encoder(ids, mask).last_hidden_state.numpy()
    embeds, found = (each.numpy() for each in qwen.encode_prompt(PROMPTS))
    length = states.shape[1] - start
    assert embeds.shape == (2, 512, 24) and not embeds[:, length:].any() and not found[:, length:].any()
    embeds, found = embeds[:, :length], found[:, :length]
    np.testing.assert_array_equal(found, mask.numpy()[:, start:])
    np.testing.assert_allclose(embeds, states[:, start:] * found[..., None], atol=1e-5)
    assert found[1].all() and not found[0].all()
    assert qwen.encode_prompt(PROMPTS, max_sequence_length=3)[0].shape == [2, 3, 24]


def test_qwen_guidance_keeps_the_length_of_tokens(qwen):
    """The published rule on packed tokens, replayed in numpy for one step."""
    noise = randn([1, 4, 4, 6], Generator(0))
    conditional, null = (
        qwen.denoiser(noise, 1.0, qwen.conditioning([text])).numpy().astype(np.float64) for text in ("a cat", " ")
    )

    def packed(x):
        return x.reshape(4, 2, 2, 3, 2).transpose(1, 3, 0, 2, 4).reshape(6, 16)

    guided = null + 4.0 * (conditional - null)
    scale = np.linalg.norm(packed(conditional[0]), axis=1) / np.linalg.norm(packed(guided[0]), axis=1)
    guided *= np.kron(scale.reshape(2, 3), np.ones([2, 2]))
    found = generate(qwen, num_inference_steps=1, latents=noise)
    np.testing.assert_allclose(found, noise.numpy() - guided, atol=1e-5)


def test_qwen_leaves_padding_out(qwen, monkeypatch):
    lengths, forward = [], qwen.transformer.forward

    def record(**options):
        lengths.append(options["encoder_hidden_states"].shape[1])
        return forward(**options)

    monkeypatch.setattr(qwen.transformer, "forward", record)
    longest = int(qwen.encode_prompt(PROMPTS)[1].sum(axis=1).max())
    images = generate(qwen, PROMPTS)
    assert lengths == [longest] * 2 and 1 < longest < 60
    assert same(images, generate(qwen, PROMPTS, max_sequence_length=longest))


def test_wrong_attention_arguments_are_called_by_their_name(qwen, z):
    for pipe, name in ((qwen, "attention_kwargs"), (z, "joint_attention_kwargs")):
        with pytest.raises(UserError, match=rf"^{name} takes only 'scale', that of the LoRA, not \['adapter'\]"):
            generate(pipe, **{name: {"adapter": 1}})


def test_qwen_without_a_negative_prompt_is_not_guided(qwen):
    assert equal(generate(qwen, negative_prompt=None), generate(qwen, true_cfg_scale=1.0))


# ---- Z-Image ---------------------------------------------------------------------------------------------------------


def test_z_text_is_the_hidden_state_before_the_last(z):
    ids, mask = z.tokenizer(PROMPTS, 20, template=z_module.TEMPLATE, padding="max_length", padding_side="right")
    states = z.text_encoder(ids, mask, output_hidden_states=True).hidden_states
    embeds, found = z.encode_prompt(PROMPTS, max_sequence_length=20)
    assert same(embeds, states[-2]) and not same(embeds, states[-1], 1e-3) and equal(found, mask)


def test_z_guidance_counts_from_zero(z):
    """Published: v_c + w (v_c - v_u)."""
    text, null = (z.conditioning([prompt], 60) for prompt in ("a cat", " "))

    def velocity(x, t, _):
        conditional = z.denoiser(x, t, text)
        return conditional + 3.0 * (conditional - z.denoiser(x, t, null))

    truth = euler(velocity, randn([1, 4, 4, 6], Generator(0)), steps=2, mu=np.log(3.0))
    assert same(generate(z, guidance_scale=3.0), truth, 1e-4)
    assert not same(generate(z, guidance_scale=2.0), truth, 1e-3)
