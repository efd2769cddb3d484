"""Batches by step, read ahead in background threads."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from distill.data.order import batch_indices
from distill.data.records import whole_number


class Batches(Protocol):
    """What a Loader reads from: ImageBatches or LatentCache."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> dict[str, Any]: ...


class Loader:
    """The batch of any (step, micro-step), with the following ones prepared meanwhile.

    What a batch holds depends on the counters alone (see batch_indices), so a run continues by asking for its next
    step; there is no position to save. Use as a context manager, or call close().

    Args:
        batch_size: records a micro-step on this rank.
        num_workers: threads, each preparing whole batches; 0 reads in the caller's thread.
        prefetch: how many batches are prepared ahead.

    Attributes:
        wait_seconds: total time that batch() has kept its caller waiting.
    """

    def __init__(
        self,
        batches: Batches,
        batch_size: int,
        seed: int,
        *,
        micro_steps: int = 1,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 2,
        prefetch: int = 4,
    ):
        self._batches = batches
        self._counts = whole_number(batch_size, "batch_size", 1), whole_number(seed, "seed", 0)
        self._split = {"micro_steps": whole_number(micro_steps, "micro_steps", 1), "rank": rank, "world": world}
        self._prefetch = whole_number(prefetch, "prefetch", 1)
        whole_number(num_workers, "num_workers", 0)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._pending: dict[int, Future] = {}
        self.wait_seconds = 0.0

    def batch(self, step: int, micro_step: int = 0) -> dict[str, Any]:
        """The batch of this step and micro-step. What went wrong while reading it is raised here."""
        if step < 0 or not 0 <= micro_step < self._split["micro_steps"]:
            raise ValueError(f"no such batch: {step=}, {micro_step=} of {self._split['micro_steps']}")
        started = time.perf_counter()
        try:
            position = step * self._split["micro_steps"] + micro_step
            if self._pool is None:
                return self._read(position)
            wanted = range(position, position + self._prefetch + 1)
            for stale in self._pending.keys() - set(wanted):
                self._pending.pop(stale).cancel()
            for ahead in wanted:
                if ahead not in self._pending:
                    self._pending[ahead] = self._pool.submit(self._read, ahead)
            return self._pending.pop(position).result()
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _read(self, position: int) -> dict[str, Any]:
        step, micro_step = divmod(position, self._split["micro_steps"])
        return self._batches.fetch(batch_indices(len(self._batches), *self._counts, step, micro_step, **self._split))

    def close(self) -> None:
        """Stop the threads; batches being prepared are finished and dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
