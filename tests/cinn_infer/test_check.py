import numpy as np
import pytest

from cinn_infer import check


def test_fp32_is_relative_to_the_largest_entry():
    truth = np.array([4.0, -1.0], dtype="float32")
    assert check.error(truth + np.float32([0, 2]), truth, "fp32") == 0.5
    assert check.error(truth / 8 + np.float32([0, 0.25]), truth / 8, "fp32") == 0.25  # at least 1


def test_others_are_relative_root_mean_squares():
    truth = np.array([3.0, 4.0], dtype="float32")
    assert check.error(truth * 1.5, truth, "bf16") == pytest.approx(0.5)
    assert check.error(np.ones(3), np.zeros(3), "int8") == 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_no_error_hides(precision):
    truth = np.ones([2, 2], dtype="float32")
    assert check.error(truth[:1], truth, precision) == float("inf")
    assert np.isnan(check.error(np.where(np.eye(2) > 0, np.nan, truth), truth, precision))
    assert check.error(truth, truth, precision) == 0
