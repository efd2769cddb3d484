"""TeaBlockCache: TeaCache's rule for every block by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paddle import Tensor

from fast_diffusers.caching.families import Streams, Structure
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


class TeaBlockCacheState(BranchState):
    """Keeps, for each block, what it read and what it added."""

    def __init__(self, config: TeaBlockCache, structure: Structure):
        super().__init__(config, structure)
        coefficients = tea_polynomial(config.coefficients, structure)
        self.governed = range(config.cache_start, len(structure.blocks))
        self.rules = {index: AccumulatedChange(config.threshold, coefficients) for index in self.governed}
        self.gate = AccumulatedChange(config.threshold, coefficients)
        self.read: dict[int, Tensor] = {}
        self.gate_read: Tensor | None = None
        self.changes: dict[int, Tensor] = {}  # on the device, since the last decision
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
            self._measure(index, call.modulated())
            streams = add(inputs, self.residuals[index])
        elif index in self.governed:
            streams, read = call.compute_and_read()
            self._measure(index, read)
            self.residuals[index] = residual(streams, inputs)
        else:
            streams = call.compute()
        if call.is_last and self.config.taylor_order is not None:
            self.final.update(self.step.index, streams[0])
        return streams

    def _measure(self, index: int, modulated: Tensor) -> None:
        read = first_eighth(modulated).detach()
        if index in self.read:
            self.changes[index] = relative_change(read, self.read[index])
        self.read[index] = read

    def _decide(self, call: BlockCall) -> None:
        """All decisions of a step, from one transfer."""
        indices, scalars = list(self.changes), list(self.changes.values())
        gated = self.config.taylor_order is not None
        if gated:
            read, before = call.modulated().detach(), self.gate_read
            self.gate_read = read
            if before is not None:
                scalars.append(relative_change(read, before))
        values = to_host(scalars)
        change = dict(zip(indices, values[: len(indices)], strict=True))
        self.changes = {}
        inside = self.config.step_start <= self.step.noise_level <= self.config.step_end
        forced = self.count == 0 or not inside or self.step.is_last
        self.extrapolating = gated and self.gate.reuse(
            values[-1] if len(values) > len(indices) else 0.0,
            forced or self.count < self.config.first_enhance or not self.final,
        )
        self.reused = set()
        if self.extrapolating:
            return
        for index, rule in self.rules.items():
            unknown = index not in change or index not in self.residuals
            if rule.reuse(change.get(index, 0.0), forced or unknown):
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
