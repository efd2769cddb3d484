"""Fitting TeaCache's polynomial and SortBlock's schedule for a model, from a few images of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from paddle import Tensor

from fast_diffusers.caching.engine import disable_cache, enable_cache
from fast_diffusers.caching.families import Streams, Structure
from fast_diffusers.caching.method import (
    BlockCall,
    CacheConfig,
    polynomial,
    relative_change,
    require_two_blocks,
    residual,
    to_host,
)
from fast_diffusers.caching.skipping import SkippingState
from fast_diffusers.caching.sortblock import SortBlock
from fast_diffusers.caching.teacache import TeaCache
from fast_diffusers.errors import UserError


@dataclass
class Measurements:
    """One entry for every step but the first of every run.

    `read` is the change of what the first attention reads, `added` that of what all blocks together add, `blocks` the
    mean over blocks of the change of what each adds; all are mean|x − x_prev| / mean|x_prev|.
    """

    noise_level: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)


class _RecorderState(SkippingState):
    """Computes everything and measures it."""

    def __init__(self, config: _Recorder, structure: Structure):
        super().__init__(config, structure)
        self.before: list[Tensor] = []
        self.now: list[Tensor] = []

    def first(self, call: BlockCall) -> Streams:
        self.now = [call.modulated().detach()]
        return call.compute()

    def block(self, call: BlockCall) -> Streams:
        inputs = call.streams
        streams = super().block(call)
        self.now.append(residual(streams, inputs)[0])
        if call.is_last:
            self._measure()
        return streams

    def keep(self, final: Tensor) -> None:
        self.now.insert(1, final - self.carried_entry().detach())

    def _measure(self) -> None:
        if self.before:
            read, added, *blocks = to_host([relative_change(x, y) for x, y in zip(self.now, self.before, strict=True)])
            into = self.config.measurements
            into.noise_level.append(self.step.noise_level)
            into.read.append(read)
            into.added.append(added)
            into.blocks.append(float(np.mean(blocks)))
        self.before = self.now


@dataclass(frozen=True)
class _Recorder(CacheConfig):
    state: ClassVar = _RecorderState

    measurements: Measurements = field(default_factory=Measurements)

    def check(self, structure: Structure) -> None:
        require_two_blocks(self, structure)


@dataclass(frozen=True)
class Calibration:
    """What was fitted for a model; polynomials with the highest power first.

    Args:
        model: name of the transformer's class.
        tea_coefficients: change of the first block's input -> change of what all blocks add.
        sort_schedule: time (1000 noise, 0 data) -> mean change of what a block adds, the largest being 1.
        tea_error, sort_error: root mean square error of each on the measurements.
        measurements: number of them.
    """

    model: str
    tea_coefficients: tuple[float, ...]
    sort_schedule: tuple[float, ...]
    tea_error: float
    sort_error: float
    measurements: int

    def tea_cache(self, **settings: Any) -> TeaCache:
        """`TeaCache` with the fitted polynomial."""
        return TeaCache(coefficients=self.tea_coefficients, **settings)

    def sort_block(self, **settings: Any) -> SortBlock:
        """`SortBlock` with the fitted schedule."""
        return SortBlock(schedule=self.sort_schedule, **settings)

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read what `save` wrote. UserError for a file that is not such a one."""
        try:
            stored = json.loads(Path(path).read_text())
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
        except (OSError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not a calibration file: {error}") from error


def calibrate(
    pipe_or_transformer: Any,
    prompts: Sequence[Any],
    *,
    generate: Callable[[Any], Any] | None = None,
    tea_degree: int = 4,
    sort_degree: int = 5,
    **call: Any,
) -> Calibration:
    """Run a few prompts without reuse, measure how much changes from step to step, and fit.

    TeaCache's polynomial (arXiv 2411.19108, eq. 6) maps the change of what its rule sees to the change of what it
    would reuse. SortBlock's schedule follows how fast what the blocks add changes at each time.

    Args:
        pipe_or_transformer: as for `enable_cache`; no cache may be enabled.
        prompts: about ten are enough.
        generate: makes the image of one prompt; None is pipe(prompt, **call).
        tea_degree, sort_degree: of the polynomials.

    Raises:
        UserError: the runs have too few steps for polynomials of these degrees.
    """
    recorder = _Recorder()
    enable_cache(pipe_or_transformer, recorder)
    try:
        for prompt in prompts:
            generate(prompt) if generate is not None else pipe_or_transformer(prompt, **call)
    finally:
        disable_cache(pipe_or_transformer)
    name = type(getattr(pipe_or_transformer, "transformer", pipe_or_transformer)).__name__
    return fit(recorder.measurements, name, tea_degree, sort_degree)


def fit(measured: Measurements, model: str, tea_degree: int = 4, sort_degree: int = 5) -> Calibration:
    """Least squares fits to measurements, see `Calibration`."""
    count, distinct = len(measured.read), len(set(measured.noise_level))
    if count <= tea_degree or distinct <= sort_degree:
        raise UserError(
            f"{count} measurements at {distinct} times do not fix polynomials of degree {tea_degree} and "
            f"{sort_degree}: use more steps or more prompts"
        )
    blocks = np.array(measured.blocks) / max(measured.blocks)
    tea, tea_error = _fit(measured.read, measured.added, tea_degree)
    sort, sort_error = _fit(measured.noise_level, blocks, sort_degree)
    return Calibration(model, tea, sort, tea_error, sort_error, count)


def _fit(x: Sequence[float], y: Sequence[float], degree: int) -> tuple[tuple[float, ...], float]:
    """(coefficients, highest power first, root mean square error)."""
    scale = float(np.max(np.abs(x))) or 1.0  # powers of a thousand would spoil the normal equations
    scaled = np.polyfit(np.asarray(x, dtype=float) / scale, np.asarray(y, dtype=float), degree)
    coefficients = tuple((scaled / scale ** np.arange(degree, -1, -1)).tolist())
    errors = [polynomial(coefficients, value) - target for value, target in zip(x, y, strict=True)]
    return coefficients, float(np.sqrt(np.mean(np.square(errors))))
