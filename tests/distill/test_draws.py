import numpy as np
import pytest
from scipy import stats

from distill.draws import ReplayDraws, StepDraws

SHAPE = [64, 3, 8, 8]


def test_draws_depend_on_name_and_counters_only():
    first, again = StepDraws(1, 2, 3), StepDraws(1, 2, 3)
    first.normal("other", [5])  # the order of the calls does not matter
    np.testing.assert_array_equal(first.normal("a", SHAPE).numpy(), again.normal("a", SHAPE).numpy())
    reference = again.normal("a", SHAPE).numpy()
    for other in (StepDraws(2, 2, 3), StepDraws(1, 3, 3), StepDraws(1, 2, 4), StepDraws(1, 2, 3, rank=1)):
        assert np.abs(np.corrcoef(other.normal("a", SHAPE).numpy().ravel(), reference.ravel())[0, 1]) < 0.05
    assert np.abs(np.corrcoef(again.normal("b", SHAPE).numpy().ravel(), reference.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("shape", [[3], [4, 5], [2, 3, 7]])
def test_ranks_draw_slices_of_the_global_draw(shape):
    everything = StepDraws(0, 7).normal("noise", [3 * shape[0], *shape[1:]]).numpy()
    parts = [StepDraws(0, 7, rank=rank).normal("noise", shape).numpy() for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), everything)


@pytest.mark.parametrize(
    "sample, distribution",
    [
        (lambda d: d.normal("x", [20000]), stats.norm()),
        (lambda d: d.uniform("x", [20000]), stats.uniform()),
        (lambda d: d.beta("x", 0.8, 1.7, [20000]), stats.beta(0.8, 1.7)),
    ],
)
def test_distributions(sample, distribution):
    values = sample(StepDraws(0, 0)).numpy()
    assert values.dtype == np.float32
    assert stats.kstest(values, distribution.cdf).pvalue > 1e-3


def test_integers_are_uniform_between_tensor_bounds():
    import paddle

    low = paddle.to_tensor([0, 25, 50] * 4000)
    values = StepDraws(0, 0).integers("cell", low, low + 25, [12000]).numpy() - low.numpy()
    assert values.min() == 0 and values.max() == 24
    assert stats.chisquare(np.bincount(values, minlength=25)).pvalue > 1e-3


def test_replay_returns_what_was_recorded_and_names_what_was_not():
    recorded = np.arange(6, dtype=np.float64).reshape(2, 3)
    draws = ReplayDraws({"noise": recorded, "cell": np.array([4, 7])})
    np.testing.assert_array_equal(draws.normal("noise", [2, 3]).numpy(), recorded)
    assert draws.normal("noise", [2, 3]).numpy().dtype == np.float64
    assert draws.integers("cell", 0, 10, [2]).tolist() == [4, 7]
    with pytest.raises(KeyError, match=r"no draw named 'gone'.*cell.*noise"):
        draws.uniform("gone", [1])
    with pytest.raises(ValueError, match=r"recorded with shape \(2, 3\), asked for \(3, 2\)"):
        draws.normal("noise", [3, 2])
