import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_diffusers.time_grids import PhaseGrid, dynamic_shift_mu, shift_sigma, stretch_to_terminal


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63), (16, 0.459375)])
def test_mu_of_the_token_count(tokens, mu):
    assert dynamic_shift_mu(tokens) == pytest.approx(mu, abs=1e-12)


def test_mu_takes_a_scheduler_configuration():
    assert dynamic_shift_mu(300, base_tokens=100, max_tokens=500, base_shift=0.2, max_shift=0.6) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="positive"):
        dynamic_shift_mu(0)


@pytest.mark.parametrize("mu", [-1.0, 0.0, 1.15])
def test_shift_keeps_the_ends_and_is_the_published_formula(mu):
    assert shift_sigma(0.0, mu) == 0.0 and shift_sigma(1.0, mu) == 1.0
    t = np.linspace(0.01, 1, 50)
    np.testing.assert_allclose(shift_sigma(t, mu), math.exp(mu) / (math.exp(mu) + 1 / t - 1), rtol=1e-14)


def test_constant_shift_is_the_log_of_it():
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_sigma(t, math.log(3.0)), 3 * t / (1 + 2 * t), rtol=1e-14)


@given(st.integers(2, 30), st.floats(-1, 2), st.floats(0.001, 0.9))
def test_stretching_ends_at_the_terminal_level_and_keeps_the_rest_in_proportion(steps, mu, terminal):
    levels = shift_sigma(np.arange(steps, 0, -1) / steps, mu)
    stretched = stretch_to_terminal(levels, terminal)
    assert stretched[0] == 1 and stretched[-1] == pytest.approx(terminal) and np.all(np.diff(stretched) < 0)
    np.testing.assert_allclose((1 - stretched) / (1 - terminal), (1 - levels) / (1 - levels[-1]), atol=1e-12)


def test_noise_alone_is_not_stretched():
    assert stretch_to_terminal(np.ones(1), 0.02).tolist() == [1]


def test_published_grid_at_1024_pixels():
    grid = PhaseGrid.for_tokens(4096)
    np.testing.assert_allclose(grid.boundaries, [0.0032, 0.5128, 0.7595, 0.9045], atol=5e-5)
    assert grid.starts.tolist() == [0, 25, 50, 75] and grid.stops.tolist() == [25, 50, 75, 100]
    assert grid.sigma[-1] == 1.0
    assert grid.sigma_prev[0] == np.float32(shift_sigma(0.001, 1.15))
    np.testing.assert_array_equal(grid.sigma_prev[1:], grid.sigma[:-1])
    np.testing.assert_array_equal(grid.sigma_end, np.repeat(grid.boundaries, 25))
    np.testing.assert_array_equal(grid.phase_start[[0, 24, 25, 99]], [0, 0, 25, 75])
    np.testing.assert_array_equal(grid.phase_stop[[0, 24, 25, 99]], [25, 25, 50, 100])


@given(st.integers(1, 120), st.data())
def test_phases_cover_the_cells(num_cells, data):
    num_phases = data.draw(st.integers(1, num_cells))
    grid = PhaseGrid(num_cells, num_phases, mu=0.7)
    np.testing.assert_array_equal(grid.starts, np.floor(np.linspace(0, num_cells, num_phases, endpoint=False) + 1e-9))
    cells = np.arange(num_cells)
    assert np.all((grid.phase_start <= cells) & (cells < grid.phase_stop))
    assert np.all(grid.sigma_end <= grid.sigma_prev) and np.all(grid.sigma_prev < grid.sigma)
    assert grid.boundaries.shape == (num_phases,) and np.all(np.diff(grid.boundaries) > 0)


def test_arrays_are_read_only_and_float32():
    grid = PhaseGrid()
    for name in ("sigma", "sigma_prev", "sigma_end", "boundaries"):
        assert getattr(grid, name).dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            getattr(grid, name)[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.mu = 1.0


@pytest.mark.parametrize(("cells", "phases"), [(4, 0), (4, 5), (0, 0)])
def test_impossible_phases(cells, phases):
    with pytest.raises(ValueError, match=f"got {phases} phases in {cells} cells"):
        PhaseGrid(cells, phases)
