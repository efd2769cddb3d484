"""Samplers of students as recipe sections, and as `--set` of `distill/evaluate.py`."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from distill.metrics.sampling import Sampler
from distill.recipe import entry, number
from fast_diffusers.samplers import trigflow, unified
from fast_diffusers.samplers.trigflow import check_angles


@dataclass(frozen=True)
class UnifiedConfig:
    """Settings of `fast_diffusers.samplers.unified`."""

    style: Literal["few", "any", "mul"] = entry("any", doc="target time told: 0, the next level, or the level itself")
    order: int = number(1, minimum=1, maximum=2, doc="2: with a correction from the next level")
    correction: Literal["published", "balanced"] = entry("published", doc="of order 2; balanced: safe near pure noise")
    stochasticity: float = number(0.0, minimum=0, maximum=1, doc="share of fresh noise at each level")
    extrapolation: float = number(0.0, minimum=0, doc="along the change from the last level to this one")
    time_warp: tuple[float, float, float] = number((1.0, 1.0, 1.0), above=0, doc="Kumaraswamy's (a, b, c)")
    gap: tuple[float, float] = number((0.0, 0.0), minimum=0, below=1, doc="of the levels to noise and to data")

    def __post_init__(self) -> None:
        if sum(self.gap) >= 1:
            raise ValueError(f"gap {list(self.gap)} leaves no time to sample: its sum must be below 1")

    def sampler(self) -> Sampler:
        """`unified` with these settings."""
        return partial(unified, **asdict(self))


@dataclass(frozen=True)
class SampleConfig(UnifiedConfig):
    """How the sample grids of a training run are made."""

    steps: int = number(2, minimum=1, doc="number of steps")

    def sampler(self) -> Sampler:
        """See `UnifiedConfig`; the number of steps is for the caller to give."""
        return partial(unified, **{name: value for name, value in asdict(self).items() if name != "steps"})


@dataclass(frozen=True)
class TrigFlowConfig:
    """Settings of `fast_diffusers.samplers.trigflow`."""

    angles: tuple[float, ...] | None = number(
        None, minimum=0, doc="from noise (pi / 2) to data (0), read at equal parts of the way; null: the published ones"
    )

    def __post_init__(self) -> None:
        if self.angles is not None:
            check_angles(self.angles)

    def sampler(self) -> Sampler:
        """`trigflow` with these settings."""
        return partial(trigflow, angles=self.angles)


SAMPLERS = {"unified": UnifiedConfig, "trigflow": TrigFlowConfig}
"""Section of a sampler by its name."""
