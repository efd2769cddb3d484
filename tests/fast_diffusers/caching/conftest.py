"""Tiny random models of every family, a loop that denoises with any of them, and settings of every method."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import paddle
import pytest
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as PPDiffusersSD3

from fast_diffusers import models
from fast_diffusers.caching import (
    BlockDance,
    CacheConfig,
    CGTaylor,
    FirstBlockTaylor,
    PyramidAttentionBroadcast,
    SortBlock,
    TaylorSeer,
    TeaBlockCache,
    TeaCache,
    TGate,
    denoising_run,
)


@dataclass(frozen=True)
class FamilyCase:
    """How to build a model, its conditioning(batch), the latents of a sample, and time 1..0 as it takes it."""

    build: Callable
    conditioning: Callable
    latents: tuple[int, ...]
    time: Callable[[float], float]
    listed: bool = False  # samples come as a list

    @functools.cached_property
    def model(self):
        """In evaluation mode, with no weight zero."""
        paddle.seed(0)
        model = self.build()
        with paddle.no_grad():
            for weight in model.parameters():
                weight.set_value(weight + 0.1 * paddle.randn(weight.shape))
        model.eval()
        return model

    def velocity(self, x, level, cond, model=None):
        """Any function of latents [B, ...], time 1..0 and conditioning that the model makes."""
        model = model or self.model
        t = paddle.full([x.shape[0]], self.time(level))
        if self.listed:
            return -paddle.stack(model(list(x.unbind(0)), t, **cond)[0])
        return model(hidden_states=x, timestep=t, **cond, return_dict=False)[0]


SIZES = dict(attention_head_dim=8, num_attention_heads=2)


def flux():
    return models.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
        **SIZES,
    )


def flux_cond(batch):
    rows, columns = paddle.meshgrid(paddle.arange(2), paddle.arange(3))
    ids = paddle.stack([paddle.zeros_like(rows), rows, columns], axis=-1).reshape([6, 3])
    return dict(
        encoder_hidden_states=paddle.randn([batch, 3, 6]),
        pooled_projections=paddle.randn([batch, 5]),
        img_ids=ids.astype("float32"),
        txt_ids=paddle.zeros([3, 3]),
    )


SD3 = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=3,
    joint_attention_dim=6,
    caption_projection_dim=16,
    pooled_projection_dim=7,
    pos_embed_max_size=4,
    **SIZES,
)


def sd3_cond(batch):
    return dict(encoder_hidden_states=paddle.randn([batch, 5, 6]), pooled_projections=paddle.randn([batch, 7]))


def sana():
    return models.SanaTransformer2DModel(
        in_channels=3,
        out_channels=3,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=4,
        cross_attention_dim=16,
        caption_channels=6,
        **SIZES,
    )


def sana_cond(batch):
    mask = paddle.ones([batch, 5])
    mask[:, 4:] = 0
    return dict(encoder_hidden_states=paddle.randn([batch, 5, 6]), encoder_attention_mask=mask)


def qwen_image():
    return models.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=3, joint_attention_dim=6, axes_dims_rope=(2, 2, 4), **SIZES
    )


def qwen_image_cond(batch):
    return dict(
        encoder_hidden_states=paddle.randn([batch, 4, 6]),
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, 2, 3)]] * batch,
    )


def z_image():
    return models.ZImageTransformer2DModel(
        in_channels=3,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=6,
        axes_dims=(2, 2, 4),
        axes_lens=(128, 8, 8),
    )


def z_image_cond(batch):
    return dict(cap_feats=[paddle.randn([4, 6]) for _ in range(batch)])


FAMILY_CASES = {
    "flux": FamilyCase(flux, flux_cond, (6, 4), lambda t: t),
    "sd3": FamilyCase(
        lambda: models.SD3Transformer2DModel(**SD3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        sd3_cond,
        (3, 4, 6),
        lambda t: 1000 * t,
    ),
    "ppdiffusers_sd3": FamilyCase(lambda: PPDiffusersSD3(**SD3), sd3_cond, (3, 4, 6), lambda t: 1000 * t),
    "sana": FamilyCase(sana, sana_cond, (3, 4, 6), lambda t: 1000 * t),
    "qwen_image": FamilyCase(qwen_image, qwen_image_cond, (6, 4), lambda t: t),
    "z_image": FamilyCase(z_image, z_image_cond, (3, 1, 4, 4), lambda t: 1 - t, listed=True),
}


@pytest.fixture(params=FAMILY_CASES)
def family(request):
    """A family by its name."""
    return FAMILY_CASES[request.param]


@pytest.fixture
def sample():
    """The function `euler`."""
    return euler


@paddle.no_grad()
def euler(family, steps=5, batch=2, seed=0, start=1.0, stop_at=None, declared=True):
    """Euler steps from noise to an image; an exception comes in the place of step `stop_at`."""
    paddle.seed(seed)
    x, cond = paddle.randn([batch, *family.latents]), family.conditioning(batch)
    levels = [start * (steps - i) / steps for i in range(steps + 1)]

    def run(x):
        for i in range(steps):
            if i == stop_at:
                raise KeyboardInterrupt
            x = x + (levels[i + 1] - levels[i]) * family.velocity(x, levels[i], cond)
        return x

    if not declared:
        return run(x)
    with denoising_run(family.model, steps):
        return run(x)


# ------------------------------------------------------------------------------------------------------------ methods
RAW = (1.0, 0.0)
WHOLE = dict(start=1000, end=0)

# Settings that never reuse.
NEUTRAL = {
    "TeaCache": TeaCache(threshold=0),
    "TeaBlockCache": TeaBlockCache(threshold=0),
    "TeaBlockCache with Taylor": TeaBlockCache(threshold=0, taylor_order=1, first_enhance=1),
    "SortBlock": SortBlock(interval=1),
    "FirstBlockTaylor": FirstBlockTaylor(threshold=0),
    "TaylorSeer": TaylorSeer(interval=1),
    "CGTaylor": CGTaylor(threshold=0),
    "BlockDance": BlockDance(period=1),
    "PyramidAttentionBroadcast": PyramidAttentionBroadcast(spatial_range=1, cross_range=1),
    "TGate": TGate(gate=1000, sp_interval=1),
}
# Settings that reuse something in five steps of any tiny model.
ACTIVE = {
    "TeaCache": TeaCache(threshold=3, coefficients=RAW),
    "TeaBlockCache": TeaBlockCache(threshold=3, coefficients=RAW, cache_start=1),
    "TeaBlockCache with Taylor": TeaBlockCache(threshold=3, coefficients=RAW, taylor_order=1, first_enhance=2),
    "SortBlock": SortBlock(interval=3, **WHOLE),
    "FirstBlockTaylor": FirstBlockTaylor(threshold=10, first_enhance=2),
    "TaylorSeer": TaylorSeer(interval=2, max_order=2, first_enhance=2),
    "CGTaylor": CGTaylor(threshold=10),
    "BlockDance": BlockDance(period=2, depth=0.5, **WHOLE),
    "PyramidAttentionBroadcast": PyramidAttentionBroadcast(**WHOLE),
    "TGate": TGate(gate=3, warm_up=1, sp_interval=3, fi_interval=2),
}


@dataclass(frozen=True)
class MethodCase:
    """Settings of a method."""

    neutral: CacheConfig
    active: CacheConfig


@pytest.fixture(params=ACTIVE)
def method(request):
    return MethodCase(NEUTRAL[request.param], ACTIVE[request.param])
