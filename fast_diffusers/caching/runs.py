"""Where a denoising run starts and ends, which step of it a forward belongs to, and which guidance branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from fast_diffusers.caching.families import Structure
from fast_diffusers.caching.method import BranchState, Step


@dataclass
class Branch:
    """The forwards that are the n-th of their steps, and the shapes that they work on."""

    state: BranchState
    shapes: Any


@dataclass
class Run:
    """One denoising run.

    Args:
        total: number of steps, where it is known.
        declared: whether its start and end were told, rather than guessed from the forwards.
    """

    total: int | None = None
    declared: bool = False
    index: int = -1
    times: tuple[float, ...] | None = None
    noise_level: float = 0.0
    calls: list[tuple[Any, Any]] = field(default_factory=list)  # (latents, text) of this step, of guessed runs only
    branch: int = 0
    branches: dict[int, Branch] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


class Runs:
    """Sorts forwards into runs, steps and branches; frees what belongs to a run that is over.

    A pipeline declares its runs. For a transformer on its own they are guessed: a run goes on while the time falls, and
    at the same time while the latents are the same and the text is another. A forward of the same time is another
    branch of guidance; one with other shapes starts its branch anew.
    """

    def __init__(self, structure: Structure, new_state: Callable[[], BranchState]):
        self.structure, self.new_state = structure, new_state
        self.current: Run | None = None
        self.started = 0

    def start(self, total: int | None) -> None:
        """A declared run begins."""
        self._begin(Run(total, declared=True))

    def end(self) -> None:
        """The run is over: forget all that it kept."""
        self.current = None

    def abandon(self) -> None:
        """A forward broke off: forget what was kept, as parts of it may be of this step and others not."""
        if self.current is not None:
            self.current.branches.clear()
            self.current.shared.clear()

    def locate(self, given: Mapping[str, Any]) -> tuple[BranchState, Step]:
        """The branch and the step of a forward with these arguments; waits for the time's value."""
        family = self.structure.family
        times = _times(given[family.time])
        noise_level = family.noise_level(self.structure.transformer.config, sum(times) / len(times))
        latents, text = given[family.latents], given.get(family.text)
        if self.current is None or not (
            self.current.declared or _goes_on(self.current, times, noise_level, latents, text)
        ):
            self._begin(Run())
        run = self.current
        if times == run.times:
            run.branch += 1
        else:
            run.index, run.branch, run.calls = run.index + 1, 0, []
        run.times, run.noise_level = times, noise_level
        if not run.declared:
            run.calls.append((latents, text))
        shapes = (_shapes(latents), _shapes(text))
        branch = run.branches.get(run.branch)
        if branch is None or branch.shapes != shapes:
            branch = run.branches[run.branch] = Branch(self.new_state(), shapes)
        return branch.state, Step(run.index, noise_level, run.total, run.branch, run.shared)

    def _begin(self, run: Run) -> None:
        self.current = run
        self.started += 1


def _goes_on(run: Run, times: tuple[float, ...], noise_level: float, latents: Any, text: Any) -> bool:
    """Whether a forward may belong to a run of which only the forwards are known."""
    if times != run.times:
        return noise_level < run.noise_level
    return _equal(latents, run.calls[0][0]) and not any(_equal(text, before) for _, before in run.calls)


def _times(time: Any) -> tuple[float, ...]:
    """The different values of a time argument."""
    if isinstance(time, Tensor):
        time = (time if time.dtype == paddle.float64 else time.astype("float32")).numpy()
    return tuple(sorted(set(np.asarray(time, dtype=np.float64).ravel().tolist())))


def _shapes(value: Any) -> Any:
    return [_shapes(x) for x in value] if isinstance(value, list | tuple) else getattr(value, "shape", None)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Tensor):
        return a is b
    return list(a.shape) == list(b.shape) and bool(paddle.equal_all(a, b))
