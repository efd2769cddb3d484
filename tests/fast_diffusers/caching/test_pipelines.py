"""Runs of pipelines: a run starts fresh at each call, knows its steps, and is over however the call ends."""

import numpy as np
import paddle
import pytest
from ppdiffusers import StableDiffusion3Pipeline
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel
from ppdiffusers.schedulers import FlowMatchEulerDiscreteScheduler as PPDiffusersScheduler

from fast_diffusers.caching import FirstBlockTaylor, TeaCache, TGate, cache_stats, disable_cache, enable_cache
from fast_diffusers.caching.engine import _cache_of
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import FluxLabelPipeline

EAGER = FirstBlockTaylor(threshold=100, first_enhance=1)  # reuses all steps but the first and the last


@pytest.fixture
def digits(tiny_teacher):
    pipe = FluxLabelPipeline.from_pretrained(tiny_teacher)
    pipe.set_progress_bar_config(disable=True)
    return (
        lambda **options: (
            pipe(
                **{"prompt": ["1", "2"], "num_inference_steps": 5, "output_type": "latent", **options},
                latents=latents([len(options.get("prompt", "12")), 1, 8, 8]),
            ).images
        ),
        pipe,
    )


@pytest.fixture
def sd3():
    paddle.seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=7,
        pos_embed_max_size=4,
    )
    with paddle.no_grad():
        for weight in transformer.parameters():
            weight.set_value(weight + 0.1 * paddle.randn(weight.shape))
    transformer.eval()
    names = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae"]
    pipe = StableDiffusion3Pipeline(transformer, PPDiffusersScheduler(), **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)
    text, pooled = latents([1, 5, 6]), latents([1, 7])
    embeds = dict(
        prompt_embeds=text,
        negative_prompt_embeds=-text,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=-pooled,
    )

    def generate(**options):
        given = dict(height=32, width=32, num_inference_steps=5, guidance_scale=3.0, output_type="latent", **embeds)
        return pipe(**{**given, "latents": latents([1, 4, 4, 4]), **options}).images

    return generate, pipe


def latents(shape):
    return paddle.to_tensor(np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32"))


@pytest.fixture(params=["digits", "sd3"])
def pipeline(request):
    """(function that generates latents, the pipeline)."""
    return request.getfixturevalue(request.param)


def test_steps_of_a_run_are_known(pipeline):
    generate, pipe = pipeline
    enable_cache(pipe, EAGER)
    for steps in (5, 2, 1, 4):
        generate(num_inference_steps=steps)
        record = cache_stats(pipe).last_run
        assert [step.reused > 0 for step in record] == [0 < step < steps - 1 for step in range(steps)]
    assert cache_stats(pipe).runs == 4


def test_each_call_starts_fresh(pipeline):
    generate, pipe = pipeline
    baseline = generate().numpy()
    enable_cache(pipe, EAGER)
    first = generate().numpy()
    assert not np.array_equal(first, baseline)

    def fail(pipe, step, t, tensors):
        if step == 3:
            raise RuntimeError("stopped")
        return {}

    with pytest.raises(RuntimeError, match="stopped"):
        generate(callback_on_step_end=fail)
    assert _cache_of(pipe.transformer).runs.current is None
    assert np.array_equal(generate(), first)
    generate(num_inference_steps=2)
    assert np.array_equal(generate(), first)
    disable_cache(pipe)
    assert np.array_equal(generate(), baseline)
    assert "progress_bar" not in vars(pipe)


def test_an_interrupt_ends_a_run(sd3):
    generate, pipe = sd3
    enable_cache(pipe, EAGER)
    first = generate().numpy()

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step >= 1
        return {}

    generate(callback_on_step_end=interrupt)
    assert [record.step for record in cache_stats(pipe).last_run] == [0, 1]
    assert np.array_equal(generate(), first)


def test_another_batch_size_in_the_middle_of_a_run_starts_anew(sd3):
    """Guidance that is switched off on the way halves the batch: what was kept does not fit."""
    generate, pipe = sd3
    enable_cache(pipe, EAGER)

    def unguided(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 1.0
            pipe.latest = tensors["latents"]
            return {"prompt_embeds": latents([1, 5, 6])}
        return {}

    pipe.transformer.register_forward_pre_hook(
        lambda layer, args, kwargs: (
            args,
            {**kwargs, "pooled_projections": kwargs["pooled_projections"][: kwargs["hidden_states"].shape[0]]},
        ),
        with_kwargs=True,
    )
    generate(callback_on_step_end=unguided)
    assert [step.reused > 0 for step in cache_stats(pipe).last_run] == [False, True, False, True, False]


def test_a_cache_of_the_transformer_alone_guesses_the_runs_of_its_pipeline(pipeline):
    generate, pipe = pipeline
    enable_cache(pipe.transformer, EAGER)
    first = generate().numpy()
    assert np.array_equal(generate(), first)
    assert cache_stats(pipe).runs == 2
    disable_cache(pipe)


def test_tgate_drops_the_negative_half_of_a_guided_run(sd3):
    """From the gate on the result is that of no guidance at all; before it, guidance is what it was."""
    generate, pipe = sd3
    enable_cache(pipe, TGate(gate=2, sp_interval=1, negative_pass="first_half"))
    gated = generate().numpy()
    assert cache_stats(pipe).compute_fraction == pytest.approx((2 + 3 * 0.5) / 5)
    disable_cache(pipe)
    guided = generate().numpy()

    def stop_guiding(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = 1 + 1e-7  # as good as none, with both passes
        return {}

    np.testing.assert_allclose(gated, generate(callback_on_step_end=stop_guiding), rtol=1e-4, atol=1e-5)
    assert not np.allclose(gated, guided, rtol=1e-3)


def test_a_pipeline_keeps_its_cache_when_its_transformer_is_exchanged(digits, tiny_teacher):
    generate, pipe = digits
    before = pipe.transformer
    enable_cache(pipe, TeaCache())
    pipe.transformer = FluxLabelPipeline.from_pretrained(tiny_teacher).transformer
    generate()
    disable_cache(pipe)
    assert not any("forward" in vars(layer) for layer in before.sublayers(include_self=True))


def test_enabling_twice_after_an_exchange(digits, tiny_teacher):
    _, pipe = digits
    enable_cache(pipe, TeaCache())
    pipe.transformer = FluxLabelPipeline.from_pretrained(tiny_teacher).transformer
    with pytest.raises(UserError, match=r"TeaCache is enabled on this FluxLabelPipeline already"):
        enable_cache(pipe, TeaCache())
