import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cinn_infer
from cinn_infer import engines
from cinn_infer.graphs import Graphs
from cinn_infer.manifest import Manifest
from fast_diffusers.errors import UserError

EVERY = [(runtime, precision) for runtime in engines.RUNTIMES for precision in engines.CAN[runtime]]


@pytest.fixture
def copy(onnx_export, tmp_path):
    return Path(shutil.copytree(onnx_export, tmp_path / "copy"))


def require(runtime, precision):
    try:
        engines.require(runtime, precision, "SanaTransformer2DModel")
    except UserError as error:
        pytest.skip(str(error))


def spoil_onnx(path):
    """Another model with the same structure: all matrices are larger."""
    import onnx

    model = onnx.load(path)
    constants = [each.t for node in model.graph.node for each in node.attribute if each.name == "value"]
    for tensor in [*model.graph.initializer, *constants]:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.ndim == 2:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.5) * array, tensor.name))
    onnx.save(model, path)


def spoil_paddle(path):
    """Another model: the last weights of the file are others."""
    content = bytearray(path.read_bytes())
    content[-256:] = (np.frombuffer(bytes(content[-256:]), "float32") * 3 + 1).astype("float32").tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize(("runtime", "precision"), EVERY)
def test_another_models_graph_is_refused(copy, runtime, precision):
    """Its checksums are right: it is the outputs that give it away."""
    require(runtime, precision)
    for path in (copy / "transformer").glob("*.onnx"):
        spoil_onnx(path)
    for path in (copy / "transformer").glob("*.pdiparams"):
        spoil_paddle(path)
    Manifest.read(copy).write(copy)
    with pytest.raises(UserError, match=rf"differs by .* in {engines.TITLES[runtime]}, {precision}, more than"):
        cinn_infer.load(copy, runtime, precision, 1)


def test_graphs_without_an_onnx_file_run_in_paddle(copy):
    manifest = Manifest.read(copy)
    graphs = [replace(graph, files={"paddle": graph.files["paddle"]}) for graph in manifest.graphs]
    mixed = replace(manifest, graphs=graphs + manifest.graphs)
    plan = [Graphs(mixed, copy, "openvino", "int8").plan(graph) for graph in mixed.graphs]
    assert plan == [("paddle", "fp32")] * len(graphs) + [("openvino", "int8")] * len(graphs)
    assert Graphs(mixed, copy, "openvino", "int8").report()["graphs"][0]["runtime"] == "paddle"


def test_transformer_without_an_onnx_file(copy):
    require("onnxruntime", "fp32")
    manifest = Manifest.read(copy)
    manifest.graphs = [
        replace(graph, files={"paddle": graph.files["paddle"]}, lacking={"onnx": "the reason"})
        for graph in manifest.graphs
    ]
    manifest.write(copy)
    with pytest.raises(UserError, match=r"no ONNX file of its transformer, which ONNX Runtime needs \(the reason\)"):
        cinn_infer.load(copy, "onnxruntime")


@pytest.mark.parametrize("runtime", engines.RUNTIMES)
def test_an_error_while_running(copy, runtime, monkeypatch):
    require(runtime, "fp32")

    class Broken(engines.ENGINES[runtime]):
        def run(self, inputs):
            raise RuntimeError("first line\nthe kernel is missing")

    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, runtime: Broken})
    with pytest.raises(UserError, match=rf"does not run in {engines.TITLES[runtime]}: the kernel is missing"):
        cinn_infer.load(copy, runtime)
