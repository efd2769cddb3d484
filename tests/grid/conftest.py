"""Tiny random models of every family, each with all the parts that the objectives ask for.

The suites of this folder are the source of docs/support.md, see docs/make_support.py: a test marked
`support(group, argument)` fills the cells of the rows that its argument goes through, and skips leave their reason.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
import pytest
from paddle import nn
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as PPDiffusersSD3

from distill.config import LoraConfig
from distill.discriminators import LaddDiscriminator, PatchDiscriminator
from distill.roles import AdapterRole, Network, Roles, adapter_network
from fast_diffusers import lora, models
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.random import Generator, randn

TARGETS = ("to_q", "to_v", "to_out.0")
SIZES = dict(attention_head_dim=8, num_attention_heads=2)
TEXT = dict(prompt_embeds=[2, 5, 6])
POOLED = TEXT | dict(pooled_prompt_embeds=[2, 4])
MASK = [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]

FLUX = dict(
    in_channels=12,
    num_layers=1,
    num_single_layers=1,
    joint_attention_dim=6,
    pooled_projection_dim=4,
    axes_dims_rope=(2, 2, 4),
    guidance_embeds=True,
    **SIZES,
)
SD3 = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=2,
    joint_attention_dim=6,
    caption_projection_dim=16,
    pooled_projection_dim=4,
    pos_embed_max_size=6,
    **SIZES,
)
SANA = dict(
    in_channels=3,
    out_channels=3,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=4,
    cross_attention_dim=16,
    caption_channels=6,
    **SIZES,
)
QWEN_IMAGE = dict(
    in_channels=12, out_channels=3, num_layers=2, joint_attention_dim=6, axes_dims_rope=(2, 2, 4), **SIZES
)
Z_IMAGE = dict(
    in_channels=3,
    dim=16,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=6,
    axes_dims=(2, 2, 4),
    axes_lens=(64, 16, 16),
)


class Parts:
    """A model as the teacher, two adapters of it as the student and the fake score, heads, and a batch of two."""

    def __init__(self, build: Callable[[], nn.Layer], text: dict[str, list[int]], mask: str | None):
        paddle.seed(0)
        self.transformer, config = build(), LoraConfig(rank=2, alpha=2.0, targets=TARGETS)
        denoiser = denoiser_for(self.transformer)
        lora.freeze(self.transformer)
        self.student: Network = adapter_network(denoiser, self.transformer, "student", config, "auxiliary", 0)
        lora.inject(self.transformer, config.rank, config.alpha, TARGETS, name="fake", seed=1)
        heads = {"patch": PatchDiscriminator, "ladd": LaddDiscriminator}
        self.heads = {name: new(denoiser.feature_channels, denoiser.num_taps) for name, new in heads.items()}
        with paddle.no_grad():  # fresh models predict zero, and fresh adapters change nothing
            self.student_weights = dict(self.student.parameters)
            for seed, weight in enumerate([*self.transformer.parameters(), *self.student_weights.values()]):
                weight.set_value(weight + 0.1 * randn(weight.shape, Generator(seed)))
        self.transformer.eval()
        self.teacher, self.fake = (AdapterRole(denoiser, self.transformer, name) for name in (None, "fake"))
        self.embeds_guidance = denoiser.embeds_guidance
        self.latents = randn([2, 3, 4, 6], Generator(100))
        conditions = [
            {name: randn(shape, Generator(seed + i)) for i, (name, shape) in enumerate(text.items())}
            | ({mask: paddle.to_tensor(MASK)} if mask else {})
            for seed in (101, 201)
        ]
        self.cond, self.null_cond = map(Cond, conditions)

    @property
    def guidance(self) -> paddle.Tensor | None:
        return paddle.to_tensor([3.5, 2.0]) if self.embeds_guidance else None

    @property
    def batch(self) -> dict[str, Any]:
        return dict(latents=self.latents, cond=self.cond, null_cond=self.null_cond, guidance=self.guidance)

    def roles(self, heads: str | None = None) -> Roles:
        """The student is its own reference."""
        student = self.student.role
        return Roles(student, self.teacher, student, self.fake, self.heads.get(heads))

    def weights(self, player: str) -> dict[str, paddle.Tensor]:
        """What a player trains."""
        if player == "student":
            return self.student_weights
        if player == "fake":
            return lora.state_dict(self.transformer, "fake")
        return dict(self.heads[player].named_parameters())

    @property
    def all_weights(self) -> list[paddle.Tensor]:
        """Frozen or not, of everybody; a layer outside the model is the student's target-time embedding."""
        heads = [weight for each in self.heads.values() for weight in each.parameters()]
        return [*self.transformer.parameters(), *self.student_weights.values(), *heads]

    def velocity(self, x: paddle.Tensor, t: paddle.Tensor, target_t: paddle.Tensor) -> paddle.Tensor:
        """The student's, as a sampler asks for it."""
        return self.student.role(x, t, self.cond, target_t=target_t, guidance=self.guidance)


@dataclass(frozen=True)
class Family:
    """How to build a model, the conditioning it reads, the name of the mask in that, and which layers get adapters."""

    build: Callable[[], nn.Layer]
    text: dict[str, list[int]]
    mask: str | None = None

    @functools.cached_property
    def parts(self) -> Parts:
        return Parts(self.build, self.text, self.mask)


FAMILIES = {
    "flux": Family(lambda: models.FluxTransformer2DModel(**FLUX), POOLED),
    "sd3": Family(lambda: models.SD3Transformer2DModel(**SD3, dual_attention_layers=(0,), qk_norm="rms_norm"), POOLED),
    "ppdiffusers_sd3": Family(lambda: PPDiffusersSD3(**SD3), POOLED),
    "sana": Family(lambda: models.SanaTransformer2DModel(**SANA), TEXT, "prompt_attention_mask"),
    "sana_sprint": Family(
        lambda: models.SanaTransformer2DModel(**SANA, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        TEXT,
        "prompt_attention_mask",
    ),
    "qwen_image": Family(lambda: models.QwenImageTransformer2DModel(**QWEN_IMAGE), TEXT, "prompt_embeds_mask"),
    "z_image": Family(lambda: models.ZImageTransformer2DModel(**Z_IMAGE), TEXT, "prompt_embeds_mask"),
}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> Parts:
    """Shared by all tests, which leave it as it was."""
    return FAMILIES[request.param].parts
