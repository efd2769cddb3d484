"""Every sampler draws from a student of every family, alone and with every cache in its loop."""

from functools import partial

import numpy as np
import pytest

from fast_diffusers import samplers
from fast_diffusers.caching import (
    BlockDance,
    CGTaylor,
    FirstBlockTaylor,
    PyramidAttentionBroadcast,
    SortBlock,
    TaylorSeer,
    TeaBlockCache,
    TeaCache,
    TGate,
    cache_stats,
    denoising_run,
    disable_cache,
    enable_cache,
)
from fast_diffusers.random import Generator, randn
from fast_diffusers.time_grids import PhaseGrid

STEPS = 5
SAMPLERS = {
    "euler": partial(samplers.euler, steps=STEPS),
    "phased": partial(samplers.phased, steps=STEPS, grid=PhaseGrid(10, STEPS), stochastic=True),
    "trigflow": partial(samplers.trigflow, steps=STEPS),
    "unified_order_1": partial(samplers.unified, steps=STEPS, style="any", stochasticity=0.5),
    "unified_order_2": partial(samplers.unified, steps=2 * STEPS - 1, order=2, style="any"),
}
RAW, WHOLE = (1.0, 0.0), dict(start=1000, end=0)
# Settings that reuse something in five steps of any tiny model.
CACHES = {
    "TeaCache": TeaCache(threshold=3, coefficients=RAW),
    "TeaBlockCache": TeaBlockCache(threshold=3, coefficients=RAW, cache_start=1),
    "SortBlock": SortBlock(interval=3, **WHOLE),
    "FirstBlockTaylor": FirstBlockTaylor(threshold=10, first_enhance=2),
    "TaylorSeer": TaylorSeer(interval=2, max_order=2, first_enhance=2),
    "CGTaylor": CGTaylor(threshold=10),
    "BlockDance": BlockDance(period=2, depth=0.5, **WHOLE),
    "PyramidAttentionBroadcast": PyramidAttentionBroadcast(**WHOLE),
    "TGate": TGate(gate=3, warm_up=1, sp_interval=3, fi_interval=2),
}


def sample(family, sampler, seed=0):
    """float32 [2, 3, 4, 6], all of it from one generator."""
    generator = Generator(seed)
    noise = randn(family.latents.shape, generator)
    with denoising_run(family.transformer, STEPS):
        return SAMPLERS[sampler](family.velocity, noise, generator=generator).numpy()


@pytest.fixture(scope="module")
def plain(family):
    """Samples of the family without a cache, by sampler."""
    return {sampler: sample(family, sampler) for sampler in SAMPLERS}


@pytest.mark.support("Sampler", "sampler")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples(family, sampler, plain):
    image = plain[sampler]
    assert image.dtype == np.float32 and np.isfinite(image).all() and image.std() > 0.01
    assert np.array_equal(sample(family, sampler), image)
    assert not np.allclose(sample(family, sampler, seed=1), image, atol=1e-3)


@pytest.mark.support("Cache, with every sampler", "cache")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_caches(family, sampler, cache, plain):
    enable_cache(family.transformer, CACHES[cache])
    try:
        image, stats = sample(family, sampler), cache_stats(family.transformer)
    finally:
        disable_cache(family.transformer)
    assert np.isfinite(image).all()
    assert stats.runs == 1 and [each.step for each in stats.last_run if each.branch == 0] == list(range(STEPS))
    assert sum(stats.reused.values()) > 0 and stats.compute_fraction < 1
    assert not np.array_equal(image, plain[sampler]), "what was reused made no difference"
