"""Tiny models of all families, in which no weight is zero (fresh models predict zero), and what goes into them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
import pytest

from fast_diffusers import models
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import TransformerDenoiser, denoiser_for
from fast_diffusers.denoisers.packing import pack
from fast_diffusers.random import Generator, randn

MASK = paddle.to_tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
GUIDANCE = paddle.to_tensor([4.5, 2.0])


def _call_flux(model, x, t, cond, guidance):
    rows, columns = paddle.meshgrid(paddle.arange(x.shape[2] // 2), paddle.arange(x.shape[3] // 2))
    ids = paddle.stack([paddle.zeros_like(rows), rows, columns], axis=-1).reshape([-1, 3]).astype("float32")
    return model(
        hidden_states=pack(x),
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        timestep=t,
        img_ids=ids,
        txt_ids=paddle.zeros([5, 3]),
        guidance=guidance,
    ).sample


def _call_sana(model, x, t, cond, guidance):
    return model(
        hidden_states=x,
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_attention_mask=cond["prompt_attention_mask"],
        timestep=t if guidance is not None else 1000 * t,
        guidance=None if guidance is None else 0.1 * guidance,
    ).sample


def _call_sd3(model, x, t, cond, guidance):
    return model(
        hidden_states=x,
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        timestep=1000 * t,
    ).sample


def _call_qwen_image(model, x, t, cond, guidance):
    return model(
        hidden_states=pack(x),
        encoder_hidden_states=cond["prompt_embeds"],
        encoder_hidden_states_mask=cond["prompt_embeds_mask"],
        timestep=t,
        img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * x.shape[0],
    ).sample


def _call_z_image(model, x, t, cond, guidance):
    lengths = cond["prompt_embeds_mask"].sum(axis=1).tolist()
    captions = [features[:length] for features, length in zip(cond["prompt_embeds"], lengths, strict=True)]
    return -paddle.stack(model(list(x.unsqueeze(2)), 1 - t, captions).sample).squeeze(2)


@dataclass(frozen=True)
class Family:
    """A tiny model, and how it is called without an adapter: raw(model, x, t, cond, guidance)."""

    model: str
    config: dict[str, Any]
    raw: Callable[..., paddle.Tensor]
    shape: tuple[int, ...]
    text: dict[str, list[int]]
    taps: int
    width: int
    packs: bool = False
    mask: str | None = None

    @property
    def embeds_guidance(self) -> bool:
        return self.config.get("guidance_embeds", False)

    @property
    def guidance(self) -> paddle.Tensor | None:
        """Something to pass to the adapter."""
        return GUIDANCE if self.embeds_guidance else None

    @property
    def time_change(self) -> float:
        """A change that turns the fastest embedded angle by about ten: only SANA-Sprint sees the time itself."""
        return 10.0 if self.model.startswith("Sana") and self.embeds_guidance else 1e-2

    @property
    def grid(self) -> list[int]:
        """Rows and columns of a feature map."""
        size = 1 if self.model.startswith("Sana") else 2
        return [self.shape[2] // size, self.shape[3] // size]

    def build(self, dtype: str = "float32", **changes: Any) -> TransformerDenoiser:
        paddle.seed(0)
        model = getattr(models, self.model)(**{**self.config, **changes})
        with paddle.no_grad():
            for seed, weight in enumerate(model.parameters()):
                weight.set_value(weight + 0.2 * randn(weight.shape, Generator(seed)))
        model.to(dtype=dtype)
        return denoiser_for(model)

    def cond(self, dtype: str = "float32") -> Cond:
        made = {name: randn(shape, Generator(100 + i), dtype) for i, (name, shape) in enumerate(self.text.items())}
        return Cond(made | ({self.mask: MASK} if self.mask else {}))

    def x(self, dtype: str = "float32") -> paddle.Tensor:
        return randn(self.shape, Generator(200), dtype)

    def tokens(self, x: paddle.Tensor) -> paddle.Tensor:
        """Latents as the raw model takes and gives them."""
        return pack(x) if self.packs else x


SANA = dict(
    in_channels=3,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    num_cross_attention_heads=4,
    cross_attention_head_dim=4,
    cross_attention_dim=16,
    caption_channels=6,
)
FAMILIES = {
    "flux": Family(
        "FluxTransformer2DModel",
        dict(
            in_channels=12,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=6,
            pooled_projection_dim=4,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        _call_flux,
        shape=(2, 3, 6, 4),
        text={"prompt_embeds": [2, 5, 6], "pooled_prompt_embeds": [2, 4]},
        taps=3,
        width=16,
        packs=True,
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        SANA,
        _call_sana,
        shape=(2, 3, 4, 6),
        text={"prompt_embeds": [2, 5, 6]},
        taps=3,
        width=16,
        mask="prompt_attention_mask",
    ),
    "sana_sprint": Family(
        "SanaTransformer2DModel",
        SANA | dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        _call_sana,
        shape=(2, 3, 4, 6),
        text={"prompt_embeds": [2, 5, 6]},
        taps=3,
        width=16,
        mask="prompt_attention_mask",
    ),
    "sd35": Family(
        "SD3Transformer2DModel",
        dict(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=6,
            caption_projection_dim=16,
            pooled_projection_dim=4,
            pos_embed_max_size=6,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        _call_sd3,
        shape=(2, 3, 6, 4),
        text={"prompt_embeds": [2, 5, 6], "pooled_prompt_embeds": [2, 4]},
        taps=2,
        width=16,
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        dict(
            in_channels=12,
            out_channels=3,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=6,
            axes_dims_rope=(2, 2, 4),
        ),
        _call_qwen_image,
        shape=(2, 3, 6, 4),
        text={"prompt_embeds": [2, 5, 6]},
        taps=2,
        width=16,
        packs=True,
        mask="prompt_embeds_mask",
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        dict(
            in_channels=3,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=6,
            axes_dims=(2, 2, 4),
            axes_lens=(64, 16, 16),
        ),
        _call_z_image,
        shape=(2, 3, 6, 4),
        text={"prompt_embeds": [2, 5, 6]},
        taps=2,
        width=16,
        mask="prompt_embeds_mask",
    ),
}


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def denoiser(family) -> TransformerDenoiser:
    return family.build()


@pytest.fixture(scope="module")
def double(family) -> TransformerDenoiser:
    return family.build("float64")
