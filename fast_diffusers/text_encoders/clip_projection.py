"""The CLIP text encoders of Stable Diffusion 3: with the projection into the space shared with images."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from paddle import Tensor, nn
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.models.checkpoint_io import Checkpoint
from fast_diffusers.text_encoders.clip import CLIPTextModel

PROJECTION = "text_projection.weight"


class CLIPProjectionOutput(NamedTuple):
    """`text_embeds` [B, P], the projected row of the end token; `last_hidden_state` [B, L, D] after the final norm;
    `hidden_states`, what each layer gives, before that norm."""

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP text encoder with projection; arguments are the keys of its config.json, defaults those of CLIP-L/14."""

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
        pad_token_id: int = 1,
        projection_dim: int = 768,
    ):
        super().__init__(
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            max_position_embeddings,
            hidden_act,
            layer_norm_eps,
            bos_token_id,
            eos_token_id,
            pad_token_id,
        )
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias_attr=False)

    @classmethod
    def _adapt_checkpoint(cls, checkpoint: Checkpoint) -> Checkpoint:
        """See `CLIPTextModel`; the projection has no prefix in any version."""
        tensors = dict(checkpoint.tensors)
        projection = {PROJECTION: tensors.pop(PROJECTION)} if PROJECTION in tensors else {}
        adapted = super()._adapt_checkpoint(replace(checkpoint, tensors=tensors))
        return replace(adapted, tensors={**adapted.tensors, **projection})

    def forward(self, input_ids: Tensor) -> CLIPProjectionOutput:
        """Encode token ids, int64 [B, L] with L up to `max_position_embeddings`."""
        states: list[Tensor] = []
        hooks = [
            layer.register_forward_post_hook(lambda layer, inputs, output: states.append(output))
            for layer in self.text_model.encoder.layers
        ]
        try:
            last, pooled = super().forward(input_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return CLIPProjectionOutput(self.text_projection(pooled), last, tuple(states))
