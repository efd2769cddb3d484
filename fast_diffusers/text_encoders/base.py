"""What the text encoders share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.layers import split_heads


class TextEncoder(PretrainedModel):
    """A model that `transformers` stores: config.json and model.safetensors, sharded or not; inference only.

    The arguments of a subclass are the keys of its config.json that say what it computes; other keys are dropped.
    """

    model_type: ClassVar[str]
    weight_stems = MappingProxyType({"paddle": "model", "diffusers": "model"})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make a model, its weights at random, from the content of a config.json."""
        known = inspect.signature(cls.__init__).parameters
        return super().from_config({key: value for key, value in config.items() if key in known})

    def to_json_string(self, to_diffusers: bool = False) -> str:
        """The content of config.json, with the keys by which `transformers` finds the class."""
        config = json.loads(super().to_json_string(to_diffusers=to_diffusers))
        config |= {"architectures": [type(self).__name__], "model_type": self.model_type}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor) -> Tensor:
    """Softmax attention of [B, L, heads * D] tensors without scaling; `bias` [(heads,) L, L] is added to the logits.

    The softmax is taken in float32 (float64 in a float64 model).
    """
    query, key, value = (split_heads(x, num_heads).transpose([0, 2, 1, 3]) for x in (query, key, value))
    wide = "float64" if query.dtype == paddle.float64 else "float32"
    logits = paddle.matmul(query, key, transpose_y=True).astype(wide) + bias.astype(wide)
    weights = F.softmax(logits, axis=-1).astype(value.dtype)
    return paddle.matmul(weights, value).transpose([0, 2, 1, 3]).flatten(2)
