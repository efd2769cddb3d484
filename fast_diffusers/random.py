"""Random normal tensors from explicit generators.

Noise from a generator is drawn on the CPU by numpy and then moved, so a seed gives the same noise on every device, and
Paddle's global random state is neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor
from paddle.base import core


class Generator:
    """An independent stream of random numbers.

    Paddle's own `paddle.Generator` hands out the global generator, and the one that ppdiffusers puts in its place keeps
    nothing on CPU; this one is separate and behaves the same everywhere.

    Args:
        seed: any non-negative integer. Two generators with one seed give the same numbers.
    """

    def __init__(self, seed: int = 0):
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Restart the stream at `seed`; returns self."""
        if seed < 0:
            raise ValueError(f"a seed must not be negative, got {seed}")
        self._seed = int(seed)
        self._numpy = np.random.default_rng(self._seed)
        return self

    def initial_seed(self) -> int:
        """The seed that the stream was started with."""
        return self._seed

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Standard normal numbers, float32, of any shape."""
        return self._numpy.standard_normal(tuple(shape), dtype=np.float32)


AnyGenerator = Generator | core.Generator | str
"""Ours, one of Paddle's (`paddle.seed(0)` returns its global one), or what ppdiffusers makes of
`paddle.Generator().manual_seed(0)`: the name of a saved GPU state, which on CPU stands for the global generator."""


def randn(
    shape: Sequence[int],
    generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
    dtype: str | paddle.dtype = "float32",
) -> Tensor:
    """Standard normal tensor, drawn in float32 and cast to `dtype`.

    Args:
        shape: [B, ...].
        generator: a generator; a list of B generators, one for each row, which makes a row independent of the batch it
            is in; or None for Paddle's global generator. A Paddle generator gives up one integer a call, which seeds
            the numbers. A name from ppdiffusers' `paddle.Generator` draws what ppdiffusers draws.

    Raises:
        ValueError: a list whose length is not B.
        TypeError: something that is not a generator.
    """
    if generator is None:
        return paddle.randn(list(shape), dtype="float32").astype(dtype)
    if isinstance(generator, list | tuple):
        if len(generator) != shape[0]:
            raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}: pass one, or one a row")
        values = np.stack([_normal(one, shape[1:]) for one in generator])
    else:
        values = _normal(generator, shape)
    return paddle.to_tensor(values).astype(dtype)


def noise_source(
    like: Tensor,
    generator: AnyGenerator | Sequence[AnyGenerator] | None,
    noise_sampler: Callable[[list[int]], Tensor] | None,
) -> Callable[[], Tensor]:
    """Where a stochastic sampler draws: float32 noise in the shape of `like`, from `noise_sampler(shape)` if given."""
    shape = list(like.shape)
    if noise_sampler is None:
        return lambda: randn(shape, generator)
    return lambda: noise_sampler(shape).astype("float32")


def _normal(generator: AnyGenerator, shape: Sequence[int]) -> np.ndarray:
    if isinstance(generator, str):
        return paddle.randn(list(shape), dtype="float32", generator=generator).numpy()
    if isinstance(generator, core.Generator):
        generator = Generator(generator.random())
    if not isinstance(generator, Generator):
        raise TypeError(
            f"expected a generator such as fast_diffusers.random.Generator(seed), got {type(generator).__name__}"
        )
    return generator.normal(shape)
