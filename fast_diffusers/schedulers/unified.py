"""The unified sampler as a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import paddle
from paddle import Tensor
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.random import AnyGenerator, noise_source
from fast_diffusers.samplers.unified import Evaluation, State, UnifiedRule, advance
from fast_diffusers.schedulers.base import FlowMatchScheduler

TIME_INPUTS = ("pair", "shortcut")


class UnifiedScheduler(FlowMatchScheduler):
    """`samplers.unified` on the linear path, step by step: same numbers from the same velocities and noise.

    `timesteps` are the model's evaluations: with order 2, S inference steps are (S + 1) // 2 steps of two evaluations
    each but the last, of one. A step counts as taken when both its evaluations are. `target_times` [len(timesteps)],
    float32, holds the target time of each evaluation for models that take one (pipelines of this package pass it on).

    The times are those of `gap` and `time_warp`; a shift that comes with another scheduler's configuration stays in the
    configuration and has no effect here.

    Args:
        num_train_timesteps: factor between time and `timesteps`.
        order, stochasticity, extrapolation, time_warp, gap, style, correction: see `samplers.unified`.
        time_input: "pair" for models that are told time and target time, or only the time; "shortcut" for models
            trained (TwinFlow's LoRA) to read t - target / 2 as their only time: that is then what `timesteps` hold,
            and `target_times` is None.

    Raises:
        ValueError: a setting out of its range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        order: int = 1,
        stochasticity: float | str = 0.0,
        extrapolation: float = 0.0,
        time_warp: Sequence[float] = (1.0, 1.0, 1.0),
        gap: Sequence[float] = (0.0, 0.0),
        style: str = "few",
        correction: str = "published",
        time_input: str = "pair",
    ):
        if time_input not in TIME_INPUTS:
            raise ValueError(f"time_input must be one of {', '.join(TIME_INPUTS)}, got {time_input!r}")
        self._rule = UnifiedRule(order, stochasticity, extrapolation, time_warp, gap, style, correction)
        self.order = order  # evaluations a step, which pipelines ask for
        self.target_times: Tensor | None = None
        self._evaluations: list[Evaluation] = []
        self._state: State | None = None
        self._reset()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the times and go back to the start; call before every image.

        Args:
            num_inference_steps: number of evaluations; an even number makes one less with order 2.
            sigmas: refused, the times are those of `gap` and `time_warp`.
            mu: without effect, see the class.

        Raises:
            ValueError: no steps, steps < 1, or sigmas.
        """
        if num_inference_steps is None or sigmas is not None:
            raise ValueError("UnifiedScheduler visits the times of gap and time_warp: pass num_inference_steps only")
        self._evaluations = self._rule.evaluations(num_inference_steps)
        t, target = np.array([(each.t, each.target) for each in self._evaluations], dtype=np.float32).T
        shortcut = self.config.time_input == "shortcut"
        self.target_times = None if shortcut else paddle.to_tensor(target)
        self._visit(self._rule.times(num_inference_steps).astype(np.float32), t - target / 2 if shortcut else t)
        self._state = None

    def _step_at(
        self,
        index: int,
        sample: Tensor,
        velocity: Tensor,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        dtype = "float64" if sample.dtype == paddle.float64 else "float32"
        state = self._state
        # The state is in float64, what the pipeline carries is rounded: go on from the former unless that was changed.
        x = sample.astype("float64")
        if state is None or not paddle.equal_all(state.x.astype(dtype).astype(sample.dtype).astype("float64"), x):
            state = State(x) if state is None else replace(state, x=x)
        draw = noise_source(sample, generator, None)
        self._state = advance(self._rule, state, self._evaluations[index], velocity, draw)
        return self._state.x.astype(dtype)

    def _index_for(self, timestep: Tensor | float) -> int:
        if self.config.time_input == "pair":
            return super()._index_for(timestep)
        # Two evaluations can show the model the same t - target / 2.
        if abs(float(timestep) - self._timesteps[0]) > 1e-5 * self.config.num_train_timesteps:
            raise ValueError(
                f"timestep {float(timestep):g} is not the first one, {self._timesteps[0]:g}: with "
                'time_input "shortcut", call set_begin_index to begin elsewhere'
            )
        return 0
