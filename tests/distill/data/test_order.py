import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.order import batch_indices, permutation

layouts = {
    "n": st.integers(1, 60),
    "batch_size": st.integers(1, 9),
    "seed": st.integers(0, 2**64),
    "micro_steps": st.integers(1, 3),
    "world": st.integers(1, 4),
}


@settings(max_examples=150, deadline=None)
@given(**layouts)
def test_each_epoch_is_a_permutation_over_steps_micro_steps_and_ranks(n, batch_size, seed, micro_steps, world):
    steps = -(-3 * n // (batch_size * micro_steps * world))
    stream = np.concatenate(
        [
            batch_indices(n, batch_size, seed, step, micro, micro_steps, rank, world)
            for step in range(steps)
            for micro in range(micro_steps)
            for rank in range(world)
        ]
    )
    assert stream.dtype == np.int64
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(**layouts, step=st.integers(0, 10**6))
def test_ranks_get_the_slices_of_the_single_process_batch(n, batch_size, seed, micro_steps, world, step):
    for micro in range(micro_steps):
        whole = batch_indices(n, batch_size * world, seed, step, micro, micro_steps)
        for rank in range(world):
            part = batch_indices(n, batch_size, seed, step, micro, micro_steps, rank, world)
            np.testing.assert_array_equal(part, whole[rank * batch_size : (rank + 1) * batch_size])


@settings(max_examples=50, deadline=None)
@given(**layouts, step=st.integers(0, 10**6))
def test_accumulation_sees_the_global_batch_of_one_large_batch(n, batch_size, seed, micro_steps, world, step):
    whole = batch_indices(n, batch_size * micro_steps, seed, step)
    parts = [batch_indices(n, batch_size, seed, step, micro, micro_steps) for micro in range(micro_steps)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_seeds_and_epochs_give_different_orders():
    orders = [permutation(200, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_positions_are_uniform():
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), permutation(6, 7, epoch)] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()  # 25 degrees of freedom: 99.99% below 61
    assert chi_square < 61


def test_the_order_is_pinned():
    # resuming an old run needs the order that it began with
    assert batch_indices(10, 12, seed=0, step=0).tolist() == PINNED


PINNED = [5, 0, 4, 3, 9, 1, 2, 7, 8, 6, 8, 0]


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"batch_size": 0}, {"step": -1}, {"micro_step": 1}, {"rank": 2, "world": 2}, {"micro_step": -1}]
)
def test_impossible_positions_are_refused(wrong):
    with pytest.raises(ValueError, match="no such batch"):
        batch_indices(**{"n": 5, "batch_size": 2, "seed": 0, "step": 0, **wrong})
