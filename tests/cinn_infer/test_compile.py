import json

import numpy as np
import paddle
import pytest

import cinn_infer
from cinn_infer import backends
from fast_diffusers import lora, target_time
from fast_diffusers.caching import FirstBlockTaylor, disable_cache, enable_cache
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.errors import UserError
from fast_diffusers.random import Generator


@pytest.mark.support("Compile")
def test_compiled_model_equals_eager(family):
    sizes = [dict(), dict(batch=3, text=5)]
    truth = [family.predict(**size).numpy() for size in sizes]
    is_free = "ZImage" not in type(family.model).__name__
    compiled = cinn_infer.compile(family.model, backend="pir")
    for size, expected in zip(sizes if is_free else sizes[:1], truth, strict=False):
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


def test_what_does_not_trace_is_named_with_its_line():
    class Odd(paddle.nn.Layer):
        def forward(self, x):
            if not paddle.in_dynamic_mode():
                raise NotImplementedError("this operator has no static form")
            return x

    cinn_infer.compile(odd := Odd(), "pir")
    with pytest.raises(UserError, match=r"Odd.forward does not trace .*test_compile\.py.*line \d+"):
        odd(paddle.ones([2]))


class TestCinn:
    """Up to the compiler's call: it needs a GPU wheel."""

    def test_missing_is_an_error_that_says_how_to_get_it(self, flux):
        if backends.missing_for_cinn() is None:
            pytest.skip("CINN is here")
        with pytest.raises(UserError, match=r"cannot run: .*pip install paddlepaddle-gpu"):
            cinn_infer.compile(flux.model, "cinn")
        assert backends.choose("auto") == "pir"

    def test_missing_device(self, monkeypatch):
        monkeypatch.setattr(paddle, "is_compiled_with_cinn", lambda: True)
        monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
        monkeypatch.setattr(paddle, "get_device", lambda: "cpu")
        with pytest.raises(UserError, match="Paddle runs on cpu"):
            backends.choose("cinn")

    @pytest.mark.parametrize(("granularity", "graphs"), [("model", 1), ("loop", 2)])
    def test_compiler_is_called(self, flux, monkeypatch, granularity, graphs):
        called, known = [], {"FLAGS_use_cinn": False, "FLAGS_prim_all": False}
        state = dict(known)
        to_static = paddle.jit.to_static

        def compiler(unit, **options):
            called.append(options | {"flags": dict(state)})
            return to_static(unit, **options | {"backend": None})

        monkeypatch.setattr(backends, "missing_for_cinn", lambda: None)
        monkeypatch.setattr(backends, "uses_cinn", lambda static: True)
        monkeypatch.setattr(backends, "known_flags", lambda: known)
        monkeypatch.setattr(paddle, "set_flags", state.update)
        monkeypatch.setattr(paddle.jit, "to_static", compiler)
        compiled = cinn_infer.compile(flux.model, granularity=granularity)
        truth = flux.predict().numpy()
        assert compiled.backend_used == "cinn" and compiled.graph_count == len(called) == graphs
        for options in called:
            assert options["backend"] == "CINN" and options["full_graph"] is True
            assert options["flags"] == {"FLAGS_use_cinn": True, "FLAGS_prim_all": True}
            assert None in options["input_spec"][0][0].shape or -1 in options["input_spec"][0][0].shape
        assert state == known  # as before
        compiled.restore()
        np.testing.assert_allclose(truth, flux.predict(), atol=1e-5)

    def test_silent_fallback_of_the_translator_is_an_error(self, flux, monkeypatch):
        if backends.missing_for_cinn() is None:
            pytest.skip("CINN is here")
        monkeypatch.setattr(backends, "missing_for_cinn", lambda: None)
        monkeypatch.setattr(backends, "known_flags", dict)
        cinn_infer.compile(flux.model, "cinn")
        with pytest.raises(UserError, match="ran without CINN"):
            flux.predict()
