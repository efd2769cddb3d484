import numpy as np
import onnx
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.static import InputSpec

from cinn_infer import onnx_files, onnx_mend, onnx_weights
from cinn_infer.engine_openvino import OpenVINOEngine
from fast_diffusers.errors import UserError

pytest.importorskip("paddle2onnx", reason="the extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")


class Gelus(nn.Layer):
    """One by erf between two by tanh, of large entries, where they differ most."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = F.gelu(3 * self.first(x), approximate=True)
        x = F.gelu(self.second(x))
        return F.gelu(3 * self.third(x), approximate=True)


class Norm(nn.Layer):
    """With an epsilon that matters, then twice as large."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4, epsilon=0.5)

    def forward(self, x):
        return F.interpolate(self.norm(x.reshape([-1, 4, 2, 2])), scale_factor=2, mode="nearest")


class Unknown(nn.Layer):
    """What paddle2onnx has no operator for."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x):
        return paddle.digamma(self.scale(x) ** 2 + 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """({class: (job, input, output of eager)}, what failed); that in the middle ends paddle2onnx's process."""
    folder, found = tmp_path_factory.mktemp("onnx"), {}
    paddle.seed(0)
    for cls, columns in ((Gelus, 4), (Unknown, 4), (Norm, 16)):
        model, stem, x = cls().eval(), folder / cls.__name__, paddle.randn([3, columns])
        paddle.jit.save(model, str(stem), input_spec=[InputSpec([None, columns], "float32", "x")])
        job = onnx_files.Job(*(stem.with_suffix(suffix) for suffix in (".json", ".pdiparams", ".onnx")))
        found[cls] = job, x.numpy(), model(x).numpy()
    return found, onnx_files.write([job for job, *_ in found.values()])


@pytest.mark.parametrize("cls", [Gelus, Norm])
def test_same_as_eager(written, cls):
    job, x, truth = written[0][cls]
    (found,) = onnxruntime.InferenceSession(job.target).run(None, {"x": x})
    np.testing.assert_allclose(found, truth, atol=2e-6)


def test_an_operator_that_ends_paddle2onnx(written):
    found, failed = written
    job = found[Unknown][0]
    assert set(failed) == {job.target} and "unsupported operators" in failed[job.target]
    assert not job.target.exists() and not job.readable.exists() and job.graph.exists()


@pytest.fixture(scope="module")
def large(written):
    """The files of models that are too large for protobuf, as they are told, by class."""
    targets = {cls: written[0][cls][0].target.with_name(f"large_{cls.__name__}.onnx") for cls in (Gelus, Norm)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "LARGEST", 10)
        assert onnx_files.write([written[0][cls][0]._replace(target=target) for cls, target in targets.items()]) == {}
    return targets


@pytest.mark.parametrize(("cls", "size"), [(Gelus, 3 * 20 * 4), (Norm, 2 * 4 * 4)])
def test_weights_beyond_protobuf_stay_in_their_file(written, large, cls, size):
    job, x, truth = written[0][cls]
    graph = onnx.load(large[cls], load_external_data=False).graph
    kept = [{each.key: each.value for each in tensor.external_data} for tensor in graph.initializer]
    assert {each["location"] for each in kept if each} == {job.weights.name}
    assert sum(int(each["length"]) for each in kept if each) == size
    (same,) = onnxruntime.InferenceSession(job.target).run(None, {"x": x})
    (found,) = onnxruntime.InferenceSession(large[cls]).run(None, {"x": x})
    np.testing.assert_array_equal(found, same)
    pytest.importorskip("openvino", reason="the extra [export] is not installed")
    np.testing.assert_allclose(OpenVINOEngine([large[cls]], ["x"], "fp32", 1, "").run([x])[0], truth, atol=2e-6)


def test_weights_of_another_graph(written, tmp_path):
    (gelus, *_), (norm, *_) = written[0][Gelus], written[0][Norm]
    onnx.save(onnx.load(norm.target), tmp_path / "norm.onnx")
    with pytest.raises(UserError, match=r"Gelus\.pdiparams holds other tensors than Norm\.json has parameters"):
        onnx_weights.attach(tmp_path / "norm.onnx", norm.graph, gelus.weights)
    cut = tmp_path / "cut.pdiparams"
    cut.write_bytes(gelus.weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="is cut off"):
        list(onnx_weights.tensors(cut))


def test_gelus_that_do_not_match(written, tmp_path):
    found = written[0]
    model = onnx.load(found[Norm][0].target)
    onnx.save(model, tmp_path / "norm.onnx")
    with pytest.raises(UserError, match="0 error functions, the Paddle graph 3 GELUs"):
        onnx_mend.mend(tmp_path / "norm.onnx", found[Gelus][0].graph)


def test_what_is_missing(monkeypatch):
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "paddle2onnx" else object())
    with pytest.raises(
        UserError, match=r'needs paddle2onnx, not installed here: pip install "fast-diffusers\[export\]'
    ):
        onnx_files.require()
