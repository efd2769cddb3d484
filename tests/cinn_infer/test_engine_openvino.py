import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from cinn_infer import check, engine_openvino, engines
from fast_diffusers.errors import UserError

FREQUENCIES = np.exp(-np.linspace(0, 9, 16, dtype="float32"))


def test_angles_are_not_rounded(tmp_path):
    """Of time, up to 1000: bfloat16 has steps of 4 there, and OpenVINO by itself gives other waves altogether."""
    try:
        engines.require("openvino", "bf16", "FluxTransformer2DModel")
    except UserError as error:
        pytest.skip(str(error))
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype("float32")
    nodes = [
        helper.make_node("Mul", ["t", "frequencies"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["wave"]),
        helper.make_node("MatMul", ["wave", "weight"], ["out"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])]
        for name, size in (("t", 1), ("out", 16))
    ]
    constants = {"frequencies": FREQUENCIES, "weight": weight}
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "time", *ends, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "time.onnx")
    engine = engines.open_engine("openvino", [tmp_path / "time.onnx"], ["t"], "bf16", 1, "FluxTransformer2DModel")
    t = np.float32([[999.3], [541.7]])
    truth = np.sin(t * FREQUENCIES) @ weight
    assert 1e-4 < check.error(engine.run([t])[0], truth, "bf16") < 0.01


def product(folder):
    """An ONNX file: y = x @ weight."""
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 64])] for name in ("x", "y")]
    weight = numpy_helper.from_array(np.eye(64, dtype="float32"), "weight")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "product", *ends, [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "product.onnx")
    return folder / "product.onnx"


WEIGHTS = 64 * 64 * 4


@pytest.mark.parametrize(
    ("room", "siblings", "compiled"),
    [(2**30, 1, ["2", "3", "4", "2"]), (3 * WEIGHTS, 1, ["2", "3", "4", "2"]), (3 * WEIGHTS, 4, ["?"])],
)
def test_small_graphs_are_compiled_for_their_shapes(tmp_path, monkeypatch, room, siblings, compiled):
    """Where two may be kept, the one used longest ago gives way to a third; what has no room is compiled once."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(engine_openvino, "ROOM", room)
    monkeypatch.setattr(engine_openvino, "COPIES", 2)
    rows = []

    core = engine_openvino._core()

    def compile_model(graph, *args):
        rows.append(str(graph.inputs[0].get_partial_shape()[0]))
        return core.compile_model(graph, *args)

    counting = SimpleNamespace(read_model=core.read_model, compile_model=compile_model)
    monkeypatch.setattr(engine_openvino, "_core", lambda: counting)
    engine = engine_openvino.OpenVINOEngine([product(tmp_path)], ["x"], "fp32", 1, "", siblings)
    for count in (2, 3, 2, 3, 4, 3, 2):
        x = np.random.default_rng(count).standard_normal((count, 64)).astype("float32")
        np.testing.assert_array_equal(engine.run([x])[0], x)
    assert rows == compiled


SIGNAL = """
engines = [OpenVINOEngine([Path(sys.argv[1])], ["x"], "fp32", 1, "") for _ in range(3)]
for place in (0, 0, 0):
    del engines[place]
    gc.collect()
memory = [bytearray(10_000) for _ in range(1000)]
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""
LOGGERS = """
logging.basicConfig(level=logging.INFO)
OpenVINOEngine([Path(sys.argv[1])], ["x"], "int8", 1, "")
print(logging.getLoggerClass().__name__, [handler.level for handler in logging.getLogger().handlers])
"""


@pytest.mark.parametrize(
    ("package", "code", "printed"), [("openvino", SIGNAL, "handled\n"), ("nncf", LOGGERS, "Logger [0]\n")]
)
def test_the_rest_of_the_process_is_left_alone(tmp_path, package, code, printed):
    """A `Core` for each engine ends in a segmentation fault at the next signal; NNCF changes loggers and handlers."""
    if find_spec(package) is None:  # importing NNCF here would do what the test is about to this process
        pytest.skip(f"{package} is not installed")
    imports = "import gc, logging, os, signal, sys\nfrom pathlib import Path\n"
    imports += "from cinn_infer.engine_openvino import OpenVINOEngine\n"
    done = subprocess.run([sys.executable, "-c", imports + code, product(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
