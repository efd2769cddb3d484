"""What is added between blocks, and batches of two halves: things that skipping could count twice or mix up."""

import numpy as np
import paddle
import pytest

from fast_diffusers.caching import (
    BlockDance,
    CGTaylor,
    FirstBlockTaylor,
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

RAW, WHOLE = (1.0, 0.0), dict(start=1000, end=0)
CONTROLLED = {
    "sd3": ("block_controlnet_hidden_states", 6),
    "sana": ("controlnet_block_samples", 24),
    "qwen_image": ("controlnet_block_samples", 6),
}


@pytest.mark.parametrize("family", CONTROLLED, indirect=True)
@pytest.mark.parametrize(
    "config",
    [
        TeaCache(threshold=9, coefficients=RAW),
        TeaBlockCache(threshold=9, coefficients=RAW, step_end=1000),
        FirstBlockTaylor(threshold=9, first_enhance=1),
        CGTaylor(threshold=9),
        SortBlock(interval=9, beta=0.0, **WHOLE),
        BlockDance(period=9, **WHOLE),
        TaylorSeer(interval=9, first_enhance=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_controls_are_added_once(family, config, request):
    """At nearly the same time, a reused result is nearly that of a full computation, also with other controls on it."""
    name, tokens = CONTROLLED[request.node.callspec.params["family"]]
    paddle.seed(5)
    x, cond = paddle.randn([2, *family.latents]), family.conditioning(2)
    cond[name] = [paddle.randn([2, tokens, 16]) for _ in range(2)]
    enable_cache(family.model, config)
    try:
        with paddle.no_grad(), denoising_run(family.model, 4):
            full, *others = [family.velocity(x, level, cond).numpy() for level in (0.9, 0.89999, 0.89998)]
        assert cache_stats(family.model).last_run[-1].reused > 0
    finally:
        disable_cache(family.model)
    for other in others:
        np.testing.assert_allclose(other, full, rtol=1e-2, atol=2e-3 * np.abs(full).max())


def rows(value, half):
    """The first two (0) or last two (1) of four samples."""
    if isinstance(value, paddle.Tensor):
        return value[2 * half : 2 * half + 2] if value.shape[0] == 4 else value
    return value[2 * half : 2 * half + 2] if isinstance(value, list) and len(value) == 4 else value


@pytest.mark.parametrize("negative, half", [("first_half", 1), ("second_half", 0)])
def test_dropping_half_of_the_batch(family, negative, half):
    """After the gate the result is twice that of the other half alone, if that needs nothing from before the gate."""
    paddle.seed(6)
    x, cond = paddle.randn([4, *family.latents]), family.conditioning(4)
    with paddle.no_grad():
        alone = family.velocity(rows(x, half), 0.5, {name: rows(value, half) for name, value in cond.items()})
        enable_cache(family.model, TGate(gate=1, negative_pass=negative))
        try:
            with denoising_run(family.model, 2):
                before = family.velocity(x, 1.0, cond)
                after = family.velocity(x, 0.5, cond)
            stats = cache_stats(family.model)
        finally:
            disable_cache(family.model)
        assert not paddle.equal_all(before[:2], before[2:])
        assert paddle.equal_all(after[:2], after[2:])
        if sum(stats.reused.values()) == 0:  # joint attention: nothing was kept
            np.testing.assert_allclose(after[:2], alone, rtol=1e-4, atol=1e-5)
        assert stats.compute_fraction < 0.76
