import threading
import time

import numpy as np
import pytest

from distill.data.images import ImageBatches
from distill.data.loader import Loader
from distill.data.memory import digits
from distill.data.order import batch_indices
from distill.data.records import BadRecord, Record
from fast_diffusers.errors import UserError


class Numbers:
    """A batch is its indices; reading takes ``delay`` seconds and fails where told."""

    def __init__(self, n=50, delay=0.0, fail_at=None):
        self.n, self.delay, self.fail_at, self.threads, self.fetched = n, delay, fail_at, set(), []

    def __len__(self):
        return self.n

    def fetch(self, indices):
        self.threads.add(threading.current_thread())
        self.fetched.append(indices.tolist())
        time.sleep(self.delay)
        if self.fail_at in indices:
            raise UserError(f"record {self.fail_at} is cursed")
        return {"indices": indices}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_follow_the_order(num_workers):
    with Loader(Numbers(), 4, seed=3, micro_steps=2, rank=1, world=2, num_workers=num_workers) as loader:
        for step in range(10):
            for micro in range(2):
                expected = batch_indices(50, 4, 3, step, micro, 2, 1, 2)
                np.testing.assert_array_equal(loader.batch(step, micro)["indices"], expected)


def test_prefetching_equals_direct_reading_from_any_step():
    def read(num_workers, steps):
        with Loader(ImageBatches(digits("test"), 8, 8, 1), 16, seed=1, num_workers=num_workers) as loader:
            return {step: loader.batch(step) for step in steps}

    direct = read(0, range(30))
    for steps in (range(30), range(17, 30), [5, 2, 2, 29, 6]):
        for step, batch in read(2, steps).items():
            np.testing.assert_array_equal(batch["images"], direct[step]["images"])
            assert batch["prompts"] == direct[step]["prompts"]


def test_bad_records_do_not_depend_on_where_a_run_begins():
    class Holes:
        identity = "holes"

        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index % 7 in (2, 3):
                raise BadRecord(f"{index}", "hole")
            return Record(np.full((2, 2, 1), index, np.uint8), str(index), str(index))

    def prompts(first, num_workers):
        batches = ImageBatches(Holes(), 2, 2, 1, max_bad_fraction=0.5)
        with Loader(batches, 5, seed=0, num_workers=num_workers) as loader:
            return [loader.batch(step)["prompts"] for step in range(first, 20)]

    whole = prompts(0, 0)
    assert prompts(0, 3) == whole and prompts(13, 2) == whole[13:]


def test_two_ranks_see_the_batch_of_one_process():
    batches = ImageBatches(digits("test"), 8, 8, 1)
    with (
        Loader(batches, 8, seed=0) as one,
        Loader(batches, 4, 0, world=2) as a,
        Loader(batches, 4, 0, rank=1, world=2) as b,
    ):
        for step in (0, 1, 44, 45):
            both = np.concatenate([a.batch(step)["images"], b.batch(step)["images"]])
            np.testing.assert_array_equal(both, one.batch(step)["images"])


def test_reading_ahead_hides_the_reading_time():
    with Loader(Numbers(delay=0.05), 2, seed=0, num_workers=2) as loader:
        loader.batch(0)
        first = loader.wait_seconds
        assert first >= 0.05
        for step in range(1, 7):
            time.sleep(0.06)
            loader.batch(step)
        assert loader.wait_seconds - first < 0.15  # reading alone takes 0.3
    with Loader(Numbers(delay=0.02), 2, seed=0, num_workers=0) as loader:
        for step in range(3):
            loader.batch(step)
        assert loader.wait_seconds >= 0.06


def test_only_what_is_ahead_is_read():
    source = Numbers(n=1000)
    with Loader(source, 1, seed=0, num_workers=1, prefetch=2) as loader:
        for step in range(5):
            loader.batch(step)
    assert len(source.fetched) <= 7
    assert source.fetched == [batch_indices(1000, 1, 0, step).tolist() for step in range(len(source.fetched))]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_reach_the_step_that_needs_the_batch(num_workers):
    order = [batch_indices(50, 5, 0, step).tolist() for step in range(10)]
    with Loader(Numbers(fail_at=order[3][2]), 5, seed=0, num_workers=num_workers) as loader:
        for step in range(3):
            loader.batch(step)
        with pytest.raises(UserError, match=f"record {order[3][2]} is cursed"):
            loader.batch(3)
        assert loader.batch(4)["indices"].tolist() == order[4]


def test_threads_end_with_the_loader_even_after_an_error():
    source = Numbers(delay=0.01)
    with pytest.raises(RuntimeError, match="training broke"), Loader(source, 2, seed=0, prefetch=200) as loader:
        loader.batch(0)
        raise RuntimeError("training broke")
    assert source.threads and not any(thread.is_alive() for thread in source.threads)
    assert len(source.fetched) < 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": "4"},
        {"seed": -1},
        {"num_workers": -1},
        {"prefetch": 0},
        {"seed": True},
        {"micro_steps": 0},
    ],
)
def test_bad_settings(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name} must be a whole number from . up"):
        Loader(Numbers(), **{"batch_size": 2, "seed": 0, **wrong})


@pytest.mark.parametrize(("step", "micro"), [(-1, 0), (0, 2), (0, -1)])
def test_impossible_positions(step, micro):
    with Loader(Numbers(), 2, seed=0, micro_steps=2) as loader, pytest.raises(ValueError, match="no such batch"):
        loader.batch(step, micro)
