"""The order of the data: a pure function of the seed and the counters."""

from functools import lru_cache

import numpy as np

_STREAM = int.from_bytes(b"data order", "big")  # keeps these bits apart from all other uses of the same seed


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch ``epoch``: a read-only int64 [n] permutation of 0..n-1.

    Sorting raw Philox bits gives the same permutation with every numpy version, which Generator does not promise.
    """
    bits = np.random.Philox(np.random.SeedSequence((_STREAM, seed, epoch))).random_raw(n)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(
    n: int,
    batch_size: int,
    seed: int,
    step: int,
    micro_step: int = 0,
    micro_steps: int = 1,
    rank: int = 0,
    world: int = 1,
) -> np.ndarray:
    """Indices of one batch, int64 [batch_size].

    The epochs' permutations, laid end to end, are cut into global batches of micro_steps × world × batch_size; a
    global batch into micro-steps; a micro-step into ranks. So no index repeats within an epoch, and one process with
    batch 2B sees what two with B see. A batch may span the end of an epoch; nothing is dropped.
    """
    if n < 1 or batch_size < 1 or step < 0 or not 0 <= micro_step < micro_steps or not 0 <= rank < world:
        raise ValueError(f"no such batch: {n=}, {batch_size=}, {step=}, {micro_step=}/{micro_steps}, {rank=}/{world}")
    start = ((step * micro_steps + micro_step) * world + rank) * batch_size
    epochs, offsets = np.divmod(np.arange(start, start + batch_size, dtype=np.int64), n)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        indices[epochs == epoch] = permutation(n, seed, epoch)[offsets[epochs == epoch]]
    return indices
