"""Telling a model the time that a step leads to, from outside of it: no model file knows of this.

Two ways (TwinFlow, arXiv 2512.05150): an auxiliary embedding that is added to the model's own time embedding, and a
shortcut for models that stay as they are, which shows them one time made of both. Times may be negative.

A model remembers the way it was trained with (`attach`), be it as a whole or for each of its LoRA adapters. Its
denoiser (`denoisers.denoiser_for`) then goes that way wherever the adapter runs, and a pipeline saves it along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import paddle
from paddle import Tensor, nn
from safetensors import SafetensorError
from safetensors.paddle import load_file, save_file

from fast_diffusers.errors import UserError
from fast_diffusers.lora import files as lora_files
from fast_diffusers.lora.layers import find_set
from fast_diffusers.models.layers import EmbeddingMLP, sinusoid
from fast_diffusers.transports import expand_time, per_sample

Mode = Literal["shortcut", "auxiliary"]
MODES: tuple[Mode, ...] = ("shortcut", "auxiliary")
CONFIG, WEIGHTS = "target_time.json", "target_time.safetensors"
HEADER = "target_time"  # entry of a LoRA file's header: the mode

EMBEDDING_INPUTS = 256  # sines and cosines of a time

TIME_EMBEDDINGS = {
    "FluxTransformer2DModel": "time_text_embed",
    "QwenImageTransformer2DModel": "time_text_embed",
    "SD3Transformer2DModel": "time_text_embed",
    "SanaTransformer2DModel": "time_embed.embedded",
    "ZImageTransformer2DModel": "t_embedder",
}
"""Path of the layer whose output [B, C] is a model's embedded time, by the name of the model's class."""


def time_embedding_of(transformer: nn.Layer) -> nn.Layer:
    """The layer of a model that embeds its time. TypeError for a class that `TIME_EMBEDDINGS` does not have."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in TIME_EMBEDDINGS:
            return dict(transformer.named_sublayers())[TIME_EMBEDDINGS[cls.__name__]]
    known = ", ".join(sorted(TIME_EMBEDDINGS))
    raise TypeError(f"where {type(transformer).__name__} embeds its time is not known; it is for {known}")


def time_channels_of(transformer: nn.Layer) -> int:
    """Channels of what `time_embedding_of` gives."""
    layer = time_embedding_of(transformer)
    linears = [each for each in layer.sublayers() if isinstance(each, nn.Linear)]
    if linears:
        return linears[-1].weight.shape[1]
    config = transformer.config  # a layer that only passes on what the blocks' width was made for
    return config.num_attention_heads * config.attention_head_dim


# ---------------------------------------------------------------------------------------------- two time conditions
# The embedding that adds to the running forward pass, with its times t and target_t [B].
_TOLD: ContextVar[tuple[AuxiliaryTimeEmbedding, Tensor, Tensor] | None] = ContextVar("target_time", default=None)


def told_now() -> tuple[AuxiliaryTimeEmbedding, Tensor, Tensor] | None:
    """The embedding that acts here and now, with its times t and target_t [B]; None outside of `told`."""
    return _TOLD.get()


class AuxiliaryTimeEmbedding(nn.Layer):
    """Adds embed(target_t)·(t − target_t) to a model's embedded time [B, channels].

    Its last layer starts at zero, so that the model starts unchanged; at target_t = t it adds nothing ever. It is
    trained in float32 whatever the model's dtype. `hook_into` connects it; it then acts inside `told` and nowhere else,
    in this context and in what is recomputed for it in the backward pass.
    """

    def __init__(self, channels: int):
        super().__init__(dtype="float32")
        self.channels = channels
        self.embedder = EmbeddingMLP(EMBEDDING_INPUTS, channels)
        self.embedder.linear_2.weight.set_value(paddle.zeros([channels, channels], self.embedder.linear_2.weight.dtype))

    @classmethod
    def for_model(cls, transformer: nn.Layer) -> AuxiliaryTimeEmbedding:
        """A new one, as wide as the model's embedded time and hooked into it."""
        embedding = cls(time_channels_of(transformer))
        embedding.hook_into(transformer)
        return embedding

    def forward(self, t: Tensor, target_t: Tensor) -> Tensor:
        """What is added, [B, channels], at times [B]."""
        positions = sinusoid(target_t * 1000.0, EMBEDDING_INPUTS).astype(self.embedder.linear_1.weight.dtype)
        embedded = self.embedder(positions)
        return embedded * expand_time(t - target_t, embedded)

    def hook_into(self, transformer: nn.Layer) -> Any:
        """Connect to a model; returns the handle whose `remove` disconnects."""

        def add(layer: nn.Layer, inputs: Any, output: Tensor) -> Tensor:
            told = told_now()
            if told is None or told[0] is not self:
                return output
            return output + self(*told[1:]).astype(output.dtype)

        return time_embedding_of(transformer).register_forward_post_hook(add)

    @contextmanager
    def told(self, t: Tensor, target_t: Tensor) -> Iterator[None]:
        """Within the block this embedding acts, with these times [B]."""
        token = _TOLD.set((self, t, target_t))
        try:
            yield
        finally:
            _TOLD.reset(token)


class DenoiserWrapper:
    """A denoiser around another, with all its other attributes (`transformer`, `num_taps`, ...)."""

    def __init__(self, denoiser: Any):
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        if name == "denoiser":  # not there yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.denoiser, name)


class ShortcutTimeDenoiser(DenoiserWrapper):
    """A model of one time condition that is shown t − target_t/2: t for target_t = 0, t/2 for target_t = t.

    Where no target time is given it is t.
    """

    takes_target_time = True

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """See `denoisers.Denoiser`."""
        return self.denoiser(x, _shown(t, target_t), cond, target_t=target_t, guidance=guidance)

    def features(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        taps: Sequence[int] | None = None,
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> list[Tensor]:
        """See `denoisers.TransformerDenoiser.features`."""
        return self.denoiser.features(x, _shown(t, target_t), cond, taps, guidance=guidance)


class TargetTimeDenoiser(DenoiserWrapper):
    """A model that is told its target time by an auxiliary embedding; where none is given it is t."""

    takes_target_time = True

    def __init__(self, denoiser: Any, embedding: AuxiliaryTimeEmbedding):
        super().__init__(denoiser)
        self.embedding = embedding

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """See `denoisers.Denoiser`."""
        with self.embedding.told(*_both(t, target_t, x)):
            return self.denoiser(x, t, cond, target_t=target_t, guidance=guidance)

    def features(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        taps: Sequence[int] | None = None,
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> list[Tensor]:
        """See `denoisers.TransformerDenoiser.features`."""
        with self.embedding.told(*_both(t, target_t, x)):
            return self.denoiser.features(x, t, cond, taps, guidance=guidance)


def _shown(t: Tensor | float, target_t: Tensor | float | None) -> Tensor | float:
    return t - 0.5 * (t if target_t is None else target_t)


def _both(t: Tensor | float, target_t: Tensor | float | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """t and target_t [B], one of each for every row of x."""
    return per_sample(t, x), per_sample(t if target_t is None else target_t, x)


# ---------------------------------------------------------------------------------------------- what a model remembers
@dataclass(frozen=True, eq=False)
class TargetTime:
    """The way in which a model is told the target time; `embedding` belongs to the mode "auxiliary"."""

    mode: Mode
    embedding: AuxiliaryTimeEmbedding | None = None

    @classmethod
    def new(cls, mode: Mode, transformer: nn.Layer) -> TargetTime:
        """One for training: a new embedding is hooked into the model."""
        return cls(mode, AuxiliaryTimeEmbedding.for_model(transformer) if mode == "auxiliary" else None)

    def wrap(self, denoiser: Any) -> ShortcutTimeDenoiser | TargetTimeDenoiser:
        """The denoiser that goes this way."""
        if self.embedding is None:
            return ShortcutTimeDenoiser(denoiser)
        return TargetTimeDenoiser(denoiser, self.embedding)

    def save(self, folder: str | os.PathLike) -> None:
        """Write target_time.json and, for an embedding, target_time.safetensors (Paddle's layout) to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.embedding is not None:
            tensors = {name: each.detach().cpu().contiguous() for name, each in self.embedding.state_dict().items()}
            save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pd"})
        channels = {} if self.embedding is None else {"channels": self.embedding.channels}
        (folder / CONFIG).write_text(json.dumps({"mode": self.mode, **channels}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike, transformer: nn.Layer) -> TargetTime | None:
        """What `save` wrote, hooked into the model; None for a folder without. UserError where it does not fit."""
        config, weights = Path(folder, CONFIG), Path(folder, WEIGHTS)
        if not config.is_file():
            return None
        try:
            mode = json.loads(config.read_bytes())["mode"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{config} is damaged: expected a mapping with 'mode'") from error
        if mode not in MODES:
            raise UserError(f"{config}: mode is {mode!r}; expected one of {', '.join(MODES)}")
        loaded = cls.new(mode, transformer)
        if loaded.embedding is not None:
            _fill(loaded.embedding, weights)
        return loaded


def _fill(embedding: AuxiliaryTimeEmbedding, file: Path) -> None:
    try:
        saved = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"the target-time embedding {file} cannot be read: {error}") from error
    own = embedding.state_dict()
    shapes = [{name: list(each.shape) for name, each in tensors.items()} for tensors in (own, saved)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the target-time embedding {file} is of another model: it does not have this one's shapes")
    with paddle.no_grad():
        for name, each in own.items():
            paddle.assign(saved[name].astype(each.dtype), each)


def save_attached(transformer: nn.Layer, folder: str | os.PathLike, adapter: str | None = None) -> None:
    """Write the way of an adapter, or of the model, to a folder; without one, what an earlier one left there goes."""
    if way := attached(transformer).get(adapter):
        way.save(folder)
    else:
        for name in (CONFIG, WEIGHTS):
            Path(folder, name).unlink(missing_ok=True)


def save_lora(transformer: nn.Layer, folder: str | os.PathLike, adapter: str, layout: str = "paddle") -> Path:
    """`lora.save` of an adapter with its way: noted in the file's header, and saved beside the file."""
    way = attached(transformer).get(adapter)
    save_attached(transformer, folder, adapter)
    return lora_files.save(transformer, folder, adapter, layout, header={HEADER: way.mode} if way else None)


def of_lora(path: str | os.PathLike, transformer: nn.Layer) -> TargetTime | None:
    """The way that a LoRA file was trained with, hooked into the model; None for a file without one.

    Raises:
        FileNotFoundError, UserError: no such file, or what its header asks for is not beside it.
    """
    file, header = lora_files.read_header(path)
    mode = header.get(HEADER)
    if mode is None:
        return None
    loaded = TargetTime.load(file.parent, transformer)
    if loaded is None and mode == "shortcut":
        return TargetTime(mode)
    if loaded is None or loaded.mode != mode:
        found = "is missing" if loaded is None else f"is of mode {loaded.mode}"
        raise UserError(f"{file} was trained with a target time of mode {mode}, but {file.parent / CONFIG} {found}")
    return loaded


def attach(transformer: nn.Layer, way: TargetTime | None, adapter: str | None = None) -> None:
    """Let denoisers of this model go that way: whenever the LoRA adapter of this name runs, or (None) always.

    An adapter's own way comes before the model's. A way None takes it off.
    """
    others = {name: each for name, each in attached(transformer).items() if name != adapter}
    # An ordinary attribute, not a sublayer: the model's weights and their names stay what they were.
    transformer.target_times = others if way is None else {**others, adapter: way}


def attached(transformer: nn.Layer) -> dict[str | None, TargetTime]:
    """What `attach` was called with, by adapter."""
    return getattr(transformer, "target_times", {})


class AttachedDenoiser(DenoiserWrapper):
    """A denoiser that goes the way which belongs to the adapters that are running, or that of the model."""

    def _chosen(self) -> Any:
        transformer, adapters = self.denoiser.transformer, find_set(self.denoiser.transformer)
        known = attached(transformer)
        running = {**adapters.running(), **adapters.fused} if adapters else {}
        named = [name for name in running if name in known]
        if len(named) > 1:
            raise UserError(
                f"the LoRA adapters {', '.join(named)} are each told the target time in a way of their own: run one"
            )
        way = known.get(named[0] if named else None)
        return way.wrap(self.denoiser) if way else self.denoiser

    @property
    def takes_target_time(self) -> bool:
        """Whether what is running now does."""
        return getattr(self._chosen(), "takes_target_time", False)

    def __call__(self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], **settings: Any) -> Tensor:
        """See `denoisers.Denoiser`."""
        return self._chosen()(x, t, cond, **settings)

    def features(self, *arguments: Any, **settings: Any) -> list[Tensor]:
        """See `denoisers.TransformerDenoiser.features`."""
        return self._chosen().features(*arguments, **settings)
