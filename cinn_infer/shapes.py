"""Which axes of a graph's inputs are free, and inputs of other sizes for tests of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

Axes = tuple[str | int, ...]
"""One entry an axis of a tensor: its size, or the name of a free one; axes of one name have one size."""

TENSORS: Mapping[tuple[str, int], tuple[str | None, ...]] = {
    ("hidden_states", 3): ("batch", "tokens"),
    ("hidden_states", 4): ("batch",),
    ("encoder_hidden_states", 3): ("batch", "text"),
    ("encoder_hidden_states_mask", 2): ("batch", "text"),
    ("encoder_attention_mask", 2): ("batch", "text"),
    ("pooled_projections", 2): ("batch",),
    ("timestep", 1): ("batch",),
    ("guidance", 1): ("batch",),
    ("temb", 2): ("batch",),
    ("image_rotary_emb", 3): ("joint",),
    ("rope", 3): ("joint",),
    ("rope", 4): ("batch", "tokens"),
    ("bias", 4): ("batch", None, None, "keys"),
    ("modulation", 2): ("batch",),
    ("img_ids", 2): ("tokens",),
    ("txt_ids", 2): ("text",),
    ("controlnet_block_samples", 3): ("batch", "tokens"),
    ("controlnet_cond", 4): ("batch",),
    ("told", 2): ("batch",),
    ("input_ids", 2): ("batch",),
    ("attention_mask", 2): ("batch",),
    ("x", 5): ("batch",),
    ("t", 1): ("batch",),
    ("cap_feats", 3): ("batch", "text"),
    ("cap_lengths", 1): ("batch",),
    ("z", 4): ("batch",),
    ("z", 5): ("batch",),
}
"""The leading axes of tensors by argument and rank that a traced model leaves free; others, and None, are as they were.
"joint" is text and image; "keys" is what attention goes to: that, or one of them."""

FIXED: Mapping[str, frozenset[str]] = {
    "QwenImageTransformer2DModel": frozenset({"tokens"}),  # the grid of an image is an argument, not a tensor
    "SanaTransformerBlock": frozenset({"tokens"}),  # height is an argument
}
"""Names of axes that are not free in some models."""


def axes(layer: nn.Layer, names: Sequence[str], tensors: Sequence[paddle.Tensor]) -> list[Axes]:
    """The axes of every input of a method of `layer`."""
    fixed = next((FIXED[cls.__name__] for cls in type(layer).__mro__ if cls.__name__ in FIXED), frozenset())

    def one(name: str, tensor: paddle.Tensor) -> Axes:
        free = TENSORS.get((name.split(".")[0], tensor.ndim), ())
        free = tuple(
            size if axis is None or axis in fixed else axis for axis, size in zip(free, tensor.shape, strict=False)
        )
        return (*free, *tensor.shape[len(free) :])

    return [one(name, tensor) for name, tensor in zip(names, tensors, strict=True)]


def specs(names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Axes]) -> list[InputSpec]:
    """What Paddle is told of the inputs."""
    return [
        InputSpec([size if isinstance(size, int) else None for size in shape], dtype, name.replace(".", "_"))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]


def misfit(names: Sequence[str], shapes: Sequence[Axes], found: Sequence[Sequence[int]]) -> str | None:
    """What is wrong with inputs of the shapes `found`, in a few words; None if they fit."""
    free: dict[str, int] = {}
    for name, shape, sizes in zip(names, shapes, found, strict=True):
        expected = [size if isinstance(size, int) else free.get(size) for size in shape]
        if len(sizes) != len(shape) or any(e not in (None, f) for e, f in zip(expected, sizes, strict=True)):
            wanted = ", ".join(str(size) for size in shape)
            return f"{name} has shape {list(sizes)}, the graph takes [{wanted}]"
        free |= {size: f for size, f in zip(shape, sizes, strict=True) if isinstance(size, str)}
    return None


def resized(tensors: Sequence[np.ndarray], shapes: Sequence[Axes]) -> list[np.ndarray]:
    """Inputs of other sizes along the free axes, one more on each; rows are repeated in their order."""
    free = {size for shape in shapes for size in shape if isinstance(size, str)}
    joint = len({"text", "tokens"} & free)
    extras = {"joint": joint, "keys": joint if "joint" in free else 1}

    def grow(array: np.ndarray, shape: Axes) -> np.ndarray:
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                extra = extras.get(size, 1)
                array = np.take(array, np.arange(array.shape[axis] + extra) % array.shape[axis], axis)
        return array

    return [grow(array, shape) for array, shape in zip(tensors, shapes, strict=True)]
