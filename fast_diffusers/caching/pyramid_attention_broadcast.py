"""Pyramid attention broadcast: use an attention result for several steps (Zhao et al. 2024, arXiv 2408.12588)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fast_diffusers.caching.families import Block, Site, Structure
from fast_diffusers.caching.method import (
    BranchState,
    CacheConfig,
    SiteCall,
    check_count,
    check_window,
    require_attention,
)
from fast_diffusers.caching.taylor import map_tensors


class PyramidAttentionBroadcastState(BranchState):
    """Keeps the last result of each attention layer."""

    def __init__(self, config: PyramidAttentionBroadcast, structure: Structure):
        super().__init__(config, structure)
        self.kept: dict[tuple[int, str], Any] = {}

    def site(self, call: SiteCall) -> Any:
        """See `BranchState`."""
        every = self.config.cross_range if call.site.role == "cross" else self.config.spatial_range
        inside = self.config.end < self.step.noise_level < self.config.start
        if inside and call.key in self.kept and self.count % every:
            return self.kept[call.key]
        result = call.compute()
        self.kept[call.key] = map_tensors(lambda x: x.detach(), result)
        return result


@dataclass(frozen=True)
class PyramidAttentionBroadcast(CacheConfig):
    """Inside of a window of times, compute attention in every `range`-th step and use its result until the next.

    Args:
        spatial_range: for attention of the image to itself or to image and text together. One computes everything.
        cross_range: for attention of the image to the text alone.
        start, end: the window of times (1000 noise, 0 data), without its ends.
    """

    state: ClassVar = PyramidAttentionBroadcastState
    looks_inside: ClassVar = True

    spatial_range: int = 2
    cross_range: int = 2
    start: float = 800.0
    end: float = 100.0

    def __post_init__(self):
        check_count(self, "spatial_range")
        check_count(self, "cross_range")
        check_window(self, "end", "start")

    def sites(self, block: Block) -> list[Site]:
        """See `CacheConfig`."""
        return block.sites(block.kind.attention)

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        require_attention(self, structure)
