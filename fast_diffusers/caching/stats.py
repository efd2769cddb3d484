"""What a cache did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class StepRecord:
    """One forward: its step and branch, the time (1000 noise, 0 data), and how many of the parts were computed."""

    step: int
    branch: int
    noise_level: float
    computed: int
    reused: int


@dataclass(frozen=True)
class CacheStats:
    """What has been computed and what reused since the cache was enabled.

    Args:
        method: the config's name.
        runs: denoising runs.
        forwards: calls of the transformer; `dropped` of them were answered with another call's result.
        computed, reused: how often each part was; a part is a block, or a sublayer for methods that act on these. The
            sum of both is `forwards` − `dropped` for every part.
        compute_fraction: estimated share of the transformer's arithmetic that was done, parts counting as many as they
            have parameters.
        last_run: the forwards of the newest run.
    """

    method: str
    runs: int
    forwards: int
    dropped: int
    computed: MappingProxyType[str, int]
    reused: MappingProxyType[str, int]
    compute_fraction: float
    last_run: tuple[StepRecord, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.runs} runs, {self.forwards} forwards, "
            f"about {100 * self.compute_fraction:.0f}% of the arithmetic"
        ]
        width = max(map(len, self.computed), default=0)
        lines += [f"  {name:{width}}  computed {n}, reused {self.reused[name]}" for name, n in self.computed.items()]
        return "\n".join(lines)


@dataclass
class Counters:
    """The running sums behind `CacheStats`; `sizes` are the parameters of each part, `total` those of the model."""

    sizes: dict[str, int]
    total: int
    forwards: int = 0
    dropped: int = 0
    spent: float = 0.0
    computed: Counter = field(default_factory=Counter)
    reused: Counter = field(default_factory=Counter)
    records: list[StepRecord] = field(default_factory=list)
    saved: int = 0  # parameters, in this forward
    ran: int = 0  # parts computed in this forward
    skipped: int = 0  # parts reused in it

    def begin(self) -> None:
        """A forward starts."""
        self.saved = self.ran = self.skipped = 0

    def count(self, part: str, computed: bool) -> None:
        """A part of the model was asked for."""
        if computed:
            self.computed[part] += 1
            self.ran += 1
        else:
            self.reused[part] += 1
            self.skipped += 1
            self.saved += self.sizes[part]

    def end(self, step: int, branch: int, noise_level: float, share: float) -> None:
        """A forward is over, of which `share` of the rows was computed."""
        self.forwards += 1
        self.dropped += share == 0
        self.spent += share * (1 - self.saved / self.total)
        self.records.append(StepRecord(step, branch, noise_level, self.ran, self.skipped))

    def snapshot(self, method: str, runs: int) -> CacheStats:
        """The sums as they stand."""
        return CacheStats(
            method,
            runs,
            self.forwards,
            self.dropped,
            MappingProxyType({part: self.computed[part] for part in self.sizes}),
            MappingProxyType({part: self.reused[part] for part in self.sizes}),
            self.spent / self.forwards if self.forwards else 1.0,
            tuple(self.records),
        )
