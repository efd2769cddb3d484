import numpy as np
import onnx
import paddle
import pytest
from onnx import TensorProto, helper, numpy_helper
from paddle import inference
from paddle.static import InputSpec

from cinn_infer import backends, check, engine_paddle, engines
from fast_diffusers.compat import openmp_threads, usable_cores, without_kernel_names
from fast_diffusers.errors import UserError

MODEL = "FluxTransformer2DModel"
EVERY = [(runtime, precision) for runtime in engines.RUNTIMES for precision in engines.CAN[runtime]]


class Sinusoid(paddle.nn.Layer):
    """What every embedding of time does: two unary operators read one tensor."""

    def __init__(self):
        super().__init__()
        self.scale = paddle.nn.Linear(8, 16)

    def forward(self, t):
        angle = self.scale(t)
        return paddle.concat([angle.cos(), angle.sin()], axis=-1)


def as_onnx(model):
    """The same graph."""
    weights = [numpy_helper.from_array(each.numpy(), name) for name, each in model.scale.named_parameters()]
    nodes = [
        helper.make_node("MatMul", ["t", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["cos"]),
        helper.make_node("Sin", ["angle"], ["sin"]),
        helper.make_node("Concat", ["cos", "sin"], ["out"], axis=-1),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])]
        for name, size in (("t", 8), ("out", 32))
    ]
    graph = helper.make_graph(nodes, "sinusoid", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory):
    """(files by format, input, output) of an exported `Sinusoid`."""
    paddle.seed(0)
    model, t = Sinusoid(), np.linspace(0.5, 1.5, 24, dtype="float32").reshape(3, 8)
    stem = tmp_path_factory.mktemp("sinusoid") / "graph"
    paddle.jit.save(model.eval(), str(stem), input_spec=[InputSpec([None, 8], "float32", "t")])
    onnx.save(as_onnx(model), stem.with_suffix(".onnx"))
    files = {"paddle": [stem.with_suffix(".json"), stem.with_suffix(".pdiparams")], "onnx": [stem.with_suffix(".onnx")]}
    return files, t, model(paddle.to_tensor(t)).numpy()


def require(runtime, precision):
    """Skip where the packages of a runtime are not installed, or the processor cannot."""
    try:
        engines.require(runtime, precision, MODEL)
    except UserError as error:
        pytest.skip(str(error))


def opened(sinusoid, runtime, precision, names=("t",)):
    require(runtime, precision)
    return engines.open_engine(runtime, sinusoid[0][engines.FORMAT[runtime]], names, precision, 1, MODEL)


def test_predictor_writes_over_an_input_that_is_still_read(sinusoid):
    """The bug that `PaddleEngine` avoids. When this fails Paddle is cured, and `delete_pass` can go."""
    files, t, truth = sinusoid
    config = inference.Config(*map(str, files["paddle"]))
    config.disable_gpu()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    predictor.get_input_handle("t").copy_from_cpu(t)
    predictor.run()
    found = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    assert np.abs(found - truth).max() > 0.1


class Mean(paddle.nn.Layer):
    def forward(self, x):
        return x.mean(-1, keepdim=True)


def test_stdout_belongs_to_the_caller(tmp_path, capfd):
    """When the first half fails Paddle is cured, and `without_kernel_names` can go."""
    paddle.jit.save(Mean().eval(), str(tmp_path / "graph"), input_spec=[InputSpec([None, 8], "float32", "x")])
    files, x = [tmp_path / "graph.json", tmp_path / "graph.pdiparams"], np.ones([3, 8], "float32")
    predictor = inference.create_predictor(engine_paddle.configuration(files, "fp32", 1, MODEL))
    predictor.get_input_handle("x").copy_from_cpu(x)
    predictor.run()
    with without_kernel_names():  # also empties what C has buffered
        pass
    assert "CheckIfOneDNNSupport" in capfd.readouterr().out
    engine = engine_paddle.PaddleEngine(files, ["x"], "fp32", 1, MODEL)
    print("before")
    assert (engine.run([x])[0] == 1).all()
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize(("runtime", "precision"), EVERY)
def test_outputs_and_threads(sinusoid, runtime, precision):
    engine = opened(sinusoid, runtime, precision)
    _, t, truth = sinusoid
    before = openmp_threads()
    first = engine.run([t])
    engine.run([t[:2] + 1])  # must not change what was given before
    assert len(first) == 1 and check.error(first[0], truth, precision) < (1e-6 if precision == "fp32" else 0.02)
    assert check.error(engine.run([t[:2]])[0], truth[:2], precision) < (1e-6 if precision == "fp32" else 0.02)
    assert openmp_threads() == before


@pytest.mark.parametrize("runtime", engines.RUNTIMES)
def test_number_of_threads(sinusoid, runtime, monkeypatch):
    """Every runtime is told it; this looks at what each of them then says."""
    require(runtime, "fp32")
    files = sinusoid[0][engines.FORMAT[runtime]]
    engine = engines.open_engine(runtime, files, ["t"], "fp32", 2, MODEL)
    if runtime == "paddle":
        assert engine_paddle.configuration(files, "fp32", 2, MODEL).cpu_math_library_num_threads() == 2
    elif runtime == "onnxruntime":
        assert engine._session.get_session_options().intra_op_num_threads == 2
    else:
        compiled = engine._model._request(None).get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == min(2, usable_cores())


@pytest.mark.parametrize("runtime", engines.RUNTIMES)
def test_names_of_another_graph(sinusoid, runtime):
    with pytest.raises(UserError, match="its manifest says"):
        opened(sinusoid, runtime, "fp32", names=("x",))


@pytest.mark.parametrize("runtime", engines.RUNTIMES)
def test_files_that_are_no_graph(sinusoid, runtime, tmp_path):
    require(runtime, "fp32")
    paths = [tmp_path / path.name for path in sinusoid[0][engines.FORMAT[runtime]]]
    for path in paths:
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=f"{engines.TITLES[runtime]} does not open .*graph"):
        engines.open_engine(runtime, paths, ["t"], "fp32", 1, MODEL)


@pytest.mark.parametrize(
    ("runtime", "precision", "message"),
    [
        ("tvm", "fp32", "runtime must be auto or one of paddle, onnxruntime, openvino, got 'tvm'"),
        ("paddle", "int8", r"Paddle Inference runs fp32 and bf16 here, not int8: load with runtime='openvino'"),
        ("onnxruntime", "bf16", r"ONNX Runtime runs fp32 here, not bf16: load with runtime='paddle' or 'openvino'"),
        ("paddle", "bf16", "bf16, not QwenImageTransformer2DModel: load it in fp32"),
    ],
)
def test_what_a_runtime_cannot_do(runtime, precision, message):
    with pytest.raises(UserError, match=message):
        engines.require(runtime, precision, "QwenImageTransformer2DModel")


@pytest.mark.parametrize(
    ("package", "runtime", "precision", "message"),
    [
        ("onnxruntime", "onnxruntime", "fp32", r'ONNX Runtime is not installed: pip install "fast-diffusers\[export\]'),
        ("openvino", "openvino", "int8", r"OpenVINO is not installed"),
        ("nncf", "openvino", "int8", r"precision='int8' needs NNCF, which is not installed: pip install"),
    ],
)
def test_what_is_not_installed(package, runtime, precision, message, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == package else object())
    assert ("openvino" in engines.installed()) == (package != "openvino") and "paddle" in engines.installed()
    with pytest.raises(UserError, match=message):
        engines.require(runtime, precision, MODEL)


def test_bf16_of_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16", lambda: False)
    monkeypatch.setattr(engines, "has_bfloat16", lambda: False)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    for runtime in ("paddle", "openvino"):
        with pytest.raises(UserError, match="needs a processor with AVX-512"):
            engines.require(runtime, "bf16", MODEL)


class Recorder:
    """Stands in for Paddle Inference's Config: notes what is called."""

    def __init__(self, *files):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_configuration_for_a_gpu(monkeypatch):
    """All that can be shown without one: what the predictor is asked for, and in which order."""
    monkeypatch.setattr(inference, "Config", Recorder)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:1")
    engines.require("paddle", "bf16", "QwenImageTransformer2DModel")  # only oneDNN is limited to some models
    config = engine_paddle.configuration(["graph", "weights"], "bf16", 1, MODEL, cinn=True)
    names = [name for name, *_ in config.calls]
    assert config.calls[1] == ("enable_use_gpu", 256, 1, inference.PrecisionType.Bfloat16)
    order = ["enable_use_gpu", "enable_new_ir", "enable_new_executor", "enable_cinn"]
    assert [name for name in names if name in order] == order
    assert ("delete_pass", "inplace_pass") in config.calls and "disable_gpu" not in names
    plain = engine_paddle.configuration(["graph", "weights"], "fp32", 1, MODEL)
    assert plain.calls[1] == ("enable_use_gpu", 256, 1, inference.PrecisionType.Float32)
    assert "enable_cinn" not in [name for name, *_ in plain.calls]


def test_cinn_where_it_cannot_run(monkeypatch):
    with pytest.raises(UserError, match="cinn=True is for runtime='paddle', not 'openvino'"):
        engines.require_cinn("openvino")
    monkeypatch.setattr(backends, "missing_for_cinn", lambda: "this wheel of PaddlePaddle was built without CINN")
    with pytest.raises(UserError, match=r"cinn=True cannot run: this wheel .* built without CINN; install a GPU wheel"):
        engines.require_cinn("paddle")
