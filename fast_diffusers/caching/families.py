"""Where the blocks of each model family are and what flows through them: all that the caches know of a model.

A new family is one entry of `FAMILIES`. The shapes in it are B batch, L image tokens, T text tokens, C channels.

Compiled and exported blocks. A cache replaces `forward` of the objects in the lists that `Family.segments` names. So a
model whose blocks run as graphs of their own, whatever runs them, can be cached if

1. its own forward still calls these objects one by one, in order, with the arguments of the family's blocks (by
   position or by name), and each has a class whose `forward` names these arguments;
2. the streams among them are arguments and results of the graph, in the order of `BlockKind.outputs`, and what a graph
   returns is never overwritten by a later run of it: caches keep it for several steps;
3. what stands in for `forward` is set on the object before the cache, and taken off after it.

What `cinn_infer.compile` and `export` make with granularity="block" are such forms. What a method needs beyond that:

- blocks alone: FirstBlockTaylor, CGTaylor, SortBlock, BlockDance;
- `BlockKind.modulated`, the block's first norm with its weights, as a layer: TeaCache, TeaBlockCache;
- sublayers that are called one by one (`Site`): TaylorSeer, PyramidAttentionBroadcast, TGate. They cannot work where a
  block is one graph, and whoever makes the graph has to refuse them: a sublayer then has `forward` among its `vars`.

Both are `CacheConfig.looks_inside`, which `enable_cache` refuses where the blocks have no weights, as exported ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import paddle
from paddle import Tensor, nn

from fast_diffusers.errors import UserError
from fast_diffusers.models.layers import layer_norm, modulate, per_token

Streams = tuple[Tensor, ...]
Role = Literal["joint", "self", "cross", "other"]


@dataclass(frozen=True)
class Site:
    """A sublayer of a block: its path, what kind of attention it is, if any, and the method that the block calls."""

    path: str
    role: Role = "other"
    method: str = "forward"


@dataclass(frozen=True)
class BlockKind:
    """How to read a block from outside.

    Args:
        streams: names of the arguments that flow from block to block, the one that the model's output is made of first.
        outputs: position of each stream in the block's result; None where the result is the only stream.
        modulated: (block, arguments by name) -> what the block's first attention reads, [B, L, C].
        branches: sublayers whose results the block gates and adds to the streams.
        attention: sublayers that attend.
        feeders: sublayers whose results go nowhere but into a branch; they need not run where that is predicted.
    """

    streams: tuple[str, ...]
    outputs: tuple[int, ...] | None
    modulated: Callable[[nn.Layer, Mapping[str, Any]], Tensor]
    branches: tuple[Site, ...] = ()
    attention: tuple[Site, ...] = ()
    feeders: tuple[Site, ...] = ()

    def unpack(self, result: Any) -> Streams:
        """A block's result as streams."""
        return (result,) if self.outputs is None else tuple([result[position] for position in self.outputs])

    def pack(self, streams: Streams) -> Any:
        """Streams as a block's result."""
        return streams[0] if self.outputs is None else tuple([streams[number] for number in self._order])

    @cached_property
    def _order(self) -> list[int]:
        """The numbers of the streams in the order of the block's result."""
        return sorted(range(len(self.outputs)), key=self.outputs.__getitem__)


@dataclass(frozen=True)
class Family:
    """Where a model keeps its blocks and what its arguments mean.

    Args:
        segments: (attribute that holds a list of blocks, their kind), in the order in which they run.
        noise_level: (config, value of the time argument) -> time from 0, data, to 1000, noise.
        batched: names of the model's arguments that have a row, or an entry of a list, for each sample.
        controls: name of the argument with a ControlNet's residuals, a collection of tensors with a row a sample.
        latents, text, time: names of the model's arguments.
        join: streams at the end of a segment -> streams at the start of the next.
        tea_coefficients: TeaCache's polynomial, highest power first, where one is published.
    """

    segments: tuple[tuple[str, BlockKind], ...]
    noise_level: Callable[[Mapping[str, Any], float], float]
    batched: tuple[str, ...]
    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"
    time: str = "timestep"
    controls: str | None = None
    join: Callable[[Streams], Streams] | None = None
    tea_coefficients: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Block:
    """One block of a model; `segment` is the number of its segment, `position` its number within that."""

    index: int
    name: str
    layer: nn.Layer
    kind: BlockKind
    segment: int
    position: int

    def sites(self, sites: tuple[Site, ...]) -> list[Site]:
        """Those of the sites that this block has: some are left out in some blocks."""
        return [site for site in sites if getattr(self.layer, site.path, None) is not None]


@dataclass(frozen=True)
class Structure:
    """The blocks of one model, in the order in which they run."""

    transformer: nn.Layer
    family: Family
    blocks: tuple[Block, ...] = field(default=())

    @classmethod
    def of(cls, transformer: nn.Layer) -> Structure:
        """UserError for a model of no known family, or one without its family's lists of blocks."""
        family, name = family_of(transformer), type(transformer).__name__
        blocks: list[Block] = []
        for segment, (attribute, kind) in enumerate(family.segments):
            layers = getattr(transformer, attribute, None)
            if layers is None:
                raise UserError(f"this {name} has no {attribute}: caches need its blocks as separate layers")
            for position, layer in enumerate(layers):
                blocks.append(Block(len(blocks), f"{attribute}.{position}", layer, kind, segment, position))
        return cls(transformer, family, tuple(blocks))

    @property
    def segment_lengths(self) -> list[int]:
        """Number of blocks in each segment."""
        return [sum(block.segment == segment for block in self.blocks) for segment in range(len(self.family.segments))]

    def carry(self, streams: Streams) -> Streams:
        """What reaches the last block if the first gets `streams` and none changes anything."""
        for _ in range(self.blocks[0].segment, self.blocks[-1].segment):
            streams = self.family.join(streams)
        return streams


# --------------------------------------------------------------------------------- what each block's attention reads
def _ada_norm(norm: str) -> Callable[[nn.Layer, Mapping[str, Any]], Tensor]:
    def modulated(block: nn.Layer, given: Mapping[str, Any]) -> Tensor:
        shift, scale = getattr(block, norm)(given["temb"])[:2]
        return modulate(layer_norm(given["hidden_states"]), shift, scale)

    return modulated


def _ppdiffusers_norm(block: nn.Layer, given: Mapping[str, Any]) -> Tensor:
    return block.norm1(given["hidden_states"], emb=given["temb"])[0]


def _qwen_norm(block: nn.Layer, given: Mapping[str, Any]) -> Tensor:
    shift, scale = block.img_mod(given["temb"]).chunk(6, axis=-1)[:2]
    return modulate(layer_norm(given["hidden_states"]), shift, scale)


def _sana_norm(block: nn.Layer, given: Mapping[str, Any]) -> Tensor:
    shift, scale = (block.scale_shift_table + given["modulation"].reshape([0, 6, -1])).unbind(axis=1)[:2]
    return modulate(layer_norm(given["hidden_states"], block.epsilon), shift, scale)


def _z_image_norm(block: nn.Layer, given: Mapping[str, Any]) -> Tensor:
    x = given["hidden_states"]
    scale = block.adaLN_modulation(given["temb"]).chunk(4, axis=-1)[0]
    return block.attention_norm1(x) * (1 + per_token(scale, x))


# ------------------------------------------------------------------------------------------------------- the families
_JOINT = Site("attn", "joint")
_TEXT_AND_IMAGE = dict(streams=("hidden_states", "encoder_hidden_states"), outputs=(1, 0))

_FLUX_DOUBLE = BlockKind(
    **_TEXT_AND_IMAGE,
    modulated=_ada_norm("norm1"),
    branches=(_JOINT, Site("ff"), Site("ff_context")),
    attention=(_JOINT,),
)
_FLUX_SINGLE = BlockKind(
    streams=("hidden_states",),
    outputs=None,
    modulated=_ada_norm("norm"),
    branches=(Site("proj_out"),),
    attention=(_JOINT,),
    feeders=(_JOINT, Site("proj_mlp")),
)
_SD3 = BlockKind(
    **_TEXT_AND_IMAGE,
    modulated=_ada_norm("norm1"),
    branches=(_JOINT, Site("attn2", "self"), Site("ff"), Site("ff_context")),
    attention=(_JOINT, Site("attn2", "self")),
)
_PPDIFFUSERS_SD3 = BlockKind(
    **_TEXT_AND_IMAGE,
    modulated=_ppdiffusers_norm,
    branches=(_JOINT, Site("ff"), Site("ff_context")),
    attention=(_JOINT,),
)
_SANA = BlockKind(
    streams=("hidden_states",),
    outputs=None,
    modulated=_sana_norm,
    branches=(Site("attn1", "self"), Site("attn2", "cross"), Site("ff", method="on_tokens")),
    attention=(Site("attn1", "self"), Site("attn2", "cross")),
)
_QWEN_IMAGE = BlockKind(
    **_TEXT_AND_IMAGE,
    modulated=_qwen_norm,
    branches=(_JOINT, Site("img_mlp"), Site("txt_mlp")),
    attention=(_JOINT,),
)
_Z_IMAGE = BlockKind(
    streams=("hidden_states",),
    outputs=None,
    modulated=_z_image_norm,
    branches=(Site("attention", "joint"), Site("feed_forward")),
    attention=(Site("attention", "joint"),),
)

FLUX_TEA_COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
"""TeaCache's polynomial for FLUX.1-dev (Liu et al. 2024, arXiv 2411.19108, released code), highest power first."""

_TEXT_MODEL = ("hidden_states", "encoder_hidden_states", "timestep", "guidance")

FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": Family(
        segments=(("transformer_blocks", _FLUX_DOUBLE), ("single_transformer_blocks", _FLUX_SINGLE)),
        noise_level=lambda config, t: 1000 * t,
        batched=(*_TEXT_MODEL, "pooled_projections"),
        join=lambda streams: (paddle.concat([streams[1], streams[0]], axis=1),),
        tea_coefficients=FLUX_TEA_COEFFICIENTS,
    ),
    "SD3Transformer2DModel": Family(
        segments=(("transformer_blocks", _SD3),),
        noise_level=lambda config, t: t,
        batched=(*_TEXT_MODEL, "pooled_projections"),
        controls="block_controlnet_hidden_states",
    ),
    "ppdiffusers.SD3Transformer2DModel": Family(
        segments=(("transformer_blocks", _PPDIFFUSERS_SD3),),
        noise_level=lambda config, t: t,
        batched=(*_TEXT_MODEL, "pooled_projections"),
    ),
    "SanaTransformer2DModel": Family(
        segments=(("transformer_blocks", _SANA),),
        # Models that embed guidance (SANA-Sprint) take time from 0 to 1 as it is.
        noise_level=lambda config, t: 1000 * t if config["guidance_embeds"] else t / config["timestep_scale"],
        batched=(*_TEXT_MODEL, "encoder_attention_mask"),
        controls="controlnet_block_samples",
    ),
    "QwenImageTransformer2DModel": Family(
        segments=(("transformer_blocks", _QWEN_IMAGE),),
        noise_level=lambda config, t: 1000 * t,
        batched=(*_TEXT_MODEL, "encoder_hidden_states_mask", "img_shapes", "txt_seq_lens"),
        controls="controlnet_block_samples",
    ),
    "ZImageTransformer2DModel": Family(
        segments=(("layers", _Z_IMAGE),),
        noise_level=lambda config, t: 1000 * (1 - t),  # its times run from noise to data
        batched=("x", "t", "cap_feats"),
        controls="controlnet_block_samples",
        latents="x",
        text="cap_feats",
        time="t",
    ),
}
"""Family by the name of a transformer's class; ppdiffusers' own have its name in front."""


def family_of(transformer: nn.Layer) -> Family:
    """The family of a model, by its class or a base class of it. UserError for one that `FAMILIES` does not have."""
    for cls in type(transformer).__mro__:
        foreign = cls.__module__.split(".")[0] == "ppdiffusers"
        name = f"ppdiffusers.{cls.__name__}" if foreign else cls.__name__
        if name in FAMILIES:
            return FAMILIES[name]
    known = ", ".join(sorted(FAMILIES))
    raise UserError(f"where {type(transformer).__name__} has its blocks is not known; caches know {known}")
