import json

import numpy as np
import pytest

import cinn_infer
from cinn_infer import choice, engines, program_cache
from fast_diffusers.errors import UserError

pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
pytest.importorskip("openvino", reason="the extra [export] is not installed")

TIMES = {"paddle": 3.0, "onnxruntime": 1.0, "openvino": 2.0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of this test's caches."""
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """What was measured, in order; with fixed results."""
    found = []

    def measure(opened):
        found.append([graphs.runtime for graphs in opened])
        return {graphs.runtime: TIMES[graphs.runtime] for graphs in opened}

    monkeypatch.setattr(choice, "_measure", measure)
    return found


def runtime(folder, **options):
    return cinn_infer.load(folder, threads=1, **options).graphs.runtime


def test_fastest_is_chosen_and_remembered(onnx_export, cache, measured):
    before = sorted(onnx_export.rglob("*"))
    assert runtime(onnx_export) == "onnxruntime" == runtime(onnx_export)
    assert measured == [list(engines.RUNTIMES)]  # once
    (file,) = (cache / "runtimes").iterdir()
    assert json.loads(file.read_text())["milliseconds"] == TIMES
    assert sorted(onnx_export.rglob("*")) == before
    file.write_text(json.dumps({"runtime": "openvino"}))
    assert runtime(onnx_export) == "openvino"  # it is this file that is read


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runtime": 3}', '{"runtime": "tvm"}', "\x00"])
def test_damaged_memory_is_measured_again(onnx_export, cache, measured, content):
    runtime(onnx_export)
    (file,) = (cache / "runtimes").iterdir()
    file.write_text(content)
    assert runtime(onnx_export) == "onnxruntime" and len(measured) == 2
    assert json.loads(file.read_text())["runtime"] == "onnxruntime"


@pytest.mark.parametrize("kind", ["off", "unwritable"])
def test_without_a_cache(onnx_export, tmp_path, measured, kind, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(program_cache.VARIABLE, "off" if kind == "off" else str(tmp_path / "file"))
    assert runtime(onnx_export) == runtime(onnx_export) == "onnxruntime" and len(measured) == 2


def test_threads_versions_and_precision_are_part_of_the_key(onnx_export, monkeypatch):
    def key(precision="fp32", threads=1):
        return choice._key(onnx_export, precision, threads, ["paddle"])

    keys = [key(), key("bf16"), key(threads=2)]
    monkeypatch.setattr(choice, "_version", lambda package: "another")
    assert len({*keys, key()}) == 4


def test_wrong_runtime_is_left_out_with_a_warning(onnx_export, cache, measured, monkeypatch):
    class Wrong(engines.OnnxRuntimeEngine):
        def run(self, inputs):
            return [each + 1 for each in super().run(inputs)]

    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, "onnxruntime": Wrong})
    with pytest.warns(RuntimeWarning, match=r"a runtime is not used: .* differs by .* in ONNX Runtime"):
        assert runtime(onnx_export) == "openvino"


def test_only_what_is_installed_and_able(onnx_export, cache, measured, monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda: ("paddle",))
    assert runtime(onnx_export) == "paddle" and not measured
    with pytest.raises(UserError, match=r"nothing that is installed can run .* in int8: .*OpenVINO is not installed"):
        runtime(onnx_export, precision="int8")


def test_measuring_runs_every_candidate(onnx_export, cache):
    """With the real clock: whatever is fastest here, the images are right."""
    pipe = cinn_infer.load(onnx_export, threads=1)
    (file,) = (cache / "runtimes").iterdir()
    assert set(json.loads(file.read_text())["milliseconds"]) == set(engines.RUNTIMES)
    assert pipe.graphs.runtime == json.loads(file.read_text())["runtime"]
    assert np.isfinite(pipe.graphs.self_check())
