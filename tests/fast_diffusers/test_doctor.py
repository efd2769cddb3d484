import importlib
import json
import sys
from types import SimpleNamespace

import paddle
import paddle.nn.functional as F
import pytest

from fast_diffusers import compat, doctor, versions
from fast_diffusers.doctor import Finding

SECTIONS = ["versions", "paddle wheel", "imports", "cpu", "gpu", "operators", "what runs how"]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return doctor.diagnose()


def only(found) -> Finding:
    (finding,) = found
    return finding


def test_nothing_is_broken_here_and_every_section_is_there(findings):
    assert [f for f in findings if f.status == "broken"] == []
    assert list(dict.fromkeys(f.section for f in findings)) == SECTIONS


def test_values_are_those_of_this_machine(findings):
    values = {f.name: f.value for f in findings}
    assert values["cores"].startswith(f"{compat.usable_cores()} usable")
    assert values["CINN"] == ("yes" if paddle.is_compiled_with_cinn() else "no")
    assert float(values["float32 GEMM"].split()[0]) > 1
    assert paddle.get_device() in values["training, sampling"]


def test_text_is_aligned_and_ends_with_advice():
    text = doctor.as_text(
        [
            Finding("cpu", "cores", "2"),
            Finding("cpu", "threads", "1 for 2 cores", "note", "unset OMP_NUM_THREADS"),
            Finding("operators", "GEMM", "wrong", "broken", "reinstall"),
        ]
    )
    assert text.splitlines() == [
        "cpu",
        "  cores    2",
        "- threads  1 for 2 cores",
        "",
        "operators",
        "! GEMM     wrong",
        "",
        "what to change",
        "- threads  unset OMP_NUM_THREADS",
        "! GEMM     reinstall",
        "",
        "1 broken",
    ]


def test_json_carries_everything(findings):
    report = json.loads(doctor.as_json(findings))
    assert report["ok"] is True
    assert [Finding(**f) for f in report["findings"]] == findings
    assert json.loads(doctor.as_json([Finding("cpu", "cores", "2", "broken", "buy")]))["ok"] is False


def test_a_wrong_version_is_broken(monkeypatch):
    requirement = SimpleNamespace(name="numpy", specifier="<2")
    monkeypatch.setattr(versions, "requirements", lambda: [requirement])
    monkeypatch.setattr(versions, "problem", lambda r: f"{r.name} is 2.1.0, needs {r.specifier}")
    broken = only(f for f in doctor.check_versions() if f.status == "broken")
    assert broken.value == "numpy is 2.1.0, needs <2"
    assert "constraints.txt" in broken.advice


def test_cpu_and_gpu_wheels_together_are_broken(monkeypatch):
    monkeypatch.setattr(versions, "requirements", lambda: [])
    monkeypatch.setattr(versions, "installed", lambda name: {"paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.1"})
    broken = only(f for f in doctor.check_versions() if f.status == "broken")
    assert broken.value == "paddlepaddle and paddlepaddle-gpu overwrite each other"


def test_a_failing_import_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_diffusers.lora", None)
    broken = only(doctor.check_imports())
    assert broken.status == "broken"
    assert broken.value.startswith("fast_diffusers.lora: ModuleNotFoundError")


def test_a_wrong_matrix_product_is_broken(monkeypatch):
    matmul = paddle.matmul
    monkeypatch.setattr(paddle, "matmul", lambda a, b: matmul(a, b) * 1.01)
    assert only(doctor.check_gemm(size=64, seconds=0)).status == "broken"
    monkeypatch.setattr(paddle, "matmul", matmul)
    assert only(doctor.check_gemm(size=64, seconds=0)).status == "ok"


def test_missing_and_wrong_attention_are_broken(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention_", lambda q, k, v: v)
    assert only(doctor.check_attention()).status == "broken"
    monkeypatch.delattr(F, "scaled_dot_product_attention_")
    assert "missing" in only(doctor.check_attention()).value


def test_a_function_replaced_later_may_hang(monkeypatch):
    def permute(x, *axes):
        return x

    permute.__module__ = "ppdiffusers.patches.paddle_patch"
    monkeypatch.setattr(paddle, "permute", permute)
    broken = only(doctor.check_tracing())
    assert (broken.status, broken.value) == ("broken", "may hang on permute")


def test_too_few_threads_and_other_kernels_are_noted(monkeypatch):
    monkeypatch.setattr(compat, "usable_cores", lambda: 64)
    monkeypatch.setattr(compat, "mkl_cpu_type", lambda cpuinfo: "5")
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    notes = {f.name: f for f in doctor.check_cpu() if f.status == "note"}
    assert "set it to 64" in notes["threads"].advice
    assert notes["GEMM kernels"].advice == "MKL_DEBUG_CPU_TYPE=5 suits this processor"


@pytest.mark.parametrize("found", [True, False])
def test_export_names_what_is_missing(monkeypatch, found):
    monkeypatch.setattr(doctor, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None) if found else None)
    export = {f.name: f for f in doctor.describe_use()}["export"]
    assert export.status == ("ok" if found else "note")
    assert ("onnxruntime" in export.value) is not found


def test_a_check_that_raises_is_broken_and_the_others_still_run(monkeypatch):
    def check_wheel():
        raise RuntimeError("no such symbol\nmore")
        yield

    monkeypatch.setattr(doctor, "check_wheel", check_wheel)
    monkeypatch.setattr(doctor, "check_gemm", lambda: iter([]))
    found = doctor.diagnose()
    broken = only(f for f in found if f.status == "broken")
    assert (broken.name, broken.value) == ("check_wheel", "RuntimeError: no such symbol")
    assert found[-1].section == "what runs how"
