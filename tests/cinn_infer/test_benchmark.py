import json

import pytest

from cinn_infer.benchmark import benchmark
from fast_diffusers.errors import UserError


def test_report_of_a_pipeline(make_sana_label, tmp_path):
    make_sana_label().save_pretrained(tmp_path / "pipe")
    report = benchmark(str(tmp_path / "pipe"), rounds=2, warmup=0, only=["pir"], call={"prompt": "3"})
    assert [row.backend for row in report.rows] == ["eager", "pir"]
    eager, pir = report.rows
    assert eager.error == 0 and pir.error < 1e-4 and len(pir.times_ms) == 2
    assert json.loads(report.as_json())["machine"]["device"] == "cpu"
    assert report.as_table().count("\n") == 3


def test_bad_requests():
    with pytest.raises(UserError, match="rounds must be positive"):
        benchmark(rounds=0)
    with pytest.raises(UserError, match=r"no backend \['tvm'\]: choose among eager, pir, cinn, paddle fp32"):
        benchmark(only=["tvm"])
    with pytest.raises(UserError, match="neither a pipeline folder nor one of"):
        benchmark("nothing")
