import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

import cinn_infer
from cinn_infer import units
from fast_diffusers import lora, target_time
from fast_diffusers.caching import FirstBlockTaylor, cache_stats, disable_cache, enable_cache
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.errors import UserError
from fast_diffusers.random import Generator


@pytest.mark.support("Compile")
def test_compiled_model_equals_eager(family):
    sizes = [dict(), dict(batch=3, text=5)]
    truth = [family.predict(**size).numpy() for size in sizes]
    compiled = cinn_infer.compile(family.model, backend="pir")
    for size, expected in zip(sizes, truth, strict=True):
        np.testing.assert_allclose(family.predict(**size), expected, atol=1e-5)
    assert (compiled.graph_count, compiled.recompilations, compiled.fallbacks) == (1, 0, [])
    assert compiled.compile_seconds > 0
    compiled.restore()
    np.testing.assert_array_equal(family.predict(), truth[0])


def test_other_sizes_of_a_fixed_axis_are_compiled_anew(sana):
    truth = sana.predict(height=4).numpy()
    compiled = cinn_infer.compile(sana.model, backend="pir")
    sana.predict()
    np.testing.assert_allclose(sana.predict(height=4), truth, atol=1e-5)
    assert (compiled.graph_count, compiled.recompilations) == (2, 1)
    assert json.loads(json.dumps(compiled.report()))["graph_count"] == 2


def test_pipeline_is_called_as_usual(sana_label):
    call = dict(prompt=["3", "5"], num_inference_steps=2, output_type="np")
    truth = sana_label(**call, generator=Generator(0)).images
    compiled = cinn_infer.compile(sana_label)
    assert compiled.backend_used == "pir" and compiled.target is sana_label
    np.testing.assert_allclose(sana_label(**call, generator=Generator(0)).images, truth, atol=1e-5)
    np.testing.assert_allclose(compiled(**call, generator=Generator(0)).images, truth, atol=1e-5)
    assert compiled.graph_count == 1
    compiled.restore()


def test_buckets_are_compiled_at_once(sana_label):
    call = dict(prompt=["3", "5"], num_inference_steps=2, output_type="np")
    truth = sana_label(**call, generator=Generator(0)).images
    compiled = cinn_infer.compile(sana_label, "pir", buckets=[dict(), dict(prompt=["1"])])
    assert (compiled.graph_count, compiled.recompilations) == (1, 0)  # the batch is free
    np.testing.assert_allclose(sana_label(**call, generator=Generator(0)).images, truth, atol=1e-5)
    assert (compiled.graph_count, compiled.recompilations) == (1, 0)


def test_buckets_of_a_model_and_sizes_outside_of_them(sana):
    def call(height):
        paddle.seed(height)
        sizes = dict(hidden_states=[1, 4, height, 4], encoder_hidden_states=[1, 3, 24])
        return {name: paddle.randn(shape) for name, shape in sizes.items()} | {"timestep": paddle.ones([1])}

    compiled = cinn_infer.compile(sana.model, "pir", buckets=[call(2), call(4)])
    assert (compiled.graph_count, compiled.recompilations) == (2, 0)
    for height, graphs, recompilations in [(4, 2, 0), (6, 3, 1)]:
        found = sana.model(**call(height))[0]
        assert (compiled.graph_count, compiled.recompilations) == (graphs, recompilations)
        with units.tracing():
            np.testing.assert_allclose(found, sana.model(**call(height))[0], atol=1e-5)


def test_a_bucket_that_fails_leaves_the_model_as_it_was(sana):
    with pytest.raises(TypeError):
        cinn_infer.compile(sana.model, "pir", buckets=[{"no_such_argument": 1}])
    cinn_infer.compile(sana.model, "pir").restore()


def test_sana_sprint_with_a_control_image(sprint):
    image = np.random.default_rng(1).random([16, 16, 3])
    call = dict(prompt="a cat", height=16, width=16, output_type="latent", max_sequence_length=12)
    calls = [call | dict(control_image=image), call | dict(guidance_scale=2.0)]
    truth = [sprint(**each, generator=Generator(0)).images.numpy() for each in calls]
    assert np.abs(truth[0] - truth[1]).max() > 1e-3
    compiled = cinn_infer.compile(sprint, "pir")
    for each, expected in zip(calls, truth, strict=True):
        np.testing.assert_allclose(sprint(**each, generator=Generator(0)).images, expected, atol=1e-4)
    assert compiled.graph_count == 2  # with and without what the ControlNet adds


def test_pipeline_of_ppdiffusers(ppdiffusers_sd3_pipeline):
    generate, pipe = ppdiffusers_sd3_pipeline
    truth = generate(num_inference_steps=2).numpy()
    compiled = cinn_infer.compile(pipe, "pir")
    np.testing.assert_allclose(generate(num_inference_steps=2), truth, atol=1e-5)
    assert compiled.graph_count == 1
    compiled.restore()


@pytest.mark.parametrize(("granularity", "graphs"), [("loop", 2)])
def test_parts_of_a_model(flux, granularity, graphs):
    truth = flux.predict().numpy()
    compiled = cinn_infer.compile(flux.model, "pir", granularity)
    np.testing.assert_allclose(flux.predict(), truth, atol=1e-5)
    assert compiled.graph_count == graphs


def test_lora_is_fused_or_switched(sana):
    rng = np.random.default_rng(0)
    lora.inject(sana.model, 2, 2.0, ["to_q", "to_v"])
    for name, weight in lora.state_dict(sana.model).items():
        weight.set_value((0.5 * rng.standard_normal(weight.shape)).astype("float32") if "lora_B" in name else weight)

    def states():
        with lora.active(sana.model, None):
            base = sana.predict().numpy()
        running = sana.predict().numpy()
        lora.fuse(sana.model)
        fused = sana.predict().numpy()
        lora.unfuse(sana.model)
        return base, running, fused

    truth = states()
    assert np.abs(truth[0] - truth[1]).max() > 1e-2
    compiled = cinn_infer.compile(sana.model, "pir")
    for found, expected in zip(states(), truth, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert compiled.graph_count == 2  # fused, the graph of the base model reads the changed weights


def test_model_that_is_told_its_target_time(sana):
    way = target_time.TargetTime.new("auxiliary", sana.model)
    layer = way.embedding.embedder.linear_2
    layer.weight.set_value(0.3 * paddle.ones(layer.weight.shape))
    target_time.attach(sana.model, way)

    def predict(target):
        denoiser = denoiser_for(sana.model)
        paddle.seed(1)
        cond = {"prompt_embeds": paddle.randn([2, 3, 24])}
        with paddle.no_grad():
            return denoiser(paddle.randn([2, 4, 4, 4]), 0.8, cond, target_t=target).numpy()

    truth = [predict(0.5), predict(0.1)]
    assert np.abs(truth[0] - truth[1]).max() > 1e-3
    compiled = cinn_infer.compile(sana.model, "pir")
    for target, expected in zip([0.5, 0.1], truth, strict=True):
        np.testing.assert_allclose(predict(target), expected, atol=1e-5)
    assert compiled.graph_count == 1


def test_caches_act_between_compiled_blocks_only(flux):
    compiled = cinn_infer.compile(flux.model, "pir")
    enable_cache(flux.model, FirstBlockTaylor(threshold=0.05))
    with pytest.raises(UserError, match=r"granularity='block'"):
        flux.predict()
    disable_cache(flux.model)
    compiled.restore()
    enable_cache(flux.model, FirstBlockTaylor(threshold=0.05))
    with pytest.raises(UserError, match="disable_cache"):
        cinn_infer.compile(flux.model, "pir", "block")
    disable_cache(flux.model)
    truth = flux.predict().numpy()
    compiled = cinn_infer.compile(flux.model, "pir", "block")
    enable_cache(flux.model, FirstBlockTaylor(threshold=0.05))
    np.testing.assert_allclose(flux.predict(), truth, atol=1e-5)
    assert compiled.graph_count == 2


METHODS = (
    "TeaCache",
    "TeaBlockCache",
    "SortBlock",
    "FirstBlockTaylor",
    "TaylorSeer",
    "CGTaylor",
    "BlockDance",
    "PyramidAttentionBroadcast",
    "TGate",
)
INSIDE_BLOCKS = ("TaylorSeer", "PyramidAttentionBroadcast", "TGate")
"""Methods that skip parts of blocks, which are inside of graphs."""


@pytest.mark.parametrize("name", ["flux", "sana"])
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_gives_with_compiled_blocks_what_it_gives_without(cached, name, method, tmp_path_factory):
    family = replace(cached.FAMILY_CASES[name])  # with a model of its own
    if method in INSIDE_BLOCKS:
        compiled = cinn_infer.compile(family.model, "pir", "block")
        enable_cache(family.model, cached.ACTIVE[method])
        with pytest.raises(UserError, match=r"acts inside .*Block, .*take another caching method"):
            cached.euler(family)
        disable_cache(family.model)
        compiled.restore()
        return
    images = []
    programs = tmp_path_factory.getbasetemp() / "programs"  # all methods use the same graphs
    for backend in ("eager", "pir"):
        compiled = cinn_infer.compile(family.model, backend, "block", cache=programs)
        enable_cache(family.model, cached.ACTIVE[method])
        images.append(cached.euler(family).numpy())
        stats = cache_stats(family.model)
        assert sum(stats.reused.values()) > 0
        images.append(stats.computed)
        disable_cache(family.model)
        compiled.restore()
    np.testing.assert_allclose(images[0], images[2], atol=2e-5)
    assert images[1] == images[3]


def test_eager_changes_nothing(flux):
    truth = flux.predict().numpy()
    compiled = cinn_infer.compile(flux.model, "eager")
    np.testing.assert_array_equal(flux.predict(), truth)
    assert (compiled.backend_used, compiled.graph_count) == ("eager", 0)


def test_bad_requests(flux):
    for arguments, message in [
        (dict(backend="tvm"), "backend must be one of"),
        (dict(granularity="layer"), "granularity must be one of"),
    ]:
        with pytest.raises(UserError, match=message):
            cinn_infer.compile(flux.model, **arguments)
    with pytest.raises(UserError, match="takes a pipeline with a transformer"):
        cinn_infer.compile(object())
    with pytest.raises(UserError, match="no loop over blocks"):
        cinn_infer.compile(paddle.nn.Linear(2, 2), granularity="loop")
    cinn_infer.compile(flux.model)
    with pytest.raises(UserError, match="compiled already"):
        cinn_infer.compile(flux.model)


class Branching(paddle.nn.Layer):
    def forward(self, x):
        if x.mean() > 0:
            return 2 * x
        return x - 1


class Filtering(paddle.nn.Layer):
    def forward(self, x):
        kept = [each for each in (x, -x) if each.mean() > 0]  # Paddle does not translate conditions in here
        return sum(kept)


class Unsupported(paddle.nn.Layer):
    def forward(self, x):
        if not paddle.in_dynamic_mode():
            raise NotImplementedError("this operator has no static form")
        return x


def test_a_branch_on_a_tensor_becomes_part_of_the_graph():
    model = Branching()
    compiled = cinn_infer.compile(model, "pir")
    for sign in (1, -1):
        x = sign * paddle.ones([2])
        np.testing.assert_array_equal(model(x), 2 * x if sign > 0 else x - 1)
    assert compiled.graph_count == 1


@pytest.mark.parametrize(("kind", "code"), [(Filtering, "kept = ["), (Unsupported, "raise NotImplementedError")])
def test_what_does_not_trace_is_named_with_its_line(kind, code):
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.strip().startswith(code))
    cinn_infer.compile(model := kind(), "pir")
    with pytest.raises(UserError, match=rf"{kind.__name__}.forward does not trace .*test_compile\.py.*line {line}\b"):
        model(paddle.ones([2]))
