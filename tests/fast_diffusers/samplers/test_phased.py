import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_diffusers.random import Generator, randn
from fast_diffusers.samplers import phased
from fast_diffusers.samplers.euler import euler_sigmas
from fast_diffusers.samplers.phased import phased_sigmas
from fast_diffusers.time_grids import PhaseGrid

SHAPE = [2, 3, 4, 4]
FLUX_1024 = PhaseGrid.for_tokens(4096)


def test_one_step_a_phase_visits_the_boundaries():
    levels = phased_sigmas(4, FLUX_1024)
    np.testing.assert_allclose(levels, [1, 0.9045, 0.7595, 0.5128, 0], atol=5e-5)
    np.testing.assert_allclose(levels, euler_sigmas(4, mu=1.15), atol=1e-6)  # the stock FLUX levels at this size
    assert levels.dtype == np.float32


def test_fewer_steps_skip_boundaries():
    b = FLUX_1024.boundaries
    np.testing.assert_array_equal(phased_sigmas(1, FLUX_1024), [1, 0])
    np.testing.assert_array_equal(phased_sigmas(2, FLUX_1024), [1, b[2], 0])
    np.testing.assert_array_equal(phased_sigmas(3, FLUX_1024), [1, b[3], b[2], 0])


def test_more_steps_split_the_phases_along_the_cells():
    sigma = FLUX_1024.sigma
    cells = [99, 87, 74, 62, 49, 37, 24, 12]  # tops of the phases, and the cells floor(25 / 2) = 12 below them
    np.testing.assert_array_equal(phased_sigmas(8, FLUX_1024), [*sigma[cells], 0])
    np.testing.assert_array_equal(phased_sigmas(5, FLUX_1024), [*sigma[[99, 74, 49, 24, 12]], 0])
    np.testing.assert_array_equal(phased_sigmas(100, FLUX_1024), [*sigma[::-1], 0])


@given(st.integers(1, 60), st.data())
def test_levels_for_any_grid_and_step_count(num_cells, data):
    num_phases = data.draw(st.integers(1, num_cells))
    steps = data.draw(st.integers(1, num_cells))
    grid = PhaseGrid(num_cells, num_phases, mu=0.8)
    levels = phased_sigmas(steps, grid)
    assert levels.shape == (steps + 1,) and levels[0] == 1 and levels[-1] == 0
    assert np.all(np.diff(levels) < 0)
    assert set(levels[:-1]) <= set(grid.sigma)
    inner = set(grid.boundaries[1:])
    assert inner <= set(levels) if steps >= num_phases else set(levels[1:-1]) <= inner


def test_a_perfect_phased_student_is_exact_at_every_boundary(gaussian):
    """The student knows nothing of the target: it points to the end of the phase that t is in, as it was trained."""
    ends = paddle.to_tensor(FLUX_1024.boundaries)

    def student(x, t, target_t):
        phase = paddle.searchsorted(ends, t) - 1
        return gaussian.chord(x, t, ends[phase])

    noise = randn(SHAPE, Generator(0))
    states = []
    result = phased(student, noise, steps=4, grid=FLUX_1024, callback=lambda i, t, x: states.append((t, x)))
    assert [t for t, _ in states] == pytest.approx([*FLUX_1024.boundaries[:0:-1], 0])
    for t, x in states[:-1]:
        np.testing.assert_allclose(x.numpy(), gaussian.flow(noise, 1.0, t).numpy(), atol=1e-5)
    np.testing.assert_allclose(result.numpy(), gaussian.flow(noise, 1.0, 0.0).numpy(), atol=0.01)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_an_exact_consistency_function_gives_the_exact_result(gaussian, steps):
    noise = randn(SHAPE, Generator(0))
    result = phased(gaussian.chord, noise, steps=steps, grid=FLUX_1024)
    np.testing.assert_allclose(result.numpy(), gaussian.flow(noise, 1.0, 0.0).numpy(), atol=1e-5)


def test_stochastic_sampling_has_the_exact_distribution(gaussian):
    shape = [5000, 1, 4, 4]
    seen = []
    result = phased(
        gaussian.chord,
        randn(shape, Generator(0)),
        steps=4,
        grid=FLUX_1024,
        stochastic=True,
        generator=Generator(1),
        callback=lambda i, t, x: seen.append((t, float(x.mean()), float(x.std()))),
    )
    for t, mean, std in seen:
        exact = gaussian.variance(t) ** 0.5
        assert mean == pytest.approx((1 - t) * gaussian.mean, abs=4 * exact / 80_000**0.5)
        assert std == pytest.approx(exact, abs=4 * exact / 160_000**0.5)
    assert result.shape == shape


def test_stochastic_steps_aim_at_data_and_replay_their_noise(gaussian):
    noise, fresh = randn(SHAPE, Generator(0)), [randn(SHAPE, Generator(seed)) for seed in (1, 2, 3)]
    targets = []

    def velocity(x, t, target_t):
        targets.append(target_t.tolist())
        return gaussian.chord(x, t, target_t)

    replay = iter(fresh)
    result = phased(velocity, noise, steps=4, grid=FLUX_1024, stochastic=True, noise_sampler=lambda shape: next(replay))
    x = noise
    for t, next_t, eps in zip([1.0, *FLUX_1024.boundaries[:0:-1]], FLUX_1024.boundaries[:0:-1], fresh, strict=False):
        x = (1 - next_t) * gaussian.flow(x, t, 0.0) + next_t * eps
    expected = gaussian.flow(x, float(FLUX_1024.boundaries[1]), 0.0)
    np.testing.assert_allclose(result.numpy(), expected.numpy(), atol=1e-5)
    assert targets == [[0, 0]] * 4
    assert next(replay, None) is None, "one draw a step, none on the last"


def test_generators(gaussian):
    noise = randn(SHAPE, Generator(0))

    def sample(generator, noise=noise):
        return phased(gaussian.chord, noise, steps=4, grid=FLUX_1024, stochastic=True, generator=generator)

    assert paddle.equal_all(sample(Generator(3)), sample(Generator(3)))
    assert not paddle.equal_all(sample(Generator(3)), sample(Generator(4)))
    paddle.seed(5)
    first = sample(None)
    paddle.seed(5)
    assert paddle.equal_all(first, sample(None))
    rows = sample([Generator(6), Generator(7)])
    assert paddle.equal_all(rows[1:], sample([Generator(7)], noise[1:])), "independent of the batch"
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        sample([Generator(6)])


@pytest.mark.parametrize(("steps", "message"), [(0, "at least 1"), (101, "101 steps, but .* only 100 cells")])
def test_bad_step_counts(gaussian, steps, message):
    with pytest.raises(ValueError, match=message):
        phased(gaussian.chord, paddle.zeros(SHAPE), steps=steps, grid=FLUX_1024)
