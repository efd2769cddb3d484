"""FirstBlock-Taylor: run the first block; if it adds what it added before, extrapolate the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paddle import Tensor

from fast_diffusers.caching.families import Streams, Structure
from fast_diffusers.caching.method import (
    BlockCall,
    CacheConfig,
    check_count,
    check_number,
    relative_change,
    require_two_blocks,
)
from fast_diffusers.caching.skipping import SkippingState
from fast_diffusers.caching.taylor import TaylorSeries


class FirstBlockTaylorState(SkippingState):
    """Keeps what the first block added at the last computed step, and the main stream behind the last block."""

    def __init__(self, config: FirstBlockTaylor, structure: Structure):
        super().__init__(config, structure)
        self.added: Tensor | None = None
        self.final = TaylorSeries(config.max_order)

    def first(self, call: BlockCall) -> Streams:
        streams = call.compute()
        added = (streams[0] - call.streams[0]).detach()
        forced = self.count < self.config.first_enhance or not self.final or self.step.is_last
        self.skipping = not forced and float(relative_change(added, self.added)) < self.config.threshold
        if not self.skipping:
            self.added = added
        return streams

    def keep(self, final: Tensor) -> None:
        self.final.update(self.step.index, final)

    def recall(self) -> Tensor:
        return self.final.predict(self.step.index)


@dataclass(frozen=True)
class FirstBlockTaylor(CacheConfig):
    """Always run the first block; while its contribution is close to that of the last computed step, predict the rest.

    Close is mean|ρ_prev − ρ| / mean|ρ_prev| < threshold, ρ being what the block adds to the image (the rule of
    ParaAttention's First Block Cache). What is predicted is the image stream behind the last block.

    Args:
        threshold: .05 to .8 are usual. Zero never reuses.
        max_order: of the extrapolation.
        first_enhance: that many steps at the start are computed; the last is too, where it is known. Set it to 1 for
            students of few steps.
    """

    state: ClassVar = FirstBlockTaylorState

    threshold: float = 0.05
    max_order: int = 1
    first_enhance: int = 3

    def __post_init__(self):
        check_number(self, "threshold")
        check_count(self, "max_order", 0)
        check_count(self, "first_enhance")

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        require_two_blocks(self, structure)
