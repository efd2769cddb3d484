"""Adapters against recorded outputs of the reference models."""

import numpy as np
import paddle
import pytest

from fast_diffusers import models
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.denoisers.packing import unpack


def tensors(io, **names):
    return Cond({ours: paddle.to_tensor(io[f"in_{theirs}"]) for ours, theirs in names.items()})


def unpacked(io, rows, columns):
    """The latents that were given and the velocity that was returned, from tokens."""
    return (unpack(paddle.to_tensor(io[name]), rows, columns).numpy() for name in ("in_hidden_states", "out_sample"))


def flux(io):
    rows, columns = (io["in_img_ids"][-1, 1:] + 1).astype(int).tolist()
    x, out = unpacked(io, rows, columns)
    cond = tensors(io, prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="pooled_projections")
    return x, io["in_timestep"], cond, io["in_guidance"], out


def sana(io):
    cond = tensors(io, prompt_embeds="encoder_hidden_states", prompt_attention_mask="encoder_attention_mask")
    return io["in_hidden_states"], io["in_timestep"] / 1000, cond, None, io["out_sample"]


def sana_sprint(io):
    x, t, cond, _, out = sana(io)
    return x, 1000 * t, cond, io["in_guidance"] / 0.1, out


def sd3(io):
    cond = tensors(io, prompt_embeds="encoder_hidden_states", pooled_prompt_embeds="pooled_projections")
    return io["in_hidden_states"], io["in_timestep"] / 1000, cond, None, io["out_sample"]


def qwen_image(io):
    _, rows, columns = io["in_img_shapes"][0].tolist()
    x, out = unpacked(io, rows, columns)
    cond = tensors(io, prompt_embeds="encoder_hidden_states", prompt_embeds_mask="encoder_hidden_states_mask")
    return x, io["in_timestep"], cond, None, out


def z_image(io):
    captions = [io["in_cap_0"], io["in_cap_1"]]
    longest = max(map(len, captions))
    padded = [np.pad(each, [(0, longest - len(each)), (0, 0)], constant_values=9.0) for each in captions]
    mask = [[int(i < len(each)) for i in range(longest)] for each in captions]
    cond = Cond(prompt_embeds=paddle.to_tensor(np.stack(padded)), prompt_embeds_mask=paddle.to_tensor(mask))
    return io["in_x"][:, :, 0], 1 - io["in_t"], cond, None, -io["out_sample"][:, :, 0]


REFERENCES = {
    "flux": ("FluxTransformer2DModel", flux),
    "sana": ("SanaTransformer2DModel", sana),
    "sana_sprint": ("SanaTransformer2DModel", sana_sprint),
    "sd3": ("SD3Transformer2DModel", sd3),
    "sd35": ("SD3Transformer2DModel", sd3),
    "qwen_image": ("QwenImageTransformer2DModel", qwen_image),
    "z_image": ("ZImageTransformer2DModel", z_image),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_reproduces_the_reference_outputs(fixtures_dir, name):
    model, read = REFERENCES[name]
    x, t, cond, guidance, expected = read(np.load(fixtures_dir / name / "io.npz"))
    denoiser = denoiser_for(getattr(models, model).from_pretrained(fixtures_dir / name))
    guidance = None if guidance is None else paddle.to_tensor(guidance)
    velocity = denoiser(paddle.to_tensor(x), paddle.to_tensor(t), cond, guidance=guidance)
    assert np.abs(velocity.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
