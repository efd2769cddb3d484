"""Euler's method as a scheduler, with the resolution-dependent shift that FLUX needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from paddle import Tensor
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.random import AnyGenerator
from fast_diffusers.samplers.euler import euler_sigmas, euler_step
from fast_diffusers.schedulers.base import FlowMatchScheduler
from fast_diffusers.time_grids import stretch_to_terminal

ONLY: Mapping[str, Any] = MappingProxyType(
    {
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    }
)
"""Settings of diffusers' scheduler of this name that must have these values, as they have in published models."""


class FlowMatchEulerDiscreteScheduler(FlowMatchScheduler):
    """Reads the `scheduler_config.json` of FLUX.1, Stable Diffusion 3 and 3.5, Qwen-Image and Z-Image.

    Without explicit sigmas it visits 1, 1 - 1/steps, ..., 1/steps, shifted, and 0, as the FLUX pipeline does.

    Args:
        num_train_timesteps: factor between time and `timesteps`.
        shift: constant shift, used unless `use_dynamic_shifting`.
        use_dynamic_shifting: shift by the `mu` given to `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: for the caller, who computes mu from them with
            `time_grids.dynamic_shift_mu`.
        shift_terminal: the last level before 0, to which the shifted levels are stretched
            (`time_grids.stretch_to_terminal`); None or 0 leaves them.

    Raises:
        ValueError: a shift_terminal outside [0, 1).
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
    ):
        if shift_terminal is not None and not 0 <= shift_terminal < 1:
            raise ValueError(f"shift_terminal must lie in [0, 1), got {shift_terminal!r}")
        self._reset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **settings: Any) -> Self:
        """A scheduler of a configuration, ours or one of diffusers' for its scheduler of this name.

        Raises:
            ValueError: a setting of diffusers that is not supported (`ONLY`) and not off.
        """
        given = {**config, **settings}
        for name, value in ONLY.items():
            if given.get(name) not in (None, value):
                raise ValueError(f"{cls.__name__} supports {name} = {value!r} only, this one has {given[name]!r}")
        return super().from_config(config, **settings)

    def _levels(self, steps: int, sigmas: Sequence[float] | None, mu: float) -> np.ndarray:
        levels = euler_sigmas(steps, sigmas, mu)
        if self.config.shift_terminal:
            levels[:-1] = stretch_to_terminal(levels[:-1], self.config.shift_terminal)
        return levels

    def _advance(
        self,
        x: Tensor,
        velocity: Tensor,
        sigma: float,
        sigma_next: float,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        return euler_step(x, velocity, sigma, sigma_next)
