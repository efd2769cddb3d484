"""Parameter names of the SANA authors' own checkpoints, translated to those of HF diffusers.

Three projections are stacked there: queries, keys and values of self-attention, keys and values of cross-attention.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fast_diffusers.models.checkpoint_io import Checkpoint, StoredTensor

Tensor = TypeVar("Tensor")

DROPPED = re.compile(r"y_embedder\.y_embedding|pos_embed|logvar_linear\.(weight|bias)")
"""The null caption (pipelines encode an empty prompt), positions that are computed, the training loss's variance."""

STACKED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
RENAMED_IN_BLOCKS = {
    "attn.proj": "attn1.to_out.0",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
RENAMED = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "attention_y_norm": "caption_norm",
    "final_layer.linear": "proj_out",
    "final_layer": "",  # its scale_shift_table
}
TIMESTEP = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def is_original(names: Iterable[str]) -> bool:
    """Whether these are the names of an authors' checkpoint."""
    return "x_embedder.proj.weight" in names


def translate(name: str, guided: bool) -> tuple[str, ...]:
    """The diffusers names of an original parameter, in the order in which it stacks them; none if it is dropped.

    `guided` is whether the checkpoint embeds guidance, which changes where diffusers keeps the time embedder. A name
    that is not known stays, for the loader to name it.
    """
    if DROPPED.fullmatch(name):
        return ()
    block = _BLOCK.fullmatch(name)
    prefix, name = (f"transformer_blocks.{block[1]}.", block[2]) if block else ("", name)
    layer, _, parameter = name.rpartition(".")
    if block:
        layers = STACKED.get(layer) or (RENAMED_IN_BLOCKS.get(layer, layer),)
    elif layer in TIMESTEP:
        layers = (f"time_embed.{'' if guided else 'emb.'}{TIMESTEP[layer]}",)
    else:
        layers = (RENAMED.get(layer, layer),)
    return tuple(f"{prefix}{layer}.{parameter}" if layer else f"{prefix}{parameter}" for layer in layers)


def to_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of arrays under original names, in PyTorch's layout, under diffusers names."""
    return _convert(state, lambda array, index, count: np.split(array, count)[index])


def split_stored(checkpoint: Checkpoint) -> Checkpoint:
    """The same for a checkpoint on disk: nothing is read, parts of a stacked tensor are parts of its bytes."""
    return replace(checkpoint, tensors=_convert(checkpoint.tensors, _stored_part))


def _convert(state: Mapping[str, Tensor], part: Callable[[Tensor, int, int], Tensor]) -> dict[str, Tensor]:
    guided = any(name.startswith("cfg_embedder.") for name in state)
    converted = {}
    for name, tensor in state.items():
        targets = translate(name, guided)
        converted |= {target: part(tensor, index, len(targets)) for index, target in enumerate(targets)}
    return converted


def _stored_part(stored: StoredTensor, index: int, count: int) -> StoredTensor:
    if count == 1:
        return stored
    shape = (stored.shape[0] // count, *stored.shape[1:])
    element_size = int(re.search(r"\d+", stored.dtype)[0]) // 8  # "BF16", "F32"; no stacked tensor is boolean
    return replace(stored, shape=shape, offset=stored.offset + index * math.prod(shape) * element_size)
