"""The descriptions of the families say what the models do."""

import copy

import numpy as np
import paddle
import pytest
from paddle import nn

from fast_diffusers.caching import TeaCache, cache_stats, disable_cache, enable_cache
from fast_diffusers.caching.families import FAMILIES, FLUX_TEA_COEFFICIENTS, Structure, family_of
from fast_diffusers.caching.intercept import Interceptor
from fast_diffusers.caching.method import BranchState
from fast_diffusers.errors import UserError


class Probe(BranchState):
    """Compares what each block's attention reads with what `modulated` says."""

    seen = 0

    def read(self, block, value):
        self.last = value

    def block(self, call):
        streams = call.compute()
        np.testing.assert_allclose(call.modulated(), self.last, rtol=1e-5, atol=1e-6)
        del self.last
        Probe.seen += 1
        return streams


def test_what_attention_reads(family, sample, monkeypatch):
    monkeypatch.setattr(TeaCache, "state", Probe)
    monkeypatch.setattr(TeaCache, "reads", True)
    monkeypatch.setattr(Probe, "seen", 0)
    enable_cache(family.model, TeaCache())
    try:
        sample(family, steps=2)
    finally:
        disable_cache(family.model)
    assert Probe.seen == 2 * len(Structure.of(family.model).blocks)


def test_streams_reach_the_last_block_unchanged_if_no_block_changes_them(family, sample, monkeypatch):
    class Idle(BranchState):
        def block(self, call):
            if call.is_first:
                self.entry = call.streams
            if call.is_last:
                assert paddle.equal_all(self.structure.carry(self.entry)[0], call.streams[0])
                Idle.reached = True
            return call.streams

    monkeypatch.setattr(TeaCache, "state", Idle)
    enable_cache(family.model, TeaCache())
    try:
        sample(family, steps=1)
        assert set(cache_stats(family.model).reused.values()) == {1}
    finally:
        disable_cache(family.model)
    assert Idle.reached


def test_blocks_are_numbered_through_the_segments(family):
    blocks = Structure.of(family.model).blocks
    assert [block.index for block in blocks] == [0, 1, 2]
    layers = dict(family.model.named_sublayers())
    assert all(layers[block.name] is block.layer for block in blocks)


def test_every_part_that_a_description_names_is_there(family):
    for segment, kind in family_of(family.model).segments:
        for site in (*kind.branches, *kind.attention, *kind.feeders):
            layers = [getattr(block, site.path, None) for block in getattr(family.model, segment)]
            assert any(layer is not None for layer in layers), site
            assert all(hasattr(layer, site.method) for layer in layers if layer is not None)


@pytest.mark.parametrize(
    "name, config, time, expected",
    [
        ("FluxTransformer2DModel", {}, 0.25, 250),
        ("SD3Transformer2DModel", {}, 250, 250),
        ("ppdiffusers.SD3Transformer2DModel", {}, 250, 250),
        ("SanaTransformer2DModel", dict(guidance_embeds=False, timestep_scale=1.0), 250, 250),
        ("SanaTransformer2DModel", dict(guidance_embeds=False, timestep_scale=0.001), 0.25, 250),
        ("SanaTransformer2DModel", dict(guidance_embeds=True, timestep_scale=0.001), 0.25, 250),
        ("QwenImageTransformer2DModel", {}, 0.25, 250),
        ("ZImageTransformer2DModel", {}, 0.75, 250),
    ],
)
def test_times_count_from_a_thousand_at_noise(name, config, time, expected):
    assert FAMILIES[name].noise_level(config, time) == pytest.approx(expected)


def test_a_subclass_is_of_its_bases_family(family):
    class Own(type(family.model)):
        pass

    assert family_of(Own.__new__(Own)) is family_of(family.model)


def test_only_flux_has_a_published_polynomial():
    assert [name for name, family in FAMILIES.items() if family.tea_coefficients] == ["FluxTransformer2DModel"]
    assert FLUX_TEA_COEFFICIENTS == (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


def test_unknown_family():
    with pytest.raises(UserError, match=r"where Linear has its blocks is not known; caches know Flux.*ZImage"):
        enable_cache(nn.Linear(2, 2), TeaCache())


def test_a_model_without_its_blocks(family):
    (attribute, _), *_ = family_of(family.model).segments

    class Bare(type(family.model)):
        def __init__(self):
            nn.Layer.__init__(self)

        def __getattr__(self, name):
            return nn.Layer.__getattr__(self, name)

    with pytest.raises(UserError, match=f"this Bare has no {attribute}: caches need its blocks as separate layers"):
        Structure.of(Bare())


BLOCKS_ALONE = ("FirstBlockTaylor", "CGTaylor", "SortBlock", "BlockDance")


@pytest.mark.parametrize("method", [*BLOCKS_ALONE, "TeaCache", "TeaBlockCache"], indirect=True)
@pytest.mark.parametrize("family", ["flux", "sana"], indirect=True)
def test_blocks_that_run_as_graphs_of_their_own(family, method, sample):
    """A block whose layers are not called, as in a graph, is cached as the block is."""
    enable_cache(family.model, method.active)
    expected = sample(family).numpy()
    disable_cache(family.model)
    blocks = [block.layer for block in Structure.of(family.model).blocks]
    graphs = {id(block): copy.deepcopy(block) for block in blocks}

    def run(block):
        return lambda original, args, kwargs: graphs[id(block)](*args, **kwargs)

    pieces = [Interceptor(block, "forward", run(block)) for block in blocks]
    enable_cache(family.model, method.active)
    try:
        result = sample(family).numpy()
    finally:
        stats = disable_cache(family.model)
        for piece in pieces:
            piece.remove()
    np.testing.assert_array_equal(result, expected)
    assert sum(stats.reused.values()) > 0
