import numpy as np
import paddle
import pytest

from fast_diffusers.caching.taylor import TaylorSeries, extrapolation_weights, map_tensors


def series_of(order, steps, value):
    series = TaylorSeries(order)
    for step in steps:
        series.update(step, value(step))
    return series


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("steps", [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 9, 11], [2.0, 1.5, 0.25, -1.0, -1.5, -4.0]])
def test_exact_for_polynomials_of_its_order(order, steps):
    coefficients = paddle.to_tensor(np.random.default_rng(order).standard_normal([order + 1, 3]))

    def value(step):
        return sum(coefficients[power] * step**power for power in range(order + 1))

    series = series_of(order, steps, value)
    for ahead in (0.5, 1, 2, 7):
        np.testing.assert_allclose(series.predict(steps[-1] + ahead), value(steps[-1] + ahead), rtol=1e-9, atol=1e-9)


def test_the_first_order_is_the_published_formula():
    """D0 = F; D1 = (D0 − D0_old) / (s − s_last); F + D1 (step − s)."""
    series = series_of(1, [0, 3, 5], lambda step: paddle.to_tensor({0: 7.0, 3: 10.0, 5: 16.0}[step]))
    assert float(series.predict(6)) == 16.0 + 3.0 and float(series.predict(9)) == 16.0 + 3.0 * 4


def test_weights():
    """From values at 1, 0 and −2 to that at 2: (2·4)/(1·3), (1·4)/(−1·2), (1·2)/(−3·−2)."""
    assert extrapolation_weights([1, 0, -2], 2) == pytest.approx([8 / 3, -2, 1 / 3])


def test_uses_as_many_orders_as_it_has_values_for():
    series = TaylorSeries(2)
    assert not series
    series.update(0, paddle.to_tensor(1.0))
    assert series and float(series.predict(9)) == 1.0
    series.update(1, paddle.to_tensor(3.0))
    assert float(series.predict(3)) == 7.0


def test_order_zero_repeats_the_last_value():
    assert float(series_of(0, [0, 1], lambda step: paddle.to_tensor(5.0 * step)).predict(4)) == 5.0


def test_values_may_be_tuples_with_gaps():
    series = series_of(1, [0, 1], lambda step: (paddle.to_tensor(1.0 * step), None, paddle.to_tensor(2.0 * step)))
    first, gap, last = series.predict(3)
    assert float(first) == 3.0 and gap is None and float(last) == 6.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_predictions_have_the_values_dtype(dtype):
    series = series_of(2, [0, 1, 2], lambda step: paddle.full([2], float(step), dtype))
    predicted = series.predict(3)
    assert str(predicted.dtype) == f"paddle.{dtype}" and predicted.astype("float64").tolist() == [3.0, 3.0]


def test_what_is_kept_has_no_gradient():
    weight = paddle.to_tensor(2.0, stop_gradient=False)
    assert series_of(1, [0, 1], lambda step: weight * step).predict(2).stop_gradient


def test_map_tensors_applies_to_entries_of_several_values():
    assert map_tensors(lambda a, b: a + b, (1, (2, None)), (10, (20, None))) == (11, (22, None))
