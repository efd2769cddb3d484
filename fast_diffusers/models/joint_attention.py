"""Attention between an image and a text stream that have weights of their own (MM-DiT, Esser et al. 2024, §4)."""

from collections.abc import Mapping, Sequence

import paddle
from paddle import nn

from fast_diffusers.models.layers import RMSNorm, Rope, apply_rope, attend, split_heads

MASKED = -30000.0  # what is added to the scores of a masked token: exp of it is zero, and every dtype has it
QKV = tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]


class JointAttention(nn.Layer):
    """Image and text attend to the sequence of both.

    Args:
        qk_norm: RMS-normalise queries and keys of both streams.
        text_output: project the text's result too; the last block of a model may drop it.
    """

    def __init__(self, channels: int, num_heads: int, qk_norm: bool = True, text_output: bool = True):
        super().__init__()
        self.num_heads, self.qk_norm, self.text_output = num_heads, qk_norm, text_output
        if qk_norm:
            self.norm_q = RMSNorm(channels // num_heads)
            self.norm_k = RMSNorm(channels // num_heads)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        if qk_norm:
            self.norm_added_q = RMSNorm(channels // num_heads)
            self.norm_added_k = RMSNorm(channels // num_heads)
        self.add_q_proj = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(channels, channels)
        self.add_v_proj = nn.Linear(channels, channels)
        self.to_out = nn.LayerList([nn.Linear(channels, channels)])
        if text_output:
            self.to_add_out = nn.Linear(channels, channels)

    def forward(
        self,
        image: paddle.Tensor,
        text: paddle.Tensor,
        rope: Rope | None = None,
        bias: paddle.Tensor | None = None,
    ) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """Image [B, L, C] and text [B, T, C] -> (image, text or, without `text_output`, None).

        `rope` holds the tables, and `bias` [B, 1, 1, T + L] what is added to the scores, of the sequence [text; image].
        """
        streams = list(zip(self._text_qkv(text), self._image_qkv(image)))  # noqa: B905  (to_static knows no `strict`)
        query, key, value = (paddle.concat(pair, axis=1) for pair in streams)
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        out = attend(query, key, value, bias)
        length = text.shape[1]
        text_out = self.to_add_out(out[:, :length]) if self.text_output else None
        return self.to_out[0](out[:, length:]), text_out

    def _image_qkv(self, x: paddle.Tensor) -> QKV:
        query, key, value = _heads(x, (self.to_q, self.to_k, self.to_v), self.num_heads)
        return (self.norm_q(query), self.norm_k(key), value) if self.qk_norm else (query, key, value)

    def _text_qkv(self, x: paddle.Tensor) -> QKV:
        query, key, value = _heads(x, (self.add_q_proj, self.add_k_proj, self.add_v_proj), self.num_heads)
        return (self.norm_added_q(query), self.norm_added_k(key), value) if self.qk_norm else (query, key, value)


def refuse_attention_kwargs(name: str, kwargs: Mapping | None) -> None:
    """ValueError for a model's dictionary of attention arguments, unless it is empty."""
    if kwargs:
        raise ValueError(
            f"{name} {sorted(kwargs)} are not supported; "
            "scale an adapter with fast_diffusers.lora.active(model, name, scale)"
        )


def _heads(x: paddle.Tensor, projections: Sequence[nn.Layer], num_heads: int) -> list[paddle.Tensor]:
    return [split_heads(project(x), num_heads) for project in projections]
