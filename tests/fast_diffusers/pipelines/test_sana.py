import json
import logging
import shutil
from itertools import pairwise

import numpy as np
import paddle
import pytest
from PIL import Image

from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines import Pipeline, SanaPipeline, SanaSprintPipeline
from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import euler
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler, SCMScheduler
from fast_diffusers.text_encoders import Gemma2Model, GemmaTokenizer

SMALL = dict(height=16, width=24, num_inference_steps=2, output_type="latent", max_sequence_length=12)
SHAPE = [1, 8, 4, 6]
PADDED = dict(padding="max_length", padding_side="right")
INSTRUCTION = ["Describe the image in detail.", "Prompt: "]
TRANSFORMER = dict(
    in_channels=8,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=24,
    sample_size=8,
)
SPRINT = dict(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def moved(model, seed=0, scale=0.1):
    """The model with no weight at zero."""
    paddle.seed(seed)
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + scale * paddle.randn(weight.shape))
    model.eval()
    return model


def autoencoder():
    paddle.seed(2)
    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    )
    model.eval()
    return model


def text_encoder(vocabulary):
    paddle.seed(3)
    model = Gemma2Model(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    return moved(model, 3, 0.3)


@pytest.fixture(scope="module")
def text(text_assets):
    tokenizer = GemmaTokenizer.from_pretrained(text_assets / "gemma2" / "tokenizer")
    return dict(tokenizer=tokenizer, text_encoder=text_encoder(450))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rebuilt(pipe, **parts):
    return quiet(type(pipe)(**pipe.components | parts))


@pytest.fixture(scope="module")
def teacher(text):
    """Shared by the module's tests, which leave it as it was."""
    transformer = moved(SanaTransformer2DModel(**TRANSFORMER))
    return quiet(SanaPipeline(**text, vae=autoencoder(), transformer=transformer, scheduler=scheduler(3.0)))


@pytest.fixture(scope="module")
def sprint(text):
    """Likewise."""
    transformer = moved(SanaTransformer2DModel(**TRANSFORMER | SPRINT))
    return quiet(SanaSprintPipeline(**text, vae=autoencoder(), transformer=transformer, scheduler=SCMScheduler()))


@pytest.fixture(params=["teacher", "sprint"])
def either(request):
    return request.getfixturevalue(request.param)


def scheduler(shift):
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def generate(pipe, prompt="a cat", seed=0, **options):
    options = SMALL | options
    if "generator" not in options:
        options["generator"] = Generator(seed)
    return pipe(prompt, **options).images


def same(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() < tolerance)


def equal(a, b):
    return bool((a == b).all())


def embeddings(pipe, prompts, **options):
    embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=12, **options)
    return dict(prompt_embeds=embeds, prompt_attention_mask=mask)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_text_is_the_encoders_last_state_with_its_mask(teacher):
    ids, mask = teacher.tokenizer(["a cat", "a photo of a small red cat"], 12, **PADDED)
    truth = teacher.text_encoder(ids, mask).last_hidden_state
    found = embeddings(teacher, ["  A Cat ", "a photo of a small red cat"])
    assert same(found["prompt_embeds"], truth) and equal(found["prompt_attention_mask"], mask)
    assert 0 < int(mask[0].sum()) < int(mask[1].sum())
    assert teacher.encode_prompt("a cat")[0].shape == [1, 300, 24]


def test_an_instruction_adds_tokens_and_keeps_the_first_and_the_last(teacher):
    """As many tokens are left for the prompt as without an instruction: tokens(instruction) + T - 2 in all."""
    prefix = "\n".join(INSTRUCTION)
    length = teacher.tokenizer.count(prefix) + 12 - 2
    ids, mask = teacher.tokenizer([prefix + "a cat"], length, **PADDED)
    kept = [0, *range(length - 11, length)]
    states = teacher.text_encoder(ids, mask).last_hidden_state
    found = embeddings(teacher, "A cat", complex_human_instruction=INSTRUCTION)
    np.testing.assert_allclose(found["prompt_embeds"], states.numpy()[:, kept], atol=1e-5)
    np.testing.assert_array_equal(found["prompt_attention_mask"], mask.numpy()[:, kept])
    assert found["prompt_attention_mask"].sum() > 2
    assert not same(generate(teacher), generate(teacher, complex_human_instruction=INSTRUCTION), 1e-4)


def test_padding_does_not_count(either):
    """More padding leaves the image as it is, so the mask reaches the transformer."""
    assert same(generate(either), generate(either, max_sequence_length=20))


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_runs_and_repeats(either, steps, output_type):
    first, second = (generate(either, num_inference_steps=steps, output_type=output_type) for _ in range(2))
    if output_type == "pil":
        assert [image.size for image in first] == [(24, 16)]
        first, second = (np.stack([np.asarray(image) for image in images]) for images in (first, second))
    assert first.shape == (1, 16, 24, 3)
    assert np.array_equal(first, second) and np.isfinite(first).all() and first.std() > 0
    other = generate(either, seed=1, num_inference_steps=steps, output_type="np")
    assert np.abs(other - generate(either, num_inference_steps=steps, output_type="np")).max() > 1e-3


def test_default_size_is_that_of_the_training(teacher):
    assert teacher("a cat", num_inference_steps=1, output_type="latent").images.shape == [1, 8, 8, 8]


def test_decoding_divides_by_the_scaling_factor(teacher):
    images = paddle.tanh(randn([2, 3, 16, 24], Generator(1)))
    latents = teacher.encode_images(images)
    assert same(latents, teacher.vae.encode(images).latent * 0.41407)
    assert same(teacher.decode_latents(latents), teacher.vae.decode(latents / 0.41407).sample)
    found = generate(teacher, output_type="pd")
    assert same(found, (teacher.decode_latents(generate(teacher)) / 2 + 0.5).clip(0, 1))


@pytest.mark.parametrize("negative", ["", "a blurry photo"])
def test_classifier_free_guidance(teacher, negative):
    """The whole path against its parts: v_u + w (v_c - v_u) at 1000 s, Euler's method with the scheduler's shift."""
    text, null = embeddings(teacher, "a cat"), embeddings(teacher, negative)

    def velocity(x, t, _):
        def run(prompt_embeds, prompt_attention_mask):
            return teacher.transformer(
                x,
                prompt_embeds,
                1000 * t.reshape([-1]).expand([x.shape[0]]),
                encoder_attention_mask=prompt_attention_mask,
                return_dict=False,
            )[0]

        with_text, without = run(**text), run(**null)
        return without + 4.0 * (with_text - without)

    truth = euler(velocity, randn(SHAPE, Generator(0)), steps=3, mu=np.log(3.0))
    assert same(generate(teacher, negative_prompt=negative, guidance_scale=4.0, num_inference_steps=3), truth)


def test_guidance_of_one_runs_the_prompt_only(teacher, monkeypatch):
    rows, forward = [], teacher.transformer.forward

    def record(hidden_states, *arguments, **options):
        rows.append(hidden_states.shape[0])
        return forward(hidden_states, *arguments, **options)

    monkeypatch.setattr(teacher.transformer, "forward", record)
    plain = generate(teacher, guidance_scale=1.0)
    assert equal(plain, generate(teacher, guidance_scale=1.0, negative_prompt="a dog"))
    assert rows == [1, 1, 1, 1]
    generate(teacher, guidance_scale=2.0)
    assert rows[4:] == [2, 2]
    assert not same(plain, generate(teacher, guidance_scale=2.0), 1e-4)


@pytest.mark.parametrize(
    "steps, angles", [(1, [np.pi / 2, 0]), (2, [np.arctan(400), 1.3, 0]), (4, [np.arctan(400), 1.3, 1.1, 0.6, 0])]
)
def test_sprint_is_the_trigflow_sampler(sprint, steps, angles):
    """Its loop, replayed in numpy with angles around the transformer (section 5 of the TrigFlow conversion)."""
    text, sigma_data, guidance = embeddings(sprint, ["a cat"]), 0.5, 4.5
    source = Generator(0)
    x = source.normal(SHAPE).astype(np.float64) * sigma_data
    for t, target in pairwise(angles):
        s = np.sin(t) / (np.sin(t) + np.cos(t))
        scale = np.sqrt(s**2 + (1 - s) ** 2)
        x_hat = x / sigma_data
        v = sprint.transformer(
            paddle.to_tensor(scale * x_hat, dtype="float32"),
            text["prompt_embeds"],
            paddle.to_tensor([s], dtype="float32"),
            guidance=paddle.to_tensor([0.1 * guidance], dtype="float32"),
            encoder_attention_mask=text["prompt_attention_mask"],
        ).sample.numpy()
        f = (1 - 2 * s) * x_hat + scale * v
        data = np.cos(t) * x - np.sin(t) * sigma_data * f
        fresh = source.normal(SHAPE) if target > 0 else 0
        x = np.cos(target) * data + np.sin(target) * sigma_data * fresh
    found = generate(sprint, num_inference_steps=steps, guidance_scale=guidance)
    assert np.abs(found.numpy() - x / sigma_data).max() < 1e-5


def test_sprint_schedules(sprint):
    default = generate(sprint)
    assert not same(default, generate(sprint, intermediate_timesteps=1.0), 1e-4)
    assert same(default, generate(sprint, max_timesteps=float(np.arctan(400)), intermediate_timesteps=1.3))
    assert same(default, generate(sprint, timesteps=[float(np.arctan(400)), 1.3, 0.0]))
    assert not same(generate(sprint, guidance_scale=4.0), generate(sprint, guidance_scale=5.0), 1e-5)
    for angles in (dict(max_timesteps=2.0), dict(timesteps=[1.5, 1.6, 0.0]), dict(intermediate_timesteps=1.6)):
        with pytest.raises(UserError, match="angles must descend strictly from at most pi/2 to 0"):
            generate(sprint, **angles)
    euler_pipe = rebuilt(sprint, scheduler=scheduler(1.0))
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler does not take intermediate_timesteps"):
        generate(euler_pipe, intermediate_timesteps=1.3)


def test_schedulers_are_swappable(either):
    images = []
    for cls in (FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler, SCMScheduler):
        pipe = rebuilt(either, scheduler=cls.from_config(either.scheduler.config))
        images.append(generate(pipe, num_inference_steps=3))
        assert bool(images[-1].isfinite().all())
    assert all(not same(a, b, 1e-4) for i, a in enumerate(images) for b in images[:i])


def test_prompts_and_masks_stay_paired(either):
    noise = randn([4, 8, 4, 6], Generator(3))
    prompts = ["a cat", "a photo of a small red cat"]
    seeds = [Generator(seed) for seed in range(4)]
    both = generate(either, prompts, num_images_per_prompt=2, latents=noise, generator=seeds)
    for row, prompt in enumerate(["a cat", "a cat", *[prompts[1]] * 2]):
        alone = generate(either, prompt, latents=noise[row : row + 1], generator=[Generator(row)])
        assert same(both[row : row + 1], alone), row


def test_embeddings_in_place_of_prompts(either):
    prompts = ["a cat", "a photo of a small red cat"]
    bare = rebuilt(either, tokenizer=None, text_encoder=None)
    options = dict(num_images_per_prompt=2)
    given = embeddings(either, prompts)
    if either.transformer.config.guidance_embeds is False:
        options |= {f"negative_{name}": value for name, value in embeddings(either, ["", ""]).items()}
    assert equal(generate(either, prompts, num_images_per_prompt=2), generate(bare, None, **options, **given))
    with pytest.raises(UserError, match="prompts need tokenizer and text_encoder, which this pipeline is without"):
        generate(bare)


def test_callback_sees_and_replaces_tensors(teacher):
    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask"]
    seen = []
    plain = generate(
        teacher,
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append((step, sorted(tensors))),
        callback_on_step_end_tensor_inputs=names,
    )
    assert equal(plain, generate(teacher)) and seen == [(0, sorted(names)), (1, sorted(names))]

    def away_from_nothing(pipe, step, t, tensors):
        return {"negative_prompt_embeds": paddle.zeros_like(tensors["prompt_embeds"])}

    changed = generate(
        teacher, callback_on_step_end=away_from_nothing, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert not same(plain, changed, 1e-5)


def test_lora(either, tmp_path):
    base = generate(either)
    other = moved(SanaTransformer2DModel.from_config(dict(either.transformer.config)))
    for parameter in lora.inject(other, 4, 8, ["to_q", "to_v"], name="default"):
        parameter.set_value(0.3 * paddle.randn(parameter.shape))
    lora.save(other, tmp_path, name="default")
    either.load_lora_weights(tmp_path)
    adapted = generate(either)
    assert not same(adapted, base, 1e-4)
    assert same(generate(either, attention_kwargs={"scale": 0.0}), base)
    either.unload_lora_weights()
    assert equal(generate(either), base)


def test_tiling_and_slicing(teacher):
    small, large = (randn([2, 8, rows, 8], Generator(0)) for rows in (4, 16))
    whole = {x: teacher.decode_latents(x) for x in (small, large)}
    try:
        teacher.enable_vae_tiling(
            tile_sample_min_height=32,
            tile_sample_min_width=32,
            tile_sample_stride_height=16,
            tile_sample_stride_width=16,
        )
        assert teacher.vae.use_tiling and same(teacher.decode_latents(small), whole[small])
        tiled = teacher.decode_latents(large)
        assert tiled.shape == whole[large].shape and not same(tiled, whole[large], 1e-6)
        teacher.disable_vae_tiling()
        teacher.enable_vae_slicing()
        assert teacher.vae.use_slicing and same(teacher.decode_latents(large), whole[large])
    finally:
        teacher.disable_vae_tiling()
        teacher.disable_vae_slicing()
    assert equal(teacher.decode_latents(large), whole[large])


# ---- control ---------------------------------------------------------------------------------------------------------

EDGES = Image.fromarray(np.random.default_rng(1).integers(0, 256, [30, 30, 3], dtype=np.uint8))
EDGE_ARRAY = np.random.default_rng(2).random([16, 24, 3])


def controlled(pipe, move):
    controlnet = SanaControlNetModel.from_transformer(pipe.transformer, num_layers=2)
    return rebuilt(pipe, controlnet=moved(controlnet) if move else controlnet)


def test_a_new_controlnet_changes_nothing(either):
    pipe = controlled(either, move=False)
    base = generate(either)
    assert equal(generate(pipe), base) and equal(generate(pipe, control_image=EDGES), base)


def test_control_images(either):
    pipe = controlled(either, move=True)
    assert pipe.components["controlnet"] is pipe.controlnet
    base = generate(pipe)
    edges = generate(pipe, control_image=EDGES)
    assert not same(edges, base, 1e-4) and equal(base, generate(either))
    assert same(generate(pipe, control_image=EDGES, controlnet_conditioning_scale=0.0), base)
    assert not same(generate(pipe, control_image=EDGES, controlnet_conditioning_scale=0.5), edges, 1e-5)
    resized = np.asarray(EDGES.resize((24, 16), Image.Resampling.LANCZOS))
    assert same(generate(pipe, control_image=resized), edges)

    noise = randn([2, *SHAPE[1:]], Generator(0))
    seeds = lambda: [Generator(0), Generator(1)]  # noqa: E731
    both = generate(pipe, ["a cat"] * 2, control_image=[resized, EDGE_ARRAY], latents=noise, generator=seeds())
    one = generate(pipe, ["a cat"] * 2, control_image=resized, latents=noise, generator=seeds())
    assert same(both[:1], one[:1]) and not same(both[1:], one[1:], 1e-4)


def test_control_image_is_encoded_and_scaled(teacher, monkeypatch):
    pipe, seen = controlled(teacher, move=True), []
    forward = pipe.controlnet.forward
    monkeypatch.setattr(
        pipe.controlnet,
        "forward",
        lambda *arguments, **options: seen.append((arguments, options)) or forward(*arguments, **options),
    )
    image = paddle.tanh(randn([1, 3, 16, 24], Generator(4)))
    generate(pipe, control_image=image, num_inference_steps=1, guidance_scale=1.0)
    [(arguments, options)] = seen
    control = options["controlnet_cond"] if "controlnet_cond" in options else arguments[3]
    assert same(control, pipe.vae.encode(image).latent * 0.41407)


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
@pytest.mark.parametrize("control", [False, True])
def test_round_trip_is_exact(either, layout, control, tmp_path):
    pipe = controlled(either, move=True) if control else either
    options = dict(control_image=EDGES) if control else {}
    if control and layout == "diffusers" and isinstance(pipe, SanaSprintPipeline):
        with pytest.raises(UserError, match="diffusers has no SanaSprintPipeline with a controlnet"):
            pipe.save_pretrained(tmp_path / "out", layout=layout)
        return
    pipe.save_pretrained(tmp_path, layout=layout)
    parts = {"tokenizer", "text_encoder", "vae", "transformer", "scheduler"} | ({"controlnet"} if control else set())
    assert {path.name for path in tmp_path.iterdir()} == parts | {"model_index.json"}
    again = quiet(Pipeline.from_pretrained(tmp_path))
    assert type(again) is type(pipe) and type(again.scheduler) is type(pipe.scheduler)
    assert equal(generate(again, **options), generate(pipe, **options))


def test_diffusers_layout_names_the_pytorch_classes(sprint, tmp_path):
    sprint.save_pretrained(tmp_path, layout="diffusers")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == {
        "_class_name": "SanaSprintPipeline",
        "scheduler": ["diffusers", "SCMScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }


SCHEDULERS = {
    "DPMSolverMultistepScheduler": dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "FlowMatchEulerDiscreteScheduler": dict(shift=3.0, use_karras_sigmas=False, invert_sigmas=False),
    "SCMScheduler": dict(prediction_type="trigflow", sigma_data=0.5),
}


def hf_folder(folder, fixtures, text, pipeline, transformer, scheduler, gemma="Gemma2Model", **more):
    """A directory as diffusers writes it, around the reference models."""
    tokenizer = text["tokenizer"]
    parts = {"transformer": fixtures / transformer, "vae": fixtures / "dc_ae"}
    for name, source in (parts | more).items():
        shutil.copytree(source, folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    text["text_encoder"].save_pretrained(folder / "text_encoder", layout="diffusers")
    (folder / "scheduler").mkdir()
    config = dict(_class_name=scheduler, _diffusers_version="0.33.1", num_train_timesteps=1000)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | SCHEDULERS[scheduler]))
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.33.1",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", gemma],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    } | ({"controlnet": ["diffusers", "SanaControlNetModel"]} if "controlnet" in more else {})
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "pipeline, transformer, scheduler, gemma",
    [
        ("SanaPipeline", "sana", "DPMSolverMultistepScheduler", "Gemma2ForCausalLM"),
        ("SanaPipeline", "sana", "FlowMatchEulerDiscreteScheduler", "Gemma2Model"),
        ("SanaSprintPipeline", "sana_sprint", "SCMScheduler", "Gemma2Model"),
    ],
)
def test_opens_what_diffusers_writes(fixtures_dir, text, tmp_path, caplog, pipeline, transformer, scheduler, gemma):
    folder = hf_folder(tmp_path / "pipe", fixtures_dir, text, pipeline, transformer, scheduler, gemma)
    with caplog.at_level(logging.WARNING):
        pipe = quiet(Pipeline.from_pretrained(folder))
    assert type(pipe).__name__ == pipeline and pipe.controlnet is None
    replaced = "FlowMatchEulerDiscreteScheduler runs in its place with the same shift, 3" in caplog.text
    assert replaced == scheduler.startswith("DPM")
    if pipeline == "SanaPipeline":
        assert pipe.scheduler.config.shift == 3.0
    for steps in (1, 2, 4):
        images = [generate(pipe, num_inference_steps=steps, output_type="np") for _ in range(2)]
        assert np.array_equal(*images) and images[0].shape == (1, 16, 24, 3) and images[0].std() > 0


def test_opens_the_controlnet_pipeline_of_diffusers(fixtures_dir, teacher, text, tmp_path):
    transformer = moved(SanaTransformer2DModel(**TRANSFORMER | dict(num_attention_heads=4, attention_head_dim=8)))
    transformer.save_pretrained(tmp_path / "transformer", layout="diffusers")
    folder = hf_folder(
        tmp_path / "pipe",
        fixtures_dir,
        text,
        "SanaControlNetPipeline",
        tmp_path / "transformer",
        "FlowMatchEulerDiscreteScheduler",
        controlnet=fixtures_dir / "sana_controlnet",
    )
    pipe = quiet(Pipeline.from_pretrained(folder))
    assert type(pipe) is SanaPipeline
    assert not same(generate(pipe), generate(pipe, control_image=EDGES), 1e-5)
    pipe.save_pretrained(tmp_path / "again", layout="diffusers")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "SanaControlNetPipeline"


def test_a_solver_of_noise_models_is_refused(fixtures_dir, text, tmp_path):
    folder = hf_folder(tmp_path / "pipe", fixtures_dir, text, "SanaPipeline", "sana", "DPMSolverMultistepScheduler")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    with pytest.raises(UserError, match="is a solver of noise-prediction models"):
        SanaPipeline.from_pretrained(folder)


# ---- mistakes --------------------------------------------------------------------------------------------------------

EMBEDS, MASK = paddle.zeros([1, 12, 24]), paddle.ones([1, 12], dtype="int64")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=None), "pass either prompt or prompt_embeds$"),
        (dict(prompt_embeds=EMBEDS, prompt_attention_mask=MASK), "prompt or prompt_embeds, not both"),
        (dict(prompt_attention_mask=MASK), "prompt_embeds and prompt_attention_mask belong together"),
        (dict(prompt=None, prompt_embeds=EMBEDS), "prompt_embeds and prompt_attention_mask belong together"),
        (
            dict(prompt=None, prompt_embeds=EMBEDS[..., :5], prompt_attention_mask=MASK),
            r"prompt_embeds must have shape \[N, T, 24\] for this call, got \[1, 12, 5\]",
        ),
        (
            dict(prompt=None, prompt_embeds=EMBEDS, prompt_attention_mask=MASK[:, :5]),
            r"prompt_attention_mask must have shape \[1, 12\] for this call, got \[1, 5\]",
        ),
        (dict(prompt=[]), "prompt must be a string or a non-empty list of strings"),
        (dict(height=18), "height must be a positive multiple of 4, got 18"),
        (dict(num_inference_steps=0), "num_inference_steps must be a positive integer, got 0"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt must be a positive integer, got 0"),
        (dict(output_type="jpg"), "output_type must be one of"),
        (dict(latents=paddle.zeros([1, 4, 4, 6])), r"latents must have shape \[1, 8, 4, 6\] for this call"),
        (dict(max_sequence_length=1), "max_sequence_length must be at least 2, got 1"),
        (dict(max_sequence_length=8.0), "max_sequence_length must be an integer, got 8.0"),
        (dict(complex_human_instruction="one line"), "must be a list of lines, not one string"),
        (dict(control_image=EDGES), "control_image needs a controlnet"),
        (dict(callback_on_step_end_tensor_inputs=["control"]), "callback_on_step_end_tensor_inputs knows"),
    ],
)
def test_bad_arguments_are_one_message(either, options, message):
    with pytest.raises(UserError, match=message):
        generate(either, **{"prompt": "a cat"} | options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(negative_prompt=["a", "b"]), "got 2 negative prompts for 1 prompts: pass 1, or one a prompt"),
        (
            dict(negative_prompt="a", negative_prompt_embeds=EMBEDS, negative_prompt_attention_mask=MASK),
            "negative_prompt or negative_prompt_embeds, not both",
        ),
        (
            dict(negative_prompt_embeds=EMBEDS),
            "negative_prompt_embeds and negative_prompt_attention_mask belong together: pass all or none",
        ),
        (
            dict(prompt=["a", "b"], negative_prompt_embeds=EMBEDS, negative_prompt_attention_mask=MASK),
            "negative_prompt_embeds has 1 rows for 2 prompts",
        ),
        (
            dict(negative_prompt_embeds=EMBEDS[:, :5], negative_prompt_attention_mask=MASK[:, :5]),
            "negative_prompt_embeds has 5 tokens and the prompt 12",
        ),
    ],
)
def test_bad_negative_prompts_are_one_message(teacher, options, message):
    with pytest.raises(UserError, match=message):
        generate(teacher, **{"prompt": "a cat"} | options)


def test_bad_control_images_are_one_message(teacher):
    pipe = controlled(teacher, move=False)
    with pytest.raises(UserError, match="got 2 control images for 1 prompts: pass 1, or one a prompt"):
        generate(pipe, control_image=[EDGES, EDGES])
    with pytest.raises(UserError, match=r"control_image must have shape \[16, 24, 3\], got \[30, 30, 3\]"):
        generate(pipe, control_image=np.asarray(EDGES))


def test_parts_that_do_not_fit(teacher, sprint, text):
    with pytest.raises(UserError, match=r"this transformer embeds guidance.*use SanaSprintPipeline"):
        rebuilt(teacher, transformer=sprint.transformer)
    wide = SanaControlNetModel(**TRANSFORMER | dict(num_layers=1, in_channels=4))
    with pytest.raises(UserError, match="controlnet does not fit this transformer: in_channels is 4, expected 8"):
        rebuilt(teacher, controlnet=wide)
    deep = SanaControlNetModel(**TRANSFORMER)
    with pytest.raises(UserError, match="controlnet does not fit this transformer: it has 3 blocks, expected 1 to 2"):
        rebuilt(teacher, controlnet=deep)
    with pytest.raises(UserError, match="no vae: ask for output_type='latent'"):
        generate(rebuilt(teacher, vae=None), output_type="np")
    with pytest.raises(UserError, match="no vae, which turns images into latents"):
        rebuilt(teacher, vae=None).enable_vae_tiling()
