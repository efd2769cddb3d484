"""Confidence-gated Taylor: trust the extrapolation of the model where that of its first block is right."""

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


class CGTaylorState(SkippingState):
    """Keeps series of the main stream behind the first and behind the last block, both from computed steps only."""

    def __init__(self, config: CGTaylor, structure: Structure):
        super().__init__(config, structure)
        self.head, self.final = TaylorSeries(config.max_order), TaylorSeries(config.max_order)

    def first(self, call: BlockCall) -> Streams:
        streams = call.compute()
        actual = streams[0].detach()
        if self.final:
            error = float(relative_change(self.head.predict(self.step.index), actual))
            self.skipping = error < self.config.threshold
        if not self.skipping:
            self.head.update(self.step.index, actual)
        return streams

    def keep(self, final: Tensor) -> None:
        self.final.update(self.step.index, final)

    def recall(self) -> Tensor:
        return self.final.predict(self.step.index)


@dataclass(frozen=True)
class CGTaylor(CacheConfig):
    """Run the first block and predict it too; if the prediction is right, predict the last block's result.

    Right is mean|predicted − actual| / mean|actual| < threshold. The gate needs no warm-up beyond the first step.

    Args:
        threshold: .03 to .13 are usual. Zero never reuses.
        max_order: of both extrapolations.
    """

    state: ClassVar = CGTaylorState

    threshold: float = 0.06
    max_order: int = 1

    def __post_init__(self):
        check_number(self, "threshold")
        check_count(self, "max_order", 0)

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        require_two_blocks(self, structure)
