"""TaylorSeer: extrapolate what every sublayer gives (Liu et al. 2025, arXiv 2503.06923)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from fast_diffusers.caching.families import Block, Site, Structure
from fast_diffusers.caching.method import BranchState, CacheConfig, SiteCall, Step, check_count
from fast_diffusers.caching.taylor import TaylorSeries
from fast_diffusers.errors import UserError


class TaylorSeerState(BranchState):
    """Keeps a series for each sublayer whose result a block gates and adds."""

    def __init__(self, config: TaylorSeer, structure: Structure):
        super().__init__(config, structure)
        self.series: defaultdict[tuple[int, str], TaylorSeries] = defaultdict(lambda: TaylorSeries(config.max_order))
        self.full = True

    def begin(self, step: Step) -> None:
        super().begin(step)
        since = self.count - (self.config.first_enhance - 1)
        self.full = since <= 0 or since % self.config.interval == 0

    def site(self, call: SiteCall) -> Any:
        """See `BranchState`."""
        feeds = call.site in call.block.kind.feeders
        if self.full:
            result = call.compute()
            if not feeds:
                self.series[call.key].update(self.step.index, result)
            return result
        # What feeds a predicted result is not looked at: one channel will do.
        return call.first_input[..., :1] if feeds else self.series[call.key].predict(self.step.index)


@dataclass(frozen=True)
class TaylorSeer(CacheConfig):
    """Compute the first steps and then every `interval`-th; in between, predict what the sublayers give.

    Attention and feed-forward results of image and text are predicted before gating: modulation and gates are those of
    the step. Where a block has both in one projection (FLUX's single blocks), that projection's result is.

    Args:
        interval: distance of computed steps, 2 to 6 are usual. One computes everything.
        max_order: of the extrapolation, 1 to 3 are usual.
        first_enhance: that many steps at the start are computed.
    """

    state: ClassVar = TaylorSeerState
    looks_inside: ClassVar = True

    interval: int = 3
    max_order: int = 1
    first_enhance: int = 3

    def __post_init__(self):
        check_count(self, "interval")
        check_count(self, "max_order", 0)
        check_count(self, "first_enhance")

    def sites(self, block: Block) -> list[Site]:
        """See `CacheConfig`."""
        return block.sites((*block.kind.branches, *block.kind.feeders))

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        if not all(block.sites(block.kind.branches) for block in structure.blocks):
            raise UserError(
                f"TaylorSeer keeps the results of attention and feed-forward layers, and blocks of this "
                f"{type(structure.transformer).__name__} have none that are known"
            )
