"""What every method must do on every family."""

import weakref

import numpy as np
import paddle
import pytest

from fast_diffusers.caching import cache_stats, denoising_run, disable_cache, enable_cache
from fast_diffusers.caching.engine import _cache_of

BASELINES = {}


@pytest.fixture
def baseline(family, sample, request):
    """The image without a cache."""
    key = request.node.callspec.params["family"]
    if key not in BASELINES:
        BASELINES[key] = sample(family).numpy()
    return BASELINES[key]


@pytest.fixture
def enabled(family):
    """Enables a cache for the length of a test."""

    def enable(config):
        enable_cache(family.model, config)
        return family.model

    yield enable
    if _cache_of(family.model):
        disable_cache(family.model)


def test_disabled_is_bitwise_the_baseline(family, method, sample, baseline, enabled):
    model = enabled(method.active)
    assert not np.array_equal(sample(family), baseline)
    disable_cache(model)
    assert np.array_equal(sample(family), baseline)
    replaced = [vars(layer).keys() & {"forward", "on_tokens"} for layer in model.sublayers(include_self=True)]
    assert not any(replaced)


def test_settings_that_never_reuse_give_the_baseline(family, method, sample, baseline, enabled):
    model = enabled(method.neutral)
    np.testing.assert_allclose(sample(family), baseline, rtol=1e-6, atol=1e-6)
    stats = cache_stats(model)
    assert sum(stats.reused.values()) == 0 and stats.compute_fraction == 1


def test_results_do_not_depend_on_what_ran_before(family, method, sample, enabled):
    model = enabled(method.active)
    first = sample(family).numpy()
    assert np.array_equal(sample(family), first)  # the second image is the first
    with pytest.raises(KeyboardInterrupt):
        sample(family, seed=1, steps=4, stop_at=3)
    sample(family, steps=2, seed=2, batch=3, start=0.5)
    sample(family, steps=2, seed=3, declared=False)
    assert np.array_equal(sample(family), first)
    assert cache_stats(model).runs == 6


def test_stats_add_up(family, method, sample, enabled):
    model = enabled(method.active)
    sample(family, steps=4)
    before = cache_stats(model)
    sample(family)
    stats = cache_stats(model)
    assert (stats.runs, stats.forwards, stats.dropped) == (2, 9, 0)
    assert all(stats.computed[part] + stats.reused[part] == 9 for part in stats.computed)
    assert sum(stats.reused.values()) > 0 and 0 < stats.compute_fraction < 1
    assert [record.step for record in stats.last_run] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([record.noise_level for record in stats.last_run], [1000, 800, 600, 400, 200], rtol=1e-5)
    assert {record.computed + record.reused for record in stats.last_run} == {len(stats.computed)}
    in_last_run = sum(record.reused for record in stats.last_run)
    assert sum(stats.reused.values()) - sum(before.reused.values()) == in_last_run


def test_state_is_freed(family, method, sample, enabled):
    model = enabled(method.active)
    states = []

    def spy(*_):
        states.append(weakref.ref(_cache_of(model).runs.current.branches[0].state))

    hook = model.register_forward_post_hook(spy)
    try:
        sample(family, steps=2)
    finally:
        hook.remove()
    assert len(states) == 2 and not any(state() for state in states)


def test_guidance_branches_do_not_see_each_other(family, method, enabled):
    """A branch gives the same in a run with another one as in a run of its own, on given states."""
    model = enabled(method.active)
    paddle.seed(4)
    states = [paddle.randn([2, *family.latents]) * (1 + 0.1 * i) for i in range(4)]
    branches = family.conditioning(2), family.conditioning(2)
    levels = [1.0, 0.75, 0.5, 0.25]

    def run(*conds):
        with denoising_run(model, len(levels)), paddle.no_grad():
            return [
                [family.velocity(x, level, cond).numpy() for cond in conds]
                for x, level in zip(states, levels, strict=True)
            ]

    together = run(*branches)
    for number, cond in enumerate(branches):
        alone = run(cond)
        for step in range(len(levels)):
            assert np.array_equal(together[step][number], alone[step][0])
    assert [record.branch for record in cache_stats(model).last_run] == [0] * 4
