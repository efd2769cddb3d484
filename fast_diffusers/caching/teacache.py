"""TeaCache: skip the blocks while what they read has changed little (Liu et al. 2024, arXiv 2411.19108)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from paddle import Tensor

from fast_diffusers.caching.families import Streams, Structure
from fast_diffusers.caching.method import (
    BlockCall,
    CacheConfig,
    check_coefficients,
    check_number,
    polynomial,
    relative_change,
    require_two_blocks,
)
from fast_diffusers.caching.skipping import SkippingState

logger = logging.getLogger(__name__)

RAW_CHANGE = (1.0, 0.0)


def tea_polynomial(coefficients: tuple[float, ...] | None, structure: Structure) -> tuple[float, ...]:
    """The polynomial that was asked for, else the family's, else x itself."""
    return coefficients or structure.family.tea_coefficients or RAW_CHANGE


def warn_of_raw_change(coefficients: tuple[float, ...] | None, structure: Structure) -> None:
    """A warning where `tea_polynomial` has none but x."""
    if coefficients is None and structure.family.tea_coefficients is None:
        logger.warning(
            "no TeaCache polynomial is published for %s: thresholds apply to the change itself; calibrate() fits one",
            type(structure.transformer).__name__,
        )


class AccumulatedChange:
    """TeaCache's rule: acc += P(change); below the threshold reuse, else compute and start again from zero."""

    def __init__(self, threshold: float, coefficients: tuple[float, ...]):
        self.threshold, self.coefficients = threshold, coefficients
        self.total = 0.0

    def reuse(self, change: float, forced: bool = False) -> bool:
        """The decision for one step; `forced` computes. A change that is not a number computes too."""
        if not forced:
            self.total += polynomial(self.coefficients, change)
            if self.total < self.threshold:
                return True
        self.total = 0.0
        return False


class TeaCacheState(SkippingState):
    """Keeps what all blocks together add to the main stream, and what the first block's attention read."""

    def __init__(self, config: TeaCache, structure: Structure):
        super().__init__(config, structure)
        self.rule = AccumulatedChange(config.threshold, tea_polynomial(config.coefficients, structure))
        self.modulated: Tensor | None = None
        self.residual: Tensor | None = None

    def first(self, call: BlockCall) -> Streams:
        modulated, before = call.modulated().detach(), self.modulated
        self.modulated = modulated
        forced = before is None or self.residual is None or self.step.is_last
        change = 0.0 if forced else float(relative_change(modulated, before))
        self.skipping = self.rule.reuse(change, forced)
        return call.streams if self.skipping else call.compute()

    def keep(self, final: Tensor) -> None:
        self.residual = final - self.carried_entry().detach()

    def recall(self) -> Tensor:
        return self.carried_entry() + self.residual


@dataclass(frozen=True)
class TeaCache(CacheConfig):
    """Reuse what all blocks together add to the image while P(change of the first block's input) sums up to little.

    The change is mean|m − m_prev| / mean|m_prev| of the modulated image that the first attention reads. The first and
    (where it is known) the last step are computed.

    Args:
        threshold: what the sum has to stay below; .25, .4, .6, .8 are reported to make FLUX.1-dev 1.5, 1.8, 2.0 and
            2.25 times as fast at 50 steps. Zero never reuses.
        coefficients: of the polynomial P, highest power first. None is the published one for FLUX and P(x) = x for
            models without one; `calibrate` fits one.
    """

    state: ClassVar = TeaCacheState
    looks_inside: ClassVar = True

    threshold: float = 0.25
    coefficients: tuple[float, ...] | None = None

    def __post_init__(self):
        check_number(self, "threshold")
        if self.coefficients is not None:
            check_coefficients(self, "coefficients")

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        require_two_blocks(self, structure)
        warn_of_raw_change(self.coefficients, structure)
