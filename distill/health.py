"""Guards on the metrics of a run: loss spikes, a saturated discriminator, samples that collapse or drift.

They read logged numbers by name and change nothing. A metric that a run does not log is not guarded; values that are
not finite are left to `trainer.on_nonfinite`.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

from distill.config import HealthConfig
from fast_diffusers.errors import UserError


class UnhealthyError(UserError):
    """A metric passed its limit and the recipe says to stop."""


class Finding(NamedTuple):
    """A metric beyond its limit."""

    metric: str
    value: float
    side: str  # "above" or "below"
    limit: float
    what: str

    def __str__(self) -> str:
        return f"{self.metric} is {self.value:.4g}, {self.side} the limit of {self.limit:.4g}: {self.what}"


class Health:
    """Watches the lines of a log. What it finds depends on the lines since the start of the run and on nothing else.

    Guards, each with an action of its own in the config:
        loss spike: `<player>_loss` above m + (k − 1)·a, with m and a the running medians of the loss and of its
            magnitude. For a positive loss this is k times the median.
        discriminator saturation: `logit_real` − `logit_fake` above a limit, or the loss `discriminator` below one (its
            floor is 0), for `patience` values running.
        diversity drop: `sample_diversity` below a fraction of its reference.
        drift: `sample_mean` further from its reference than a multiple of the reference of `sample_std`, or
            `sample_std` beyond a factor of its reference, either way.
    The reference of a sample metric is the median of its first values.
    """

    def __init__(self, config: HealthConfig):
        self.config = config
        self.lines = 0
        self.losses: dict[str, list[float]] = {}  # the last `window` values
        self.references: dict[str, list[float]] = {}  # the first `reference` values
        self.beyond: dict[str, int] = {}  # how many values running were beyond the limit
        self.warned: dict[str, int] = {}  # the line of the last warning

    def observe(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """Take the metrics logged after `step` steps; return the warnings that are due, one line each.

        A metric's warning comes back at the earliest `repeat_every` lines after its last one.

        Raises:
            UnhealthyError: a guard whose action is "stop" found something; the message names all that it found.
        """
        config, self.lines = self.config, self.lines + 1
        values = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        guards = (
            (config.on_loss_spike, self._loss_spikes(values)),
            (config.on_discriminator_saturation, self._saturation(values)),
            (config.on_diversity_drop, self._diversity_drop(values)),
            (config.on_drift, self._drift(values)),
        )
        by_action: dict[str, list[Finding]] = {"warn": [], "stop": [], "ignore": []}
        for action, findings in guards:
            by_action[action] += findings
        if fatal := by_action["stop"]:
            raise UnhealthyError(f"step {step}: {'; '.join(map(str, fatal))}; stopped, as trainer.health says")
        return [f"step {step}: {finding}" for finding in by_action["warn"] if self._due(finding.metric)]

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, JSON-able."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _STATE}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        for name in _STATE:
            setattr(self, name, copy.deepcopy(state[name]))

    # ------------------------------------------------------------------------------------------ guards
    def _loss_spikes(self, values: Mapping[str, float]) -> Iterator[Finding]:
        factor, window = self.config.spike_factor, self.config.spike_window
        for name, value in values.items():
            if not name.endswith("_loss"):
                continue
            past = self.losses.get(name, [])
            if len(past) == window:
                limit = median(past) + (factor - 1) * median(map(abs, past))
                if value > limit:
                    yield Finding(name, value, "above", limit, "the loss spikes")
            self.losses[name] = [*past, value][-window:]

    def _saturation(self, values: Mapping[str, float]) -> Iterator[Finding]:
        if values.keys() >= {"logit_real", "logit_fake"}:
            gap, limit = values["logit_real"] - values["logit_fake"], self.config.max_logit_gap
            if self._long("logit_real - logit_fake", gap > limit):
                yield Finding("logit_real - logit_fake", gap, "above", limit, "the discriminator is saturated")
        if "discriminator" in values:
            loss, limit = values["discriminator"], self.config.min_discriminator_loss
            if self._long("discriminator", loss < limit):
                yield Finding("discriminator", loss, "below", limit, "the discriminator is saturated")

    def _diversity_drop(self, values: Mapping[str, float]) -> Iterator[Finding]:
        if (reference := self._reference("sample_diversity", values)) is not None:
            value, limit = values["sample_diversity"], self.config.min_diversity * reference
            if value < limit:
                yield Finding("sample_diversity", value, "below", limit, "samples resemble each other")

    def _drift(self, values: Mapping[str, float]) -> Iterator[Finding]:
        mean, std = (self._reference(name, values) for name in ("sample_mean", "sample_std"))
        if mean is not None and std is not None:
            value, margin = values["sample_mean"], self.config.max_mean_drift * std
            if abs(value - mean) > margin:
                side, limit = ("above", mean + margin) if value > mean else ("below", mean - margin)
                yield Finding("sample_mean", value, side, limit, "the mean of samples drifts")
        if std is not None:
            value, factor = values["sample_std"], self.config.max_std_factor
            if not std / factor <= value <= std * factor:
                side, limit = ("above", std * factor) if value > std else ("below", std / factor)
                yield Finding("sample_std", value, side, limit, "the spread of samples drifts")

    # ------------------------------------------------------------------------------------------ memory
    def _reference(self, name: str, values: Mapping[str, float]) -> float | None:
        """Median of a metric's first values; None if this line has no value, or they are not complete without it."""
        if name not in values:
            return None
        first = self.references.setdefault(name, [])
        if len(first) < self.config.reference:
            first.append(values[name])
            return None
        return median(first)

    def _long(self, name: str, beyond: bool) -> bool:
        self.beyond[name] = self.beyond.get(name, 0) + 1 if beyond else 0
        return self.beyond[name] >= self.config.patience

    def _due(self, metric: str) -> bool:
        last = self.warned.get(metric)
        due = last is None or self.lines - last >= self.config.repeat_every
        if due:
            self.warned[metric] = self.lines
        return due


_STATE = ("lines", "losses", "references", "beyond", "warned")
