"""SortBlock: recompute the blocks that the extrapolation serves worst, reuse the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import paddle.nn.functional as F
from paddle import Tensor

from fast_diffusers.caching.families import Streams, Structure
from fast_diffusers.caching.method import (
    BlockCall,
    BranchState,
    CacheConfig,
    Step,
    add,
    check_coefficients,
    check_count,
    check_number,
    check_window,
    first_eighth,
    polynomial,
    residual,
    to_host,
)
from fast_diffusers.caching.taylor import TaylorSeries
from fast_diffusers.models.layers import at_least_float32

FLUX_SCHEDULE = (5.67621e-14, -1.36659e-10, 1.16246e-7, -3.97725e-5, 0.00361, 0.56088)
"""Q(t) for FLUX.1-dev, t from 1000, noise, to 0, highest power first."""


def similarity(real: Tensor, predicted: Tensor) -> Tensor:
    """Mean over tokens of the cosine between the first eighths of the channels of two [B, L, C], float32."""
    real, predicted = (at_least_float32(first_eighth(x)) for x in (real, predicted))
    return F.cosine_similarity(real, predicted, axis=-1).mean().astype("float32")


def number_to_recompute(blocks: int, beta: float, schedule: tuple[float, ...], noise_level: float) -> int:
    """int(L·β·Q(t)) + 1, between one and all blocks."""
    return max(1, min(blocks, int(blocks * beta * polynomial(schedule, noise_level)) + 1))


class SortBlockState(BranchState):
    """Keeps a series of what each block adds, and which blocks are recomputed until the next ranking."""

    def __init__(self, config: SortBlock, structure: Structure):
        super().__init__(config, structure)
        self.series = [TaylorSeries(1) for _ in structure.blocks]
        self.everything = frozenset(range(len(structure.blocks)))
        self.ranked = self.recomputed = self.everything
        self.inside = -1  # number of steps before this one inside of the window

    def begin(self, step: Step) -> None:
        super().begin(step)
        self.recomputed = self.everything
        if not self.config.end <= step.noise_level <= self.config.start:
            return
        self.inside += 1
        if self.inside % self.config.interval == 0:
            return
        if self.inside % self.config.interval == 1:
            self.ranked = self._rank()
        self.recomputed = self.ranked

    def block(self, call: BlockCall) -> Streams:
        """See `BranchState`."""
        inputs, series = call.streams, self.series[call.block.index]
        if call.block.index not in self.recomputed:
            return add(inputs, series.predict(self.step.index))
        streams = call.compute()
        series.update(self.step.index, residual(streams, inputs))
        return streams

    def _rank(self) -> frozenset[int]:
        count = len(self.series)
        number = number_to_recompute(count, self.config.beta, self.config.schedule, self.step.noise_level)
        cosines = to_host([similarity(s.last[0], s.predict(self.step.index)[0]) for s in self.series])
        return frozenset(sorted(range(count), key=cosines.__getitem__)[:number])


@dataclass(frozen=True)
class SortBlock(CacheConfig):
    """Between full steps, recompute a few blocks and extrapolate (order 1) what the others add.

    Inside of the window every `interval`-th step is full. On the step after it the blocks are ranked by the cosine of
    what they last added to what is predicted now; the int(L·β·Q(t)) + 1 least similar ones are recomputed until the
    next ranking.

    Args:
        start, end: the window of times (1000 noise, 0 data).
        interval: distance of full steps. One computes everything.
        beta: share of Q(t), from 0 to 1.
        schedule: coefficients of Q, highest power first; the default is for FLUX.1-dev, `calibrate` fits another.
    """

    state: ClassVar = SortBlockState

    start: float = 900.0
    end: float = 50.0
    interval: int = 5
    beta: float = 0.1
    schedule: tuple[float, ...] = FLUX_SCHEDULE

    def __post_init__(self):
        check_window(self, "end", "start")
        check_count(self, "interval")
        check_number(self, "beta", 0, 1)
        check_coefficients(self, "schedule")
