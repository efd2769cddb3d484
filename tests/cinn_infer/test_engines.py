import numpy as np
import paddle
import pytest
from paddle import inference
from paddle.static import InputSpec

from cinn_infer import engines
from fast_diffusers.compat import openmp_threads
from fast_diffusers.errors import UserError


class Sinusoid(paddle.nn.Layer):
    """What every embedding of time does: two unary operators read one tensor."""

    def __init__(self):
        super().__init__()
        self.scale = paddle.nn.Linear(1, 4)

    def forward(self, t):
        angle = self.scale(t)
        return paddle.concat([angle.cos(), angle.sin()], axis=-1)


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory):
    """(files, input, output) of an exported `Sinusoid`."""
    paddle.seed(0)
    model, t = Sinusoid(), np.linspace(0.5, 1.5, 3, dtype="float32")[:, None]
    stem = tmp_path_factory.mktemp("sinusoid") / "graph"
    paddle.jit.save(model.eval(), str(stem), input_spec=[InputSpec([None, 1], "float32", "t")])
    return [stem.with_suffix(".json"), stem.with_suffix(".pdiparams")], t, model(paddle.to_tensor(t)).numpy()


def test_predictor_writes_over_an_input_that_is_still_read(sinusoid):
    """The bug that `PaddleEngine` avoids. When this fails Paddle is cured, and `delete_pass` can go."""
    files, t, truth = sinusoid
    config = inference.Config(*map(str, files))
    config.disable_gpu()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    predictor.get_input_handle("t").copy_from_cpu(t)
    predictor.run()
    found = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    assert np.abs(found - truth).max() > 0.1


def test_paddle_engine_is_right(sinusoid):
    files, t, truth = sinusoid
    engine = engines.PaddleEngine(files, ["t"], "fp32", 1, "FluxTransformer2DModel")
    before = openmp_threads()
    for rows in (t, t[:2]):
        np.testing.assert_allclose(engine.run([rows])[0], truth[: len(rows)], atol=1e-6)
    assert openmp_threads() == before


def test_names_of_another_graph(sinusoid):
    with pytest.raises(UserError, match="its manifest says"):
        engines.PaddleEngine(sinusoid[0], ["x"], "fp32", 1, "")


def test_requirements(monkeypatch):
    with pytest.raises(UserError, match="runtime must be auto or paddle"):
        engines.require("tensorrt")
    engines.require("auto")
    with pytest.raises(UserError, match="not for QwenImageTransformer2DModel: load it in fp32"):
        engines.require_bf16("QwenImageTransformer2DModel")
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16", lambda: False)
    with pytest.raises(UserError, match="needs a processor with AVX-512"):
        engines.require_bf16("FluxTransformer2DModel")
