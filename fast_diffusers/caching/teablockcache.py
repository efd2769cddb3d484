"""TeaBlockCache: TeaCache's rule for every block by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paddle import Tensor

from fast_diffusers.caching.families import Block, Streams, Structure
from fast_diffusers.caching.method import (
    BlockCall,
    BranchState,
    CacheConfig,
    add,
    check_coefficients,
    check_count,
    check_number,
    check_window,
    first_eighth,
    relative_change,
    residual,
    to_host,
)
from fast_diffusers.caching.taylor import TaylorSeries
from fast_diffusers.caching.teacache import AccumulatedChange, tea_polynomial, warn_of_raw_change
from fast_diffusers.errors import UserError


def own_eighth(x: Tensor) -> Tensor:
    """The first eighth of the channels of [B, L, C], detached, in memory of its own: a view would keep all of x."""
    return first_eighth(x).detach().contiguous()


def detached(streams: Streams) -> Streams:
    """The same tensors without their gradient; None for a stream that ended."""
    return tuple([None if x is None else x.detach() for x in streams])


class TeaBlockCacheState(BranchState):
    """Keeps, for each block, what it read and what it added."""

    def __init__(self, config: TeaBlockCache, structure: Structure):
        super().__init__(config, structure)
        coefficients = tea_polynomial(config.coefficients, structure)
        self.governed = range(config.cache_start, len(structure.blocks))
        self.rules = {index: AccumulatedChange(config.threshold, coefficients) for index in self.governed}
        self.gate = AccumulatedChange(config.threshold, coefficients)
        self.reads: dict[int, Tensor] = {}  # of the governed blocks so far in this step
        self.before: dict[int, Tensor] = {}  # those of the last step in which blocks ran
        self.changes: dict[int, Tensor] = {}  # from the step before that to it, on the device, until the next decision
        self.gate_read: Tensor | None = None
        self.flows: dict[int, tuple[Streams, Streams]] = {}  # in and out of blocks whose residual nobody has asked for
        self.residuals: dict[int, Streams] = {}
        self.final = TaylorSeries(config.taylor_order or 0)
        self.reused: set[int] = set()
        self.extrapolating = False

    def block(self, call: BlockCall) -> Streams:
        """See `BranchState`."""
        if call.is_first:
            self._decide(call)
        if self.extrapolating:
            return (self.final.predict(self.step.index), *call.streams[1:]) if call.is_last else call.streams
        index, inputs = call.block.index, call.streams
        if index in self.reused:
            streams = add(inputs, self._residual(index))
        else:
            streams = call.compute()
            if index in self.governed:
                self.flows[index] = detached(inputs), detached(streams)
                self.residuals.pop(index, None)
        if index in self.governed and index not in self.reads:
            self.read(call.block, call.modulated())
        if call.is_last:
            self._measure()
            if self.config.taylor_order is not None:
                self.final.update(self.step.index, streams[0])
        return streams

    def read(self, block: Block, value: Tensor) -> None:
        """See `BranchState`."""
        if block.index in self.governed:
            self.reads[block.index] = own_eighth(value)

    def _measure(self) -> None:
        """How far what was read in this step is from that of the step before."""
        if self.before:
            self.changes = {index: relative_change(x, self.before[index]) for index, x in self.reads.items()}
        self.before, self.reads = self.reads, {}

    def _residual(self, index: int) -> Streams:
        """What a block added when it was last computed. Taken only here, as most of what is computed is never reused;
        what flows out of a block flows into the next, so that until then not more is kept.
        """
        if index in self.flows:
            inputs, outputs = self.flows.pop(index)
            self.residuals[index] = residual(outputs, inputs)
        return self.residuals[index]

    def _decide(self, call: BlockCall) -> None:
        """All decisions of a step, from one transfer."""
        gated = self.config.taylor_order is not None
        changes, self.changes = self.changes, {}
        scalars, gate_before = list(changes.values()), self.gate_read
        if gated:
            self.gate_read = call.modulated().detach()
            if gate_before is not None:
                scalars.append(relative_change(self.gate_read, gate_before))
        values = to_host(scalars)
        changes = dict(zip(changes, values, strict=False))
        inside = self.config.step_start <= self.step.noise_level <= self.config.step_end
        forced = self.count == 0 or not inside or self.step.is_last
        self.extrapolating = gated and self.gate.reuse(
            values[-1] if gate_before is not None else 0.0,
            forced or self.count < self.config.first_enhance or not self.final,
        )
        self.reused = set()
        if self.extrapolating:
            return
        for index, rule in self.rules.items():
            if rule.reuse(changes.get(index, 0.0), forced or not changes):
                self.reused.add(index)


@dataclass(frozen=True)
class TeaBlockCache(CacheConfig):
    """Reuse what a block adds to its streams while P(change of its own modulated input) sums up to little.

    The change is that of the first eighth of the channels. All blocks are decided on at once at the start of a step,
    so that the host waits once and not in every block: the change that a block saw in the step before stands for the
    one that is coming. Blocks before `cache_start`, steps outside of the window and the first and (where it is known)
    last step are computed. What is kept is what a block added, so that what the blocks before it have just computed
    is not lost.

    Args:
        threshold: what a block's sum has to stay below. Zero never reuses.
        coefficients: of the polynomial P, as in `TeaCache`.
        step_start, step_end: window of times (1000 noise, 0 data) in which blocks are reused.
        cache_start: number of the first block that may be reused.
        taylor_order: if given, TeaCache's rule for the first block comes before all: where it holds, all blocks are
            skipped and the image stream behind the last is extrapolated.
        first_enhance: that many steps are computed before the first extrapolation.
    """

    state: ClassVar = TeaBlockCacheState
    looks_inside: ClassVar = True
    reads: ClassVar = True

    threshold: float = 0.25
    coefficients: tuple[float, ...] | None = None
    step_start: float = 50.0
    step_end: float = 950.0
    cache_start: int = 0
    taylor_order: int | None = None
    first_enhance: int = 3

    def __post_init__(self):
        check_number(self, "threshold")
        check_window(self, "step_start", "step_end")
        check_count(self, "cache_start", 0)
        check_count(self, "first_enhance")
        if self.coefficients is not None:
            check_coefficients(self, "coefficients")
        if self.taylor_order is not None:
            check_count(self, "taylor_order", 0)

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        count = len(structure.blocks)
        if self.cache_start >= count:
            raise UserError(f"TeaBlockCache: cache_start {self.cache_start} leaves none of this model's {count} blocks")
        warn_of_raw_change(self.coefficients, structure)
