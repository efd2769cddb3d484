"""Enabling, disabling, mistakes, and what runs are taken for when nobody declares them."""

import copy
import logging

import numpy as np
import paddle
import pytest
from paddle import nn

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
from fast_diffusers.caching.families import FAMILIES, BlockKind, Family
from fast_diffusers.caching.intercept import Interceptor
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.errors import UserError
from fast_diffusers.lora import inject
from fast_diffusers.models import FluxTransformer2DModel

EAGER = FirstBlockTaylor(threshold=100, first_enhance=1)


@pytest.fixture
def flux():
    paddle.seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.1 * paddle.randn(weight.shape))
    model.eval()
    return model


COND = {
    name: paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))
    for seed, (name, shape) in enumerate([("prompt_embeds", [1, 3, 6]), ("pooled_prompt_embeds", [1, 5])])
}
OTHER = {name: -value for name, value in COND.items()}
X = paddle.to_tensor(np.random.default_rng(9).standard_normal([1, 1, 4, 4]).astype("float32"))


def reused(model):
    """For each forward of the newest run whether it reused something."""
    return [record.reused > 0 for record in cache_stats(model).last_run]


# ------------------------------------------------------------------------------------------------------------ mistakes
def test_enabling_twice(flux):
    enable_cache(flux, EAGER)
    with pytest.raises(
        UserError, match=r"FirstBlockTaylor is enabled on this Flux.* already: call disable_cache first"
    ):
        enable_cache(denoiser_for(flux), TeaCache())


@pytest.mark.parametrize("function", [disable_cache, cache_stats])
def test_nothing_to_disable(flux, function):
    with pytest.raises(UserError, match=r"no cache is enabled on this Flux.*: call enable_cache first"):
        function(flux)


@pytest.mark.parametrize("config", [0.25, TeaCache, None])
def test_what_is_not_a_config(flux, config):
    with pytest.raises(UserError, match="config must be a caching method such as TeaCache"):
        enable_cache(flux, config)


def test_what_is_not_a_model():
    with pytest.raises(UserError, match="expected a pipeline or a transformer, got str"):
        enable_cache("flux", TeaCache())


def test_a_compiled_model(flux):
    flux.forward = paddle.jit.to_static(flux.forward)
    with pytest.raises(UserError, match="this transformer is compiled"):
        enable_cache(flux, TeaCache())


@pytest.mark.parametrize(
    "config, settings, message",
    [
        (TeaCache, dict(threshold=-0.1), "TeaCache: threshold must be a number at least 0, got -0.1"),
        (TeaCache, dict(threshold=float("nan")), "threshold must be a number at least 0, got nan"),
        (TeaCache, dict(threshold="high"), "threshold must be a number at least 0, got 'high'"),
        (TeaCache, dict(coefficients=0.5), "coefficients must be a tuple of numbers"),
        (TeaBlockCache, dict(threshold=-1), "TeaBlockCache: threshold must be"),
        (TeaBlockCache, dict(step_start=800, step_end=200), "step_start 800 is above step_end 200"),
        (TeaBlockCache, dict(cache_start=-1), "cache_start must be an integer of at least 0, got -1"),
        (TeaBlockCache, dict(taylor_order=-1), "taylor_order must be an integer of at least 0"),
        (SortBlock, dict(beta=1.5), "SortBlock: beta must be a number from 0 to 1, got 1.5"),
        (SortBlock, dict(start=1200), "start must be a number from 0 to 1000, got 1200"),
        (SortBlock, dict(start=10, end=20), "end 20 is above start 10"),
        (SortBlock, dict(interval=0), "interval must be an integer of at least 1, got 0"),
        (SortBlock, dict(schedule=()), "schedule must be a tuple of numbers"),
        (FirstBlockTaylor, dict(threshold=-0.05), "FirstBlockTaylor: threshold must be a number at least 0"),
        (FirstBlockTaylor, dict(first_enhance=0), "first_enhance must be an integer of at least 1"),
        (TaylorSeer, dict(interval=2.5), "TaylorSeer: interval must be an integer of at least 1, got 2.5"),
        (TaylorSeer, dict(max_order=-1), "max_order must be an integer of at least 0"),
        (CGTaylor, dict(threshold=float("inf")), "CGTaylor: threshold must be a number at least 0, got inf"),
        (BlockDance, dict(period=True), "BlockDance: period must be an integer of at least 1, got True"),
        (BlockDance, dict(depth=1.5), "BlockDance: depth must be a fraction up to 1 or a tuple of numbers, got 1.5"),
        (PyramidAttentionBroadcast, dict(spatial_range=0), "spatial_range must be an integer of at least 1"),
        (PyramidAttentionBroadcast, dict(start=50, end=100), "end 100 is above start 50"),
        (TGate, dict(gate=0), "TGate: gate must be an integer of at least 1, got 0"),
        (TGate, dict(negative_pass="both"), "negative_pass must be None or one of first_half, second_half"),
    ],
)
def test_settings_out_of_range(config, settings, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        config(**settings)


@pytest.mark.parametrize("depth", [(3, 0), (1,), (0, 0)])
def test_a_depth_that_does_not_fit(flux, depth):
    with pytest.raises(UserError, match=r"BlockDance: depth .* does not fit this model's segments of \[2, 2\] blocks"):
        enable_cache(flux, BlockDance(depth=depth))


def test_a_start_behind_the_last_block(flux):
    with pytest.raises(UserError, match="cache_start 4 leaves none of this model's 4 blocks"):
        enable_cache(flux, TeaBlockCache(cache_start=4))


class Plain(nn.Layer):
    """A model of blocks in which nothing is known but their streams."""

    def __init__(self, count):
        super().__init__()
        self.config, self.blocks = {}, nn.LayerList([nn.Linear(2, 2) for _ in range(count)])


@pytest.fixture
def plain(monkeypatch):
    kind = BlockKind(streams=("input",), outputs=None, modulated=lambda block, given: given["input"])
    monkeypatch.setitem(FAMILIES, "Plain", Family((("blocks", kind),), lambda config, t: t, ()))
    return Plain


@pytest.mark.parametrize("config", [PyramidAttentionBroadcast(), TGate()])
def test_methods_that_need_attention(plain, config):
    with pytest.raises(
        UserError, match="keeps the results of attention layers, and this Plain has none that are known"
    ):
        enable_cache(plain(2), config)


def test_a_method_that_needs_sublayers(plain):
    with pytest.raises(UserError, match="TaylorSeer keeps the results of attention and feed-forward layers"):
        enable_cache(plain(2), TaylorSeer())


@pytest.mark.parametrize("config", [TeaCache(), FirstBlockTaylor(), CGTaylor()])
def test_methods_that_skip_all_blocks_but_one(plain, config):
    with pytest.raises(UserError, match=f"{type(config).__name__} needs a model of at least two blocks"):
        enable_cache(plain(1), config)


def test_a_failed_enabling_leaves_the_model_as_it_was(flux):
    with pytest.raises(UserError):
        enable_cache(flux, TeaBlockCache(cache_start=4))
    assert not any("forward" in vars(layer) for layer in flux.sublayers(include_self=True))
    enable_cache(flux, TeaCache())


# ------------------------------------------------------------------------------------------------- runs nobody declared
def test_a_new_run_starts_where_the_time_rises(flux):
    enable_cache(flux, EAGER)
    denoise = denoiser_for(flux)
    for t in (1.0, 0.5, 0.2):
        denoise(X, t, COND)
    assert reused(flux) == [False, True, True]
    denoise(X, 0.7, COND)
    assert reused(flux) == [False] and cache_stats(flux).runs == 2


def test_other_text_at_the_same_time_is_another_branch(flux):
    enable_cache(flux, EAGER)
    denoise = denoiser_for(flux)
    for t in (1.0, 0.5):
        for cond in (COND, OTHER):
            denoise(X, t, cond)
    assert reused(flux) == [False, False, True, True] and cache_stats(flux).runs == 1
    assert [record.branch for record in cache_stats(flux).last_run] == [0, 1, 0, 1]


@pytest.mark.parametrize("x, cond", [(X, COND), (X + 1, COND), (X + 1, OTHER)])
def test_the_same_call_again_or_other_latents_at_the_same_time_are_a_new_run(flux, x, cond):
    enable_cache(flux, EAGER)
    denoise = denoiser_for(flux)
    denoise(X, 1.0, COND)
    denoise(x, 1.0, cond)
    assert cache_stats(flux).runs == 2


def test_another_shape_at_the_next_time_starts_its_branch_anew(flux):
    enable_cache(flux, EAGER)
    denoise = denoiser_for(flux)
    denoise(X, 1.0, COND)
    denoise(paddle.concat([X, X], axis=2), 0.5, COND)
    assert reused(flux) == [False, False]


def test_an_exception_in_the_model_forgets_what_was_kept(flux):
    enable_cache(flux, EAGER)
    denoise = denoiser_for(flux)

    def fail(*_):
        raise RuntimeError("out of memory")

    with denoising_run(flux, 9):
        denoise(X, 1.0, COND)
        hook = flux.norm_out.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            denoise(X, 0.9, COND)
        hook.remove()
        denoise(X, 0.8, COND)
    assert reused(flux) == [False, False]


def test_a_declared_run_is_a_run_whatever_its_times(flux):
    """A second-order sampler looks at a time twice; a stochastic one may go back."""
    enable_cache(denoiser_for(flux), EAGER)
    denoise = denoiser_for(flux)
    with denoising_run(denoise, 4):
        for shift, t in enumerate((1.0, 0.5, 0.5, 0.7, 0.2)):
            denoise(X + shift, t, COND)
    stats = cache_stats(flux)
    assert stats.runs == 1
    assert [(r.step, r.branch) for r in stats.last_run] == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)]
    assert reused(flux) == [False, True, False, True, False]


def test_a_declared_run_without_a_cache_is_harmless(flux):
    with denoising_run(flux, 3):
        denoiser_for(flux)(X, 1.0, COND)


# ------------------------------------------------------------------------------------------------------- side effects
def test_blocks_called_by_themselves_are_not_touched(flux):
    args = (
        paddle.randn([1, 4, 16]),
        paddle.randn([1, 16]),
        flux.embed_positions(paddle.zeros([2, 3]), paddle.ones([2, 3])),
    )
    before = flux.single_transformer_blocks[0](*args)
    enable_cache(flux, EAGER)
    assert paddle.equal_all(flux.single_transformer_blocks[0](*args), before)
    assert sum(cache_stats(flux).computed.values()) == 0


def test_weights_and_names_stay(flux):
    before = {name: value.numpy() for name, value in flux.state_dict().items()}
    enable_cache(flux, TaylorSeer())
    after = flux.state_dict()
    assert list(after) == list(before) and all(np.array_equal(after[name], before[name]) for name in before)


def test_adapters_that_are_added_later_run(flux):
    """They change the class of linear layers, which TaylorSeer stands in for."""
    enable_cache(flux, TaylorSeer(interval=1))
    denoise = denoiser_for(flux)
    before = denoise(X, 1.0, COND).numpy()
    for weight in inject(flux, 2, 2.0, ["proj_out", "to_q"]):
        weight.set_value(paddle.ones_like(weight))
    after = denoise(X, 1.0, COND).numpy()
    disable_cache(flux)
    assert not np.allclose(after, before, rtol=1e-2) and np.array_equal(denoise(X, 1.0, COND), after)


def test_a_model_with_a_cache_is_not_copied(flux):
    enable_cache(flux, EAGER)
    with pytest.raises(UserError, match="a model with a cache cannot be copied: call disable_cache first"):
        copy.deepcopy(flux)
    disable_cache(flux)
    copy.deepcopy(flux)


def test_training_is_warned_of_once(flux, caplog):
    enable_cache(flux, EAGER)
    denoise = denoiser_for(flux)
    flux.train()
    with caplog.at_level(logging.WARNING):
        with paddle.no_grad():
            denoise(X, 1.0, COND)
        assert not caplog.records
        denoise(X, 1.0, COND)
        denoise(X, 1.0, COND)
    assert [record.message.split(" with a")[0] for record in caplog.records] == [
        "FluxTransformer2DModel is in training mode"
    ]


class Speaker:
    def say(self, text):
        return text


def test_an_interceptor_comes_and_goes():
    speaker = Speaker()
    interceptor = Interceptor(speaker, "say", lambda original, args, kwargs: original(*args, **kwargs) + "!")
    assert speaker.say("a") == "a!" and Speaker().say("a") == "a" and interceptor.is_outermost
    interceptor.remove()
    assert speaker.say("a") == "a" and not vars(speaker)


def test_an_interceptor_keeps_what_the_object_had_before():
    speaker = Speaker()
    speaker.say = mine = lambda text: text.upper()
    interceptor = Interceptor(speaker, "say", lambda original, args, kwargs: original(*args, **kwargs) + "!")
    assert speaker.say("a") == "A!"
    interceptor.remove()
    assert speaker.say is mine


def test_what_was_put_over_a_cache_has_to_go_first(flux):
    enable_cache(flux, EAGER)
    vars(flux)["forward"] = lambda *args, **kwargs: None
    with pytest.raises(UserError, match="something else has replaced a forward since enable_cache"):
        disable_cache(flux)


def test_stats_can_be_printed(flux):
    enable_cache(flux, EAGER)
    denoiser_for(flux)(X, 1.0, COND)
    first, *lines = str(cache_stats(flux)).splitlines()
    assert first == "FirstBlockTaylor: 1 runs, 1 forwards, about 100% of the arithmetic"
    assert lines[0].split() == ["transformer_blocks.0", "computed", "1,", "reused", "0"] and len(lines) == 4
