"""The text model of Gemma 2 (Gemma Team 2024, arXiv 2408.00118), the text encoder of SANA."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.errors import UserError
from fast_diffusers.models.layers import RMSNorm, Rope, at_least_float32
from fast_diffusers.text_encoders.decoder import (
    Architecture,
    DecoderLayer,
    QueryBlock,
    TextDecoder,
    layer_windows,
)


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight) over the last axis, all in float32."""

    def __init__(self, size: int, epsilon: float = 1e-6):
        super().__init__(size, epsilon, initial=0.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        wide = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * (1 + self.weight.astype(wide.dtype))).astype(x.dtype)


class Gemma2DecoderLayer(DecoderLayer):
    """Norms before and after both branches (§2)."""

    def __init__(self, arch: Architecture):
        super().__init__(arch)
        self.pre_feedforward_layernorm = arch.norm(arch.hidden_size, arch.epsilon)
        self.post_feedforward_layernorm = arch.norm(arch.hidden_size, arch.epsilon)

    def forward(self, x: Tensor, rope: Rope, blocks: Sequence[QueryBlock]) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, blocks))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2Model(TextDecoder):
    """Gemma 2; arguments are the keys of its config.json, defaults those of gemma-2-2b-it.

    Every other layer, the first included, attends to `sliding_window` tokens unless `layer_types` says otherwise.
    """

    model_type = "gemma2"
    config_types = ("gemma2",)

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 256000,
        hidden_size: int = 2304,
        intermediate_size: int = 9216,
        num_hidden_layers: int = 26,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int = 256,
        hidden_activation: str = "gelu_pytorch_tanh",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        query_pre_attn_scalar: float = 256,
        attn_logit_softcapping: float | None = 50.0,
        sliding_window: int = 4096,
        layer_types: Sequence[str] | None = None,
    ):
        super().__init__()
        if paddle.get_default_dtype() == "float16":
            raise UserError("Gemma 2 leaves the range of float16: load the text encoder in bfloat16 or float32")
        kinds = layer_types or [("sliding_attention", "full_attention")[i % 2] for i in range(num_hidden_layers)]
        self._assemble(
            Architecture(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads,
                head_dim=head_dim,
                windows=layer_windows(kinds, num_hidden_layers, sliding_window),
                activation=hidden_activation,
                epsilon=rms_norm_eps,
                rope_theta=rope_theta,
                attention_scale=query_pre_attn_scalar**-0.5,
                logit_cap=attn_logit_softcapping,
                embedding_scale=hidden_size**0.5,
                norm=OffsetRMSNorm,
                layer=Gemma2DecoderLayer,
            )
        )
