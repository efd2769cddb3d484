"""The path to Paddle's compiler, up to its call: it needs a GPU wheel."""

import types

import numpy as np
import paddle
import pytest

import cinn_infer
from cinn_infer import backends
from fast_diffusers.errors import UserError

KNOWN = {"FLAGS_use_cinn": False, "FLAGS_prim_all": False, "FLAGS_enable_cinn_kernel_cache": False}
KERNELS = "FLAGS_cinn_kernel_cache_save_path"


class Compiler:
    """Stands in for `paddle.jit.to_static` and for Paddle's flags, and notes with what it was called."""

    def __init__(self, monkeypatch):
        self.calls, self.state = [], {**KNOWN, KERNELS: "/before/"}
        self.before, self._to_static = dict(self.state), paddle.jit.to_static
        monkeypatch.setattr(backends, "missing_for_cinn", lambda: None)
        monkeypatch.setattr(backends, "uses_cinn", lambda static: True)
        monkeypatch.setattr(backends, "known_flags", lambda: dict(self.state))
        monkeypatch.setattr(paddle, "set_flags", self.state.update)
        monkeypatch.setattr(paddle.jit, "to_static", self)

    def __call__(self, unit, **options):
        self.calls.append(types.SimpleNamespace(unit=unit, flags=dict(self.state), **options))
        return self._to_static(unit, **options | {"backend": None})


@pytest.fixture
def compiler(monkeypatch):
    return Compiler(monkeypatch)


@pytest.fixture
def without_cinn():
    if backends.missing_for_cinn() is None:
        pytest.skip("CINN is here")


GRAPHS = {
    "model": [("FluxTransformer2DModel", "forward")],
    "loop": [("FluxTransformer2DModel", "run_double_blocks"), ("FluxTransformer2DModel", "run_single_blocks")],
    "block": [("FluxTransformerBlock", "forward"), ("FluxSingleTransformerBlock", "forward")],
}


@pytest.mark.parametrize("granularity", GRAPHS)
def test_each_part_goes_to_the_compiler_once(flux, compiler, granularity):
    compiled = cinn_infer.compile(flux.model, granularity=granularity)
    result = flux.predict().numpy()
    assert compiled.backend_used == "cinn" and compiled.graph_count == len(compiler.calls)
    parts = [(type(call.unit.layer).__name__, call.unit._method.__name__) for call in compiler.calls]
    assert parts == GRAPHS[granularity]
    for call in compiler.calls:
        assert (call.backend, call.full_graph) == ("CINN", True)
        assert call.flags == {**compiler.before, "FLAGS_use_cinn": True, "FLAGS_prim_all": True}
    assert compiler.state == compiler.before
    compiled.restore()
    np.testing.assert_allclose(result, flux.predict(), atol=1e-5)


def test_inputs_are_described_with_free_axes(flux, compiler):
    cinn_infer.compile(flux.model)
    flux.predict(batch=2, height=8, width=4, text=3)
    [call] = compiler.calls
    found = {spec.name: (list(spec.shape), str(spec.dtype)) for spec in call.input_spec[0]}
    assert found == {
        "hidden_states": ([-1, -1, 16], "paddle.float32"),
        "encoder_hidden_states": ([-1, -1, 8], "paddle.float32"),
        "pooled_projections": ([-1, 8], "paddle.float32"),
        "timestep": ([-1], "paddle.float32"),
        "guidance": ([-1], "paddle.float32"),
        "img_ids": ([-1, 3], "paddle.float32"),
        "txt_ids": ([-1, 3], "paddle.float32"),
    }


def test_height_and_width_are_fixed_where_the_model_reads_them(sana, compiler):
    cinn_infer.compile(sana.model)
    for height in (4, 8):
        sana.predict(height=height)
    assert [list(call.input_spec[0][0].shape) for call in compiler.calls] == [[-1, 4, height, 4] for height in (4, 8)]


def test_flags_are_put_back_after_an_error(compiler):
    class Odd(paddle.nn.Layer):
        def forward(self, x):
            assert paddle.in_dynamic_mode()
            return x

    cinn_infer.compile(odd := Odd())
    with pytest.raises(UserError, match="does not trace"):
        odd(paddle.ones([2]))
    assert compiler.calls and compiler.state == compiler.before


def test_kernels_are_kept_beside_the_programs(compiler, tmp_path):
    cinn_infer.compile(model := paddle.nn.Linear(2, 2), cache=tmp_path / "programs")
    model(paddle.ones([1, 2]))
    [call] = compiler.calls
    assert call.flags["FLAGS_enable_cinn_kernel_cache"] is True
    assert call.flags[KERNELS] == f"{tmp_path / 'kernels'}/"
    assert compiler.state == compiler.before


def test_program_from_disk_goes_to_cinn_too(compiler, tmp_path, monkeypatch):
    backend = []
    for _ in range(2):
        model = paddle.nn.Linear(2, 2)
        compiled = cinn_infer.compile(model, cache=tmp_path)
        monkeypatch.setattr(  # what would call the compiler
            "cinn_infer.programs.Backend", types.SimpleNamespace(CINN=paddle.jit.dy2static.utils.Backend.PHI, PHI=None)
        )
        model(paddle.ones([1, 2]))
        backend += [graph.program._runner._backend for graph in compiled.graphs]
    assert (compiled.cache.hits, len(compiler.calls)) == (1, 1)
    assert backend[1] is paddle.jit.dy2static.utils.Backend.PHI


@pytest.mark.parametrize("backend", ["eager", "pir", "cinn"])
def test_flags_that_this_wheel_knows_are_set_and_restored(backend):
    before = backends.known_flags()
    assert {*backends.KERNEL_CACHE_FLAGS, *backends.CPU_FLAGS} <= set(before)
    with backends.flags(backend):
        inside = backends.known_flags()
    wanted = backends.wanted_flags(backend, None)
    assert inside == before | {name: value for name, value in wanted.items() if name in before}
    assert (inside != before) == (backend == "cinn" or (backend == "pir" and paddle.get_device() == "cpu"))
    assert backends.known_flags() == before


def test_missing_is_an_error_that_says_how_to_get_it(flux, without_cinn):
    with pytest.raises(UserError, match=r"cannot run: .*pip install paddlepaddle-gpu.*backend='pir'"):
        cinn_infer.compile(flux.model, "cinn")


@pytest.mark.parametrize(
    ("cinn", "cuda", "device", "chosen"),
    [
        (True, True, "gpu:0", "cinn"),
        (True, True, "cpu", "pir"),
        (True, False, "cpu", "pir"),
        (False, True, "gpu:0", "pir"),
    ],
)
def test_auto_takes_cinn_where_it_can_run(monkeypatch, cinn, cuda, device, chosen):
    monkeypatch.setattr(paddle, "is_compiled_with_cinn", lambda: cinn)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: cuda)
    monkeypatch.setattr(paddle, "get_device", lambda: device)
    assert backends.choose("auto") == chosen
    if chosen == "pir":
        with pytest.raises(UserError, match=f"Paddle runs on {device}" if cinn else "built without CINN"):
            backends.choose("cinn")


def test_silent_fallback_of_the_translator_is_an_error(flux, monkeypatch, without_cinn):
    monkeypatch.setattr(backends, "missing_for_cinn", lambda: None)
    monkeypatch.setattr(backends, "known_flags", dict)
    cinn_infer.compile(flux.model, "cinn")
    with pytest.raises(UserError, match="ran without CINN"):
        flux.predict()
