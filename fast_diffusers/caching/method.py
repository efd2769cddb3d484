"""What a caching method is: a config, and what it keeps and decides for one guidance branch of one denoising run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar

import paddle
from paddle import Tensor

from fast_diffusers.caching.families import Block, Site, Streams, Structure
from fast_diffusers.errors import UserError
from fast_diffusers.models.layers import at_least_float32


@dataclass(frozen=True)
class Step:
    """Where a run is.

    Args:
        index: how many different times the run has visited before this one.
        noise_level: time from 0, data, to 1000, noise.
        total: how many times the run will visit, if that is known.
        branch: which forward of this time it is: with guidance in two calls, 0 and 1.
        shared: what the branches of a run tell each other.
    """

    index: int
    noise_level: float
    total: int | None = None
    branch: int = 0
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the last step of the run."""
        return self.total is not None and self.index >= self.total - 1


class BlockCall:
    """One call of a block: `given` are its arguments by name. Whoever does not `compute` it has skipped it."""

    def __init__(self, block: Block, count: int, original: Any, given: Mapping[str, Any]):
        self.block, self.given, self._original = block, given, original
        self.is_first, self.is_last = block.index == 0, block.index == count - 1
        self.computed = False

    @property
    def streams(self) -> Streams:
        """What flows into the block."""
        return tuple([self.given[name] for name in self.block.kind.streams])

    def compute(self) -> Streams:
        """What flows out of it."""
        self.computed = True
        return self.block.kind.unpack(self._original(**self.given))

    def modulated(self) -> Tensor:
        """What the block's first attention reads, [B, L, C]; costs one norm."""
        return self.block.kind.modulated(self.block.layer, self.given)


class SiteCall:
    """One call of a sublayer of a block. Whoever does not `compute` it has skipped it."""

    def __init__(self, block: Block, site: Site, original: Any, args: tuple, kwargs: Mapping[str, Any]):
        self.block, self.site = block, site
        self._original, self._args, self._kwargs = original, args, kwargs
        self.computed = False

    @property
    def key(self) -> tuple[int, str]:
        """Which sublayer of the model it is."""
        return self.block.index, self.site.path

    @property
    def first_input(self) -> Tensor:
        """The first tensor that the sublayer is given."""
        return self._args[0] if self._args else next(iter(self._kwargs.values()))

    def compute(self) -> Any:
        """The sublayer's result."""
        self.computed = True
        return self._original(*self._args, **self._kwargs)


class ForwardCall:
    """One call of the whole model: `given` are its arguments by name. `share` is what part of the rows was computed."""

    def __init__(self, structure: Structure, original: Any, given: Mapping[str, Any]):
        self.structure, self.given, self._original = structure, given, original
        self.share = 0.0

    def compute(self, given: Mapping[str, Any] | None = None, share: float = 1.0) -> Any:
        """The model's result, of other arguments if given."""
        self.share = share
        return self._original(**(self.given if given is None else given))


class BranchState:
    """What a method keeps for one guidance branch of one run. It computes everything unless a subclass knows better.

    Tensors are kept detached. `count` is the number of forwards before this one that this state has seen.
    """

    def __init__(self, config: Any, structure: Structure):
        self.config, self.structure = config, structure
        self.count = -1
        self.step: Step

    def begin(self, step: Step) -> None:
        """Called before each forward of the model."""
        self.step = step
        self.count += 1

    def forward(self, call: ForwardCall) -> Any:
        """The model's result; blocks and sublayers are called in it."""
        return call.compute()

    def block(self, call: BlockCall) -> Streams:
        """What flows out of a block."""
        return call.compute()

    def read(self, block: Block, value: Tensor) -> None:
        """A block that is being computed attends to `value`, its `BlockCall.modulated`. See `CacheConfig.reads`."""

    def site(self, call: SiteCall) -> Any:
        """The result of a sublayer."""
        return call.compute()


@dataclass(frozen=True)
class CacheConfig:
    """Base of the methods' settings; `state` is the class that acts on them.

    `looks_inside`: blocks have to be layers, as the method calls or reads what is inside them. `reads`: the state is to
    be told what a block attends to while it is computed, wherever that can be seen, which it cannot in a compiled one.
    """

    state: ClassVar[type[BranchState]]
    looks_inside: ClassVar[bool] = False
    reads: ClassVar[bool] = False

    def check(self, structure: Structure) -> None:
        """UserError if the method cannot work with a model."""

    def sites(self, block: Block) -> list[Site]:
        """The sublayers of a block that the method has a say in; with none in any block it acts on whole blocks."""
        return []


# ------------------------------------------------------------------------------------------------- shared arithmetic
def relative_change(value: Tensor, before: Tensor) -> Tensor:
    """mean|value − before| / mean|before| as a scalar on the device, float32."""
    value, before = at_least_float32(value), at_least_float32(before)
    change = (value - before).abs().mean() / before.abs().mean()
    return change if change.dtype == paddle.float32 else change.astype("float32")


def residual(outputs: Streams, inputs: Streams) -> Streams:
    """What was added to each stream, detached; None for a stream that ended (the text in the last block of some)."""
    return tuple([None if out is None else (out - x).detach() for out, x in zip(outputs, inputs, strict=True)])


def add(inputs: Streams, added: Streams) -> Streams:
    """Streams with a `residual` put on them."""
    return tuple([x if part is None else x + part for x, part in zip(inputs, added, strict=True)])


def first_eighth(x: Tensor) -> Tensor:
    """The first eighth of the channels (at least one) of [B, L, C]."""
    return x[..., : max(1, x.shape[-1] // 8)]


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Value at x of the polynomial with these coefficients, highest power first (Horner's rule)."""
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


def to_host(scalars: list[Tensor]) -> list[float]:
    """Values of device scalars in one transfer."""
    return paddle.stack(scalars).tolist() if scalars else []


# ------------------------------------------------------------------------------------------------- checks of settings
def check_number(config: Any, name: str, low: float = 0.0, high: float = math.inf) -> None:
    """UserError unless the setting is a finite number from low to high."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not low <= value <= high:
        span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{type(config).__name__}: {name} must be a number {span}, got {value!r}")


def check_count(config: Any, name: str, low: int = 1) -> None:
    """UserError unless the setting is an integer of at least `low`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise UserError(f"{type(config).__name__}: {name} must be an integer of at least {low}, got {value!r}")


def check_window(config: Any, low: str, high: str) -> None:
    """UserError unless the two settings are times in 0..1000 (data to noise) in this order."""
    check_number(config, low, 0, 1000)
    check_number(config, high, 0, 1000)
    if getattr(config, low) > getattr(config, high):
        raise UserError(
            f"{type(config).__name__}: {low} {getattr(config, low)} is above {high} {getattr(config, high)}: "
            "times run from 1000, noise, down to 0"
        )


def check_coefficients(config: Any, name: str) -> None:
    """UserError unless the setting is a tuple of finite numbers."""
    value = getattr(config, name)
    if not isinstance(value, tuple) or not value or not all(isinstance(x, Real) and math.isfinite(x) for x in value):
        raise UserError(
            f"{type(config).__name__}: {name} must be a tuple of numbers, the highest power's first, got {value!r}"
        )


def require_two_blocks(config: Any, structure: Structure) -> None:
    """UserError for a model with nothing to skip after its first block."""
    if len(structure.blocks) < 2:
        raise UserError(f"{type(config).__name__} needs a model of at least two blocks, this one has one")


def require_attention(config: Any, structure: Structure) -> None:
    """UserError for a model whose blocks have no attention that can be reached."""
    if not any(block.sites(block.kind.attention) for block in structure.blocks):
        raise UserError(
            f"{type(config).__name__} keeps the results of attention layers, and this "
            f"{type(structure.transformer).__name__} has none that are known"
        )
