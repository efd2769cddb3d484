"""Named random draws: the only source of randomness of an objective.

A draw depends on its name and on the counters of the step, never on the order of the calls or on a generator's
state. Exact resume therefore saves no generator, and a test replays recorded arrays in place of the numbers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import paddle
from scipy import special

Shape = Sequence[int]
Bound = int | paddle.Tensor


class Draws(Protocol):
    """What an objective asks for. `shape[0]` is the local batch; floats come as float32, integers as int64."""

    def normal(self, name: str, shape: Shape) -> paddle.Tensor: ...

    def uniform(self, name: str, shape: Shape) -> paddle.Tensor: ...

    def beta(self, name: str, a: float, b: float, shape: Shape) -> paddle.Tensor: ...

    def integers(self, name: str, low: Bound, high: Bound, shape: Shape) -> paddle.Tensor: ...


class StepDraws:
    """Draws as a pure function of (seed, step, micro_step, rank, name).

    One counter-based stream (Philox) belongs to each (seed, step, micro_step, name). Rank r reads the r-th run of
    `prod(shape)` numbers, so that two ranks with batch B together draw what one process with batch 2B draws. Every
    distribution is the inverse CDF of one uniform number, which keeps the positions exact.
    """

    def __init__(self, seed: int, step: int, micro_step: int = 0, rank: int = 0):
        self.counters = (int(seed), int(step), int(micro_step))
        self.rank = int(rank)

    def _uniform(self, name: str, shape: Shape) -> np.ndarray:
        """float64 in the open interval (0, 1)."""
        count = int(np.prod(shape, dtype=np.int64))
        digest = hashlib.blake2b(repr((*self.counters, name)).encode(), digest_size=16).digest()
        stream = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
        skip, start = divmod(self.rank * count, 4)  # one Philox block holds four numbers
        stream.advance(skip)
        bits = stream.random_raw(start + count)[start:] >> np.uint64(12)
        return ((bits + 0.5) * 2.0**-52).reshape(shape)

    def normal(self, name: str, shape: Shape) -> paddle.Tensor:
        """Standard normal, float32."""
        return paddle.to_tensor(special.ndtri(self._uniform(name, shape)).astype(np.float32))

    def uniform(self, name: str, shape: Shape) -> paddle.Tensor:
        """Uniform in [0, 1], float32."""
        return paddle.to_tensor(self._uniform(name, shape).astype(np.float32))

    def beta(self, name: str, a: float, b: float, shape: Shape) -> paddle.Tensor:
        """Beta(a, b) in [0, 1], float32."""
        return paddle.to_tensor(special.betaincinv(a, b, self._uniform(name, shape)).astype(np.float32))

    def integers(self, name: str, low: Bound, high: Bound, shape: Shape) -> paddle.Tensor:
        """Uniform over {low, …, high − 1}, int64; the bounds may be int64 tensors that broadcast to `shape`.

        Computed on the device, so that bounds which depend on an earlier draw cost no host synchronisation.
        """
        span = high - low
        span = span.astype("float64") if isinstance(span, paddle.Tensor) else float(span)
        offset = paddle.floor(paddle.to_tensor(self._uniform(name, shape)) * span).astype("int64")
        return low + offset


class ReplayDraws:
    """Recorded draws: `ReplayDraws({name: array})` returns the array of that name, whatever the distribution.

    An array keeps its dtype (float64 arrays allow float64 gradient checks). Asking for a name that was not recorded
    is a KeyError, another shape than recorded a ValueError.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)

    def _replay(self, name: str, shape: Shape) -> paddle.Tensor:
        if name not in self.arrays:
            raise KeyError(f"no draw named '{name}' was recorded; there are {sorted(self.arrays)}")
        array = self.arrays[name]
        if tuple(array.shape) != tuple(shape):
            raise ValueError(f"draw '{name}' was recorded with shape {tuple(array.shape)}, asked for {tuple(shape)}")
        return array if isinstance(array, paddle.Tensor) else paddle.to_tensor(np.asarray(array))

    def normal(self, name: str, shape: Shape) -> paddle.Tensor:
        return self._replay(name, shape)

    def uniform(self, name: str, shape: Shape) -> paddle.Tensor:
        return self._replay(name, shape)

    def beta(self, name: str, a: float, b: float, shape: Shape) -> paddle.Tensor:
        return self._replay(name, shape)

    def integers(self, name: str, low: Bound, high: Bound, shape: Shape) -> paddle.Tensor:
        return self._replay(name, shape).astype("int64")
