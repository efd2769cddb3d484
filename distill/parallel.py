"""Data parallel training over the processes that `python -m paddle.distributed.launch` starts.

Gloo connects processes on CPUs, NCCL those on GPUs. Every rank holds all weights, works on its own part of the data and
averages the gradients with the others. One process on its own is the world of size 1, where no collective is called.
All ranks must make the same calls in the same order.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.base.core import create_or_get_global_tcp_store

from fast_diffusers.compat import outlive_peers
from fast_diffusers.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among `size` processes, `rank` from 0."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes logs, samples, checkpoints and results."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's run of `total` things: the runs of all ranks follow each other and differ by at most one."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)


def init() -> World:
    """Join the other processes, if the launcher's environment names any; may be called again.

    Raises:
        UserError: they cannot be reached.
    """
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1:
        return World()
    if not dist.is_initialized():
        try:
            dist.init_parallel_env()
            host = dist.ParallelEnv().trainer_endpoints[0].rsplit(":", 1)[0]
            outlive_peers(create_or_get_global_tcp_store(), host, dist.get_rank(), dist.get_world_size())
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"the processes cannot be connected ({reason}); start them with paddle.distributed.launch"
            ) from error
    return World(dist.get_rank(), dist.get_world_size())


@paddle.no_grad()
def average_gradients(parameters: Iterable[Tensor], world: World, bucket_bytes: int = 2**25) -> None:
    """Replace every gradient by its mean over the ranks, with one sum a bucket of gradients of the same dtype.

    Call it once an update, after the last micro-step. The parameters must come in the same order on all ranks. One
    that has a gradient on some ranks only counts as zero on the others; one that has none anywhere stays without.
    A value that is not finite on one rank becomes so on all. It takes memory for a few buckets; a gradient larger than
    `bucket_bytes` is a bucket of its own.
    """
    if world.size == 1:
        return
    parameters = list(parameters)
    present = paddle.to_tensor([parameter.grad is not None for parameter in parameters], dtype="int32")
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    somewhere = [parameter for parameter, flag in zip(parameters, present.tolist(), strict=True) if flag]
    for bucket in _buckets(somewhere, bucket_bytes):
        gradients = [p.grad if p.grad is not None else paddle.zeros(p.shape, p.dtype) for p in bucket]
        flat = paddle.concat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        means = (flat / world.size).split([p.size for p in bucket])
        for parameter, gradient, mean in zip(bucket, gradients, means, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            paddle.assign(mean.reshape(parameter.shape), parameter.grad)


def _buckets(parameters: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Runs of parameters of one dtype whose gradients have `limit` bytes or less, or are one."""
    by_dtype: dict[paddle.dtype, list[Tensor]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for members in by_dtype.values():
        bucket: list[Tensor] = []
        filled = 0
        for parameter in members:
            size = parameter.size * parameter.element_size()
            if bucket and filled + size > limit:
                yield bucket
                bucket, filled = [], 0
            bucket.append(parameter)
            filled += size
        yield bucket


def average_values(values: Mapping[str, Tensor | float], world: World) -> dict[str, float]:
    """Scalars as numbers, each the mean over the ranks. All ranks must name the same."""
    names = sorted(values)
    numbers = {name: float(values[name]) for name in values}
    if world.size == 1 or not names:
        return numbers
    total = paddle.to_tensor([numbers[name] for name in names], dtype="float64")
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return numbers | dict(zip(names, (total / world.size).tolist(), strict=True))


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank; the answer is the same on all."""
    if world.size == 1:
        return flag
    seen = paddle.to_tensor([int(flag)], dtype="int32")
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


@paddle.no_grad()
def broadcast_parameters(parameters: Iterable[Tensor], world: World) -> None:
    """Give the tensors, in place, the values they have on rank 0."""
    if world.size > 1:
        for parameter in parameters:
            dist.broadcast(parameter, src=0)


def gather_rows(rows: np.ndarray, start: int, total: int, world: World) -> np.ndarray:
    """Join what the ranks hold, each some rows of [total, ...] from row `start`, to the whole, on every rank.

    Exact: each row is summed with zeros.
    """
    if world.size == 1:
        return rows
    whole = np.zeros((total, *rows.shape[1:]), rows.dtype if rows.dtype.itemsize >= 4 else np.int32)
    whole[start : start + len(rows)] = rows
    summed = paddle.to_tensor(whole)
    dist.all_reduce(summed, op=dist.ReduceOp.SUM)
    return summed.numpy().astype(rows.dtype)


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier()


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """The body runs on rank 0, and then on the others: they find what it has put on disk.

    Where it fails on rank 0 the others wait until the launcher, seeing rank 0 end, ends them.
    """
    if not world.is_main:
        barrier(world)
    yield
    if world.is_main:
        barrier(world)
