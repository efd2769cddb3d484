"""Time grids: the resolution-dependent shift of FLUX and the phases of a phased consistency model.

Everything is computed in float64 with numpy and handed out as float32 arrays. Time runs from 0 (data) to 1 (noise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MIN_TIME = 1e-3
"""Raw time at the lower end of the first cell: the first of FLUX's 1000 training timesteps, not 0."""


def dynamic_shift_mu(
    num_tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """Shift exponent mu for an image of `num_tokens` tokens, (height / 16) * (width / 16) for FLUX.

    Linear through (base_tokens, base_shift) and (max_tokens, max_shift), extrapolated outside: 0.5 at 256 tokens
    (256 x 256 pixels), 1.15 at 4096 (1024 x 1024).
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}")
    return base_shift + (max_shift - base_shift) * (num_tokens - base_tokens) / (max_tokens - base_tokens)


def shift_sigma(t: float | np.ndarray, mu: float) -> np.ndarray:
    """Shifted noise level e^mu / (e^mu + 1/t - 1) of raw time t in [0, 1], float64; 0 and 1 map to themselves exactly.

    A constant shift s (Stable Diffusion 3) is the same map with mu = log(s).
    """
    t = np.asarray(t, dtype=np.float64)
    scale = np.exp(np.float64(mu))
    return scale * t / (scale * t + (1.0 - t))


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Descending levels moved so that the last one is `terminal`, float64: distances to 1 all grow by one factor.

    Noise stays noise: a last level of 1, as of a single step, cannot be moved and is left there.
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    if sigmas[-1] == 1:
        return sigmas
    return 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-1]))


def scheduler_mu(config: Mapping[str, Any], num_tokens: int) -> float:
    """Shift exponent that a flow-matching scheduler's config means for an image of `num_tokens` tokens.

    `dynamic_shift_mu` of its settings with `use_dynamic_shifting`, else the log of its constant `shift`.
    """
    if not config.get("use_dynamic_shifting", False):
        return math.log(config.get("shift", 1.0))
    return dynamic_shift_mu(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


@dataclass(frozen=True)
class PhaseGrid:
    """The solver grid of phased consistency distillation: `num_cells` cells in `num_phases` phases.

    Cell n spans the noise levels from `sigma[n]` = shift((n + 1) / num_cells) down to `sigma_prev[n]` = `sigma[n - 1]`;
    `sigma_prev[0]` is shift(0.001), slightly above 0. Phase m begins at cell floor(m * num_cells / num_phases); a
    student jumps from any level in a phase to the level at the phase's lower end. All arrays are read-only.

    Args:
        num_cells: N, the number of solver steps.
        num_phases: M, the number of phases, 1 to N.
        mu: shift exponent, from `dynamic_shift_mu` or the log of a constant shift; 0 does not shift.
    """

    num_cells: int = 100
    num_phases: int = 4
    mu: float = 0.0

    def __post_init__(self):
        if not 1 <= self.num_phases <= self.num_cells:
            raise ValueError(
                "a phase grid needs 1 <= num_phases <= num_cells, "
                f"got {self.num_phases} phases in {self.num_cells} cells"
            )

    @classmethod
    def for_tokens(cls, num_tokens: int, num_cells: int = 100, num_phases: int = 4, **shift: float) -> PhaseGrid:
        """The grid for images of `num_tokens` tokens; `shift` goes to `dynamic_shift_mu`."""
        return cls(num_cells, num_phases, dynamic_shift_mu(num_tokens, **shift))

    @cached_property
    def starts(self) -> np.ndarray:
        """First cell of each phase, int64 [M]."""
        return _frozen(np.arange(self.num_phases) * self.num_cells // self.num_phases, np.int64)

    @cached_property
    def stops(self) -> np.ndarray:
        """One past the last cell of each phase, int64 [M]."""
        return _frozen(np.append(self.starts[1:], self.num_cells), np.int64)

    @cached_property
    def sigma(self) -> np.ndarray:
        """Upper noise level of each cell, float32 [N]."""
        return _frozen(shift_sigma(np.arange(1, self.num_cells + 1) / self.num_cells, self.mu), np.float32)

    @cached_property
    def sigma_prev(self) -> np.ndarray:
        """Lower noise level of each cell, float32 [N]."""
        return _frozen(np.append(shift_sigma(MIN_TIME, self.mu), self.sigma[:-1]), np.float32)

    @cached_property
    def phase_start(self) -> np.ndarray:
        """e(n): the first cell of the phase that cell n is in, int64 [N]."""
        return _frozen(np.repeat(self.starts, self.stops - self.starts), np.int64)

    @cached_property
    def phase_stop(self) -> np.ndarray:
        """One past the last cell of the phase that cell n is in, int64 [N]."""
        return _frozen(np.repeat(self.stops, self.stops - self.starts), np.int64)

    @cached_property
    def sigma_end(self) -> np.ndarray:
        """Noise level at the lower end of the phase that cell n is in, float32 [N]."""
        return _frozen(self.sigma_prev[self.phase_start], np.float32)

    @cached_property
    def boundaries(self) -> np.ndarray:
        """Lower noise level of each phase, ascending, float32 [M]."""
        return _frozen(self.sigma_prev[self.starts], np.float32)


def _frozen(values: np.ndarray, dtype: type) -> np.ndarray:
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
