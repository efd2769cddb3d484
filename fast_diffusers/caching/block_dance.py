"""BlockDance: keep what the shallow blocks made, run the deep ones (Zhang et al. 2025, arXiv 2503.15927)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

from fast_diffusers.caching.families import Streams, Structure
from fast_diffusers.caching.method import (
    BlockCall,
    BranchState,
    CacheConfig,
    Step,
    add,
    check_count,
    check_window,
    residual,
)
from fast_diffusers.errors import UserError


class BlockDanceState(BranchState):
    """Keeps, for each segment, what its shallow blocks together add."""

    def __init__(self, config: BlockDance, structure: Structure):
        super().__init__(config, structure)
        self.depths = config.depths(structure)
        self.residuals: dict[int, Streams] = {}
        self.entry: Streams = ()
        self.inside = -1
        self.shallow = False  # whether the shallow blocks are skipped in this step

    def begin(self, step: Step) -> None:
        super().begin(step)
        self.shallow = False
        if self.config.end <= step.noise_level <= self.config.start:
            self.inside += 1
            self.shallow = self.inside % self.config.period != 0

    def block(self, call: BlockCall) -> Streams:
        """See `BranchState`."""
        block = call.block
        depth = self.depths[block.segment]
        if block.position >= depth:
            return call.compute()
        if block.position == 0:
            self.entry = call.streams
        streams = call.streams if self.shallow else call.compute()
        if block.position < depth - 1:
            return streams
        entry, self.entry = self.entry, ()
        if self.shallow:
            return add(entry, self.residuals[block.segment])
        self.residuals[block.segment] = residual(streams, entry)
        return streams


@dataclass(frozen=True)
class BlockDance(CacheConfig):
    """In most steps, skip the shallow blocks of each segment and add what they added at the last full step.

    The reference stores the streams themselves; the sum of what the blocks added keeps what is new at their entrance.

    Args:
        start, end: the window of times (1000 noise, 0 data) outside of which every step is full.
        period: every `period`-th step inside of it is full. One computes everything.
        depth: how many blocks are shallow: a fraction of each segment's, or a number for each segment. FLUX.1-dev's
            published 14 double and 29 single blocks are three quarters.
    """

    state: ClassVar = BlockDanceState

    start: float = 900.0
    end: float = 100.0
    period: int = 4
    depth: float | tuple[int, ...] = 0.75

    def __post_init__(self):
        check_window(self, "end", "start")
        check_count(self, "period")
        counts = isinstance(self.depth, tuple) and all(isinstance(x, Integral) and x >= 0 for x in self.depth)
        fraction = isinstance(self.depth, Real) and not isinstance(self.depth, bool) and 0 < self.depth <= 1
        if not counts and not fraction:
            raise UserError(f"BlockDance: depth must be a fraction up to 1 or a tuple of numbers, got {self.depth!r}")

    def depths(self, structure: Structure) -> list[int]:
        """Number of shallow blocks in each segment of a model."""
        if isinstance(self.depth, tuple):
            return list(self.depth)
        return [int(length * self.depth + 0.5) for length in structure.segment_lengths]

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        lengths, depths = structure.segment_lengths, self.depths(structure)
        if len(depths) != len(lengths) or any(d > n for d, n in zip(depths, lengths, strict=True)) or not any(depths):
            raise UserError(f"BlockDance: depth {self.depth} does not fit this model's segments of {lengths} blocks")
