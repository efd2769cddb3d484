import numpy as np
import onnx
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.static import InputSpec

from cinn_infer import onnx_files, onnx_mend
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


def test_weights_beyond_protobuf(written, monkeypatch):
    job = written[0][Norm][0]
    monkeypatch.setattr(onnx_files, "LARGEST", 10)
    other = job._replace(target=job.target.with_name("large.onnx"))
    assert "paddle2onnx 2.1.0 writes files of up to 2 GiB" in onnx_files.write([other])[other.target]


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
