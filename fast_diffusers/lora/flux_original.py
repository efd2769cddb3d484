"""Layer names of the FLUX authors' own code, which kohya's LoRA files have, translated to those of HF diffusers.

Queries, keys and values are one layer there, in single-stream blocks together with the MLP's entry: an adapter of such
a layer is one of each part, with the same A and with its own rows of B (in torch's layout, [out, rank]).
"""

import re
from collections.abc import Mapping

from fast_diffusers.models.checkpoint_io import StoredTensor

_BLOCK = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_OUTSIDE = {  # without the last modulation, in which diffusers has the halves the other way round
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in_out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in_in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in_out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in_out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer_linear": ("proj_out",),
}


def translate(layer: str) -> tuple[str, ...]:
    """The diffusers paths of an original layer, in the order of its rows; none for another name.

    Paths may be written with dots or, as kohya does, with underscores.
    """
    flat = layer.replace(".", "_")
    block = _BLOCK.fullmatch(flat)
    if not block:
        return _OUTSIDE.get(flat, ())
    names, prefix = (_DOUBLE, "") if block[1] == "double" else (_SINGLE, "single_")
    return tuple(f"{prefix}transformer_blocks.{block[2]}.{name}" for name in names.get(block[3], ()))


def split(paths: tuple[str, ...], pair: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The factors of each part of an original layer, in torch's layout; nothing is read."""
    if len(paths) == 1:
        return {paths[0]: dict(pair)}
    a, b = pair["A"], pair["B"]
    # A part has as many rows as a third, or where the MLP follows, as the layer has inputs; the MLP has the others.
    size = b.shape[0] // 3 if len(paths) == 3 else a.shape[-1]
    starts = [i * size for i in range(len(paths))]
    ends = [*starts[1:], b.shape[0]]
    return {path: {"A": a, "B": b.rows(*rows)} for path, *rows in zip(paths, starts, ends, strict=True)}
