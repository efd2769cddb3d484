"""Few-step sampling of any pipeline in one call, with settings that suit the number of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.schedulers import UnifiedScheduler


def good_settings(evaluations: int, takes_target_time: bool) -> dict[str, Any]:
    """Settings of the unified sampler published for few-step (up to 4), any-step (to 8) and multi-step models."""
    if evaluations == 1:
        return {"style": "few", "stochasticity": 0.8, "gap": (0.001, 0.0)}
    if evaluations == 2:
        return {"style": "few", "stochasticity": 1.0, "gap": (0.001, 0.6)}
    if evaluations <= 4:
        return {"style": "few", "stochasticity": 1.0, "gap": (0.001, 0.5)}
    if evaluations <= 8:
        return {"style": "any" if takes_target_time else "mul", "stochasticity": 0.0, "gap": (0.001, 0.0)}
    return {"style": "mul", "stochasticity": 0.0, "gap": (0.001, 0.0), "time_warp": (1.17, 0.8, 1.1)}


class UnifiedSampler:
    """`UnifiedSampler(model=pipe, order=2, steps=2).sample(prompt="a cat")` -> images.

    Settings that are not given are the published ones for the number of evaluations (`good_settings`).

    Args:
        model: a pipeline of this package or of ppdiffusers with a flow-matching model; it is not changed.
        order, stochasticity, extrapolation, time_warp, gap, style, time_input: see `schedulers.UnifiedScheduler`; the
            correction of order 2 is the balanced one.
        steps: number of evaluations of the model; order 2 makes them in (steps + 1) // 2 steps.
        random_aug: put fresh noise on the predicted data between the steps, where the published settings do: with up to
            4 evaluations. Order 2 does without unless `stochasticity` is given: its correction enlarges that noise.

    Raises:
        UserError: a setting out of its range, or a model that is not a pipeline.
    """

    def __init__(
        self,
        model: Any,
        order: int = 1,
        steps: int = 2,
        random_aug: bool = True,
        *,
        stochasticity: float | str | None = None,
        extrapolation: float = 0.0,
        time_warp: Sequence[float] | None = None,
        gap: Sequence[float] | None = None,
        style: str | None = None,
        time_input: str = "pair",
    ):
        if not callable(model) or not hasattr(model, "scheduler"):
            raise UserError(f"model must be a pipeline, got {type(model).__name__}")
        self.model, self.steps = model, steps
        given = {"stochasticity": stochasticity, "time_warp": time_warp, "gap": gap, "style": style}
        given = {name: value for name, value in given.items() if value is not None}
        # The published correction enlarges the errors of a model near pure noise until nothing else is left.
        shared = {"order": order, "correction": "balanced", "extrapolation": extrapolation, "time_input": time_input}
        try:
            scheduler = UnifiedScheduler(**shared, **given)
            scheduler.set_timesteps(steps)
        except (TypeError, ValueError) as error:
            raise UserError(f"UnifiedSampler: {error}") from error
        evaluations = len(scheduler.timesteps)
        settings = good_settings(evaluations, self._takes_target_time() or time_input == "shortcut")
        if not random_aug or (order == 2 and evaluations > 1):
            settings["stochasticity"] = 0.0
        self.settings = shared | settings | given
        """Of the scheduler."""
        if self.settings["style"] == "any" and not isinstance(model, Pipeline) and time_input == "pair":
            raise UserError(
                f'style "any" needs a pipeline that tells its model the target time, and {type(model).__name__} does '
                'not: use style "few" or "mul", or time_input "shortcut" if the model was trained with that'
            )

    def sample(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """Images of prompts, as the pipeline's call with these options gives them (a list of PIL images by default)."""
        before = self.model.scheduler
        self.model.scheduler = UnifiedScheduler.from_config(before.config, **self.settings)
        try:
            return self.model(prompt=prompt, num_inference_steps=self.steps, **options).images
        finally:
            self.model.scheduler = before

    def _takes_target_time(self) -> bool:
        return isinstance(self.model, Pipeline) and getattr(self.model.denoiser, "takes_target_time", False)
