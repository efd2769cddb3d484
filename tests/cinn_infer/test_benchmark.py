import json
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

from cinn_infer import bench_job, benchmark
from cinn_infer.bench_job import FLUX_BLOCK, Job, forward_arguments, forward_tensors
from cinn_infer.bench_report import Report, Row
from cinn_infer.stages import Stages, with_rest
from fast_diffusers.errors import UserError


class TestReport:
    @pytest.fixture
    def report(self):
        eager = Row(
            "eager", 5.0, 90.0, 0.0, 0.0, [20.0, 21.0, 19.0], 20.0, 21.0, {"transformer": 15.0, "rest": 5.0}, 500.0
        )
        fast = Row("fast", 7.0, 1234.5, 1e-6, 1e-7, [4.0, 5.0, 6.0], 5.0, 9.0, {"transformer": 1.0, "rest": 4.0}, 300.0)
        peer = Row("torch-fp32", 7.0, 50.0, 1e-6, 1e-7, [8.0, 7.0, 9.0], 8.0, 8.0, {}, 700.0)
        return Report("digits", "a call", {"cores": 2}, [eager, fast, peer], {"cinn": "no CINN here"})

    def test_text(self, report):
        head, times, stages, missing = report.as_text().split("\n\n")
        assert head == "digits: a call\ncores 2"
        _, _, *rows = times.splitlines()
        assert [row.split(" | ")[0] for row in rows] == ["| fast", "| torch-fp32", "| eager"]
        assert rows[0] == "| fast | 5.00 | 4.00 | 9.00 | 1234 | 7 | 300 | 1.0e-06 | 1.0e-07 |"
        assert stages.splitlines()[2:] == ["| fast | 1.00 | 4.00 |", "| eager | 15.0 | 5.00 |"]
        assert missing == "cinn did not run: no CINN here"

    def test_json_and_chart(self, report, tmp_path):
        found = json.loads(report.as_json())
        assert found["rows"][1]["times_ms"] == [4.0, 5.0, 6.0] and found["failures"] == {"cinn": "no CINN here"}
        report.plot(tmp_path / "chart.png")
        assert Image.open(tmp_path / "chart.png").size[0] == 1200


def test_backends_side_by_side(make_sana_label, tmp_path):
    make_sana_label().save_pretrained(tmp_path / "pipe")
    call = {"prompt": "3", "num_inference_steps": 2}
    report = benchmark.benchmark(
        str(tmp_path / "pipe"), rounds=2, warmup=0, only=["cinn", "paddle-fp32"], threads=1, call=call
    )
    eager, paddle_row = report.rows
    assert [eager.backend, paddle_row.backend] == ["eager", "paddle-fp32"]
    assert eager.max_error == 0 and paddle_row.max_error < 1e-4
    for row in report.rows:
        assert len(row.times_ms) == 2 and row.first_ms > 0 and row.open_ms > 0 and row.cpu_ms > 0 and row.peak_mib > 100
        assert row.stages.keys() == {"transformer", "rest"}
        assert sum(row.stages.values()) <= 2 * max(row.times_ms)
    assert list(report.failures) == ["cinn"] and "built without CINN" in report.failures["cinn"]
    assert report.machine["threads"] == 1 and "2 steps" in report.measured


class TestBadRequests:
    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"rounds": 0}, "rounds must be at least 1, got 0"),
            ({"warmup": -1}, "warmup must be at least 0, got -1"),
            ({"threads": 0}, "threads must be at least 1, got 0"),
            ({"only": ["tvm"]}, "no backend is called 'tvm': choose among eager, cinn, pir, paddle-fp32"),
            ({"only": ["torch"]}, "no backend is called 'torch'"),
            ({"name": "nothing"}, "neither a pipeline folder nor one of"),
            ({"torch": "no-such-python"}, "no-such-python cannot be run"),
            ({"torch": sys.executable}, "cannot import PyTorch and diffusers: .*torch"),
        ],
    )
    def test_are_errors(self, request_, message):
        with pytest.raises(UserError, match=message):
            benchmark.benchmark(**request_)

    def test_torch_by_itself_runs_a_forward(self):
        names = ["eager", "torch-fp32", "torch-compile-bf16"]
        assert benchmark._unavailable(names, "FluxTransformer2DModel", forward=True) == {}
        refused = benchmark._unavailable(names, "FluxTransformer2DModel", forward=False)
        assert refused.keys() == {*names[1:]} and "ask for forward" in refused["torch-fp32"]

    def test_without_eager_there_is_nothing_to_compare_with(self, tmp_path):
        program = [sys.executable, "-c", "raise SystemExit('labels are 0 to 9')"]
        with pytest.raises(UserError, match=r"does not run eagerly: .*labels are 0 to 9"):
            benchmark._measure({"eager": program, "pir": program}, tmp_path, 1, 0, 1, False, {})


class TestFluxBlock:
    """With a smaller network."""

    @pytest.fixture
    def job(self, monkeypatch, tmp_path):
        small = dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=8)
        for name, value in {**small, "pooled_projection_dim": 8}.items():
            monkeypatch.setitem(FLUX_BLOCK, name, value)
        job = bench_job.preset("flux-block", tmp_path, {}, False, 2)
        job.write(tmp_path)
        return Job.read(tmp_path)

    def test_is_a_forward_of_288_tokens(self, job):
        assert job.forward and job.threads == 2
        tensors = forward_tensors(job.open(), job)
        shapes = {name: list(array.shape) for name, array in tensors.items()}
        assert shapes["hidden_states"] == [1, 256, 64] and shapes["encoder_hidden_states"] == [1, 32, 8]
        assert set(tensors) == {
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
        }
        again = forward_tensors(job.open(), job)
        assert all(np.array_equal(tensors[name], again[name]) for name in tensors)

    def test_no_part_of_it_is_zero(self, job):
        pipe = job.open()
        args, kwargs = forward_arguments(pipe, job)
        with paddle.no_grad():
            output = pipe.transformer(*args, **kwargs)[0]
        assert output.shape == [1, 256, 64] and float(output.abs().min(axis=1).max()) > 0


def test_stages_of_a_pipeline(flux_parts):
    pipe, call = flux_parts
    clocks = Stages(pipe)
    pipe(**call)
    assert set(clocks.seconds) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert all(seconds > 0 for seconds in clocks.seconds.values())
    before = dict(clocks.seconds)
    clocks.remove()
    pipe(**call)
    assert clocks.seconds == before
    assert with_rest({"a": 1.0, "b": 2.0}, 5.0) == {"a": 1.0, "b": 2.0, "rest": 2.0}


@pytest.fixture
def flux_parts(make_pipeline):
    return make_pipeline("flux"), {"prompt": "cat", "num_inference_steps": 1, "height": 32, "width": 32}
